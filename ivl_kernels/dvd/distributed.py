"""Features over `torch.distributed` (gloo): a size that is checked, then the bytes of the message."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .features import Limits, MessageError, VisualFeatures


def send(features: VisualFeatures, to: int, group: dist.ProcessGroup | None = None) -> None:
    """Send features to a rank, which calls `receive`."""
    blob = torch.frombuffer(bytearray(features.to_bytes()), dtype=torch.uint8)
    dist.send(torch.tensor([len(blob)]), to, group)
    dist.send(blob, to, group)


def receive(source: int, limits: Limits | None = None, group: dist.ProcessGroup | None = None) -> VisualFeatures:
    """Receive features that a rank sends.

    Raises:
        MessageError: as `VisualFeatures.from_bytes`. After a size over the limit the message is not read: leave the
            group.
    """
    limits = limits or Limits()
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, source, group)
    if not 0 < int(size) <= limits.size:
        raise MessageError("size", f"got {int(size)} bytes, expected at most {limits.size}")
    blob = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(blob, source, group)
    return VisualFeatures.from_bytes(blob.numpy().data, limits)
