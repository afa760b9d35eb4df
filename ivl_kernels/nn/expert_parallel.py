"""Experts spread over the ranks of a process group, each rank with its own tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..ops import moe_dispatch, moe_experts
from .quantised_experts import QuantisedExperts


class _Flight:
    """An exchange under way: what one autograd node starts another waits for.

    Between the two, gradients follow a tensor of the shape that was sent.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> None:
        self.send, self.receive, self.group = send, receive, group
        self.work: Any = None
        self.rows: torch.Tensor | None = None
        self.received: Any = None

    def start(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        self.rows = rows.contiguous()  # kept alive until the wait
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        self.work = dist.all_to_all_single(out, self.rows, receive, send, group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        self.work.wait()
        self.work = self.rows = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, flight: _Flight) -> torch.Tensor:
        ctx.flight = flight
        flight.received = flight.start(rows, flight.send, flight.receive)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.flight.wait()
        return grads[0], None


class _Wait(torch.autograd.Function):
    """The backward of the wait starts the way back, the backward of the start waits for it."""

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor, flight: _Flight) -> torch.Tensor:
        ctx.flight = flight
        flight.wait()
        received, flight.received = flight.received, None
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flight = ctx.flight
        return flight.start(grads[0], flight.receive, flight.send), None


class ExpertParallelExperts(nn.Module):
    """`moe_experts` with the experts spread over a process group; every rank brings its own tokens.

    Rank r of W holds the experts E * r // W to E * (r + 1) // W, as parameters named like transformers' experts. A call
    sends every row to the rank of its expert and back (`all_to_all_single`), while the rows of this rank's own experts
    are computed; they are never copied. All ranks must call it together, any of them with any number of tokens.

    Args:
        gate_up_proj, down_proj: this rank's experts, laid out as `moe_experts` says.
        gate_up_proj_bias, down_proj_bias: their biases, or None.
        gate_up_scales, down_scales: of experts in few bits, as `moe_experts` says; those get no gradients.
        num_experts: E, of all ranks.
        group: the process group; None: the default group.
        activation, alpha, limit, layout, backend: as of `moe_experts`.

    Raises:
        ValueError: the number of experts given is not this rank's share of `num_experts`, or there are more ranks than
            experts.

    Sends rows in the dtype of `hidden`. Reads one small tensor from the device: the sizes of the exchange, which
    `all_to_all_single` takes as host integers. Deterministic.
    """

    def __init__(
        self,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        gate_up_proj_bias: torch.Tensor | None = None,
        down_proj_bias: torch.Tensor | None = None,
        *,
        num_experts: int,
        gate_up_scales: torch.Tensor | None = None,
        down_scales: torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
        layout: str = "concatenated",
        backend: str = "",
    ) -> None:
        super().__init__()
        self.group, self.num_experts = group, num_experts
        self.activation, self.alpha, self.limit = activation, alpha, limit
        self.layout, self.backend = layout, backend
        self.bounds = self.shares(num_experts, dist.get_world_size(group))
        self.rank = dist.get_rank(group)
        ranks = len(self.bounds) - 1
        if num_experts < ranks:
            raise ValueError(f"num_experts: got {num_experts}, expected at least one for each of {ranks} ranks")
        expected = self.bounds[self.rank + 1] - self.bounds[self.rank]
        if gate_up_proj.shape[0] != expected:
            raise ValueError(
                f"gate_up_proj: got {gate_up_proj.shape[0]} experts, expected {expected}: the share of rank "
                f"{self.rank} in {num_experts}"
            )

        def parameter(tensor: torch.Tensor | None, trained: bool = True) -> nn.Parameter | None:
            return None if tensor is None else nn.Parameter(tensor, requires_grad=trained)

        plain = gate_up_scales is None and down_scales is None
        self.gate_up_proj, self.down_proj = parameter(gate_up_proj, plain), parameter(down_proj, plain)
        self.gate_up_proj_bias, self.down_proj_bias = parameter(gate_up_proj_bias), parameter(down_proj_bias)
        self.gate_up_proj_scales, self.down_proj_scales = (
            parameter(gate_up_scales, False),
            parameter(down_scales, False),
        )

    @staticmethod
    def shares(num_experts: int, ranks: int) -> list[int]:
        """The first expert of each rank, and the number of experts."""
        return [num_experts * rank // ranks for rank in range(ranks + 1)]

    @classmethod
    def from_full(
        cls,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        gate_up_proj_bias: torch.Tensor | None = None,
        down_proj_bias: torch.Tensor | None = None,
        *,
        gate_up_scales: torch.Tensor | None = None,
        down_scales: torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> ExpertParallelExperts:
        """From the tensors of all experts: keeps a copy of this rank's share."""
        experts = gate_up_proj.shape[0]
        bounds, rank = cls.shares(experts, dist.get_world_size(group)), dist.get_rank(group)
        mine = slice(bounds[rank], bounds[rank + 1])
        tensors = (gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias, gate_up_scales, down_scales)
        *local, gate_up_scales, down_scales = (None if t is None else t.detach()[mine].clone() for t in tensors)
        options |= dict(gate_up_scales=gate_up_scales, down_scales=down_scales)
        return cls(*local, num_experts=experts, group=group, **options)  # type: ignore[arg-type]

    @classmethod
    def from_quantised(
        cls, experts: QuantisedExperts, *, group: dist.ProcessGroup | None = None
    ) -> ExpertParallelExperts:
        """From experts in few bits: keeps a copy of this rank's share, as it is stored."""
        (gate_up, gate_up_scales), (down, down_scales) = map(experts.tensors, ("gate_up_proj", "down_proj"))
        return cls.from_full(
            gate_up, down, experts.gate_up_proj_bias, experts.down_proj_bias, gate_up_scales=gate_up_scales,
            down_scales=down_scales, group=group, activation=experts.activation, alpha=experts.alpha,
            limit=experts.limit, layout="interleaved" if experts.interleaved else "concatenated",
            backend=experts.backend,
        )  # fmt: skip

    def _experts(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return moe_experts(
            hidden, ids, weights, self.gate_up_proj, self.down_proj, gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias, gate_up_scales=self.gate_up_proj_scales, down_scales=self.down_proj_scales,
            activation=self.activation, alpha=self.alpha, limit=self.limit, layout=self.layout, backend=self.backend,
        )  # fmt: skip

    def _sizes(self, counts: torch.Tensor) -> tuple[list[int], list[int], torch.Tensor]:
        """Rows to send to and to receive from each rank, and the latter's counts [W, local]."""
        sizes = [end - first for first, end in zip(self.bounds, self.bounds[1:])]
        ranks, local = len(sizes), sizes[self.rank]
        incoming = counts.new_empty(ranks * local)
        dist.all_to_all_single(incoming, counts, [local] * ranks, sizes, group=self.group)
        incoming = incoming.view(ranks, local)
        per_rank = torch.stack([part.sum() for part in counts.split(sizes)])
        send, receive = torch.stack([per_rank, incoming.sum(1)]).tolist()  # the one read from the device
        return send, receive, incoming

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden: [S, H], this rank's tokens; S may differ between ranks and be 0.
            ids: [S, k] int64 or int32, of 0 to num_experts - 1; others contribute zero.
            weights: [S, k].

        Returns:
            [S, H], as if all experts were here.
        """
        first, end = self.bounds[self.rank], self.bounds[self.rank + 1]
        local_ids = torch.where((ids >= first) & (ids < end), ids - first, end - first)
        if len(self.bounds) == 2:
            return self._experts(hidden, local_ids, weights)
        tokens, top_k = ids.shape
        dispatch = moe_dispatch(ids, self.num_experts)
        send, receive, incoming = self._sizes(dispatch.counts)
        before, own, total = sum(send[: self.rank]), send[self.rank], sum(send)
        received = sum(receive) - receive[self.rank]
        send[self.rank] = receive[self.rank] = 0

        there = _Flight(send, receive, self.group)
        order = dispatch.permutation
        slots = torch.cat([order[:before], order[before + own : total]])
        rows = _Start.apply(hidden[slots.long() // top_k], there)
        out = self._experts(hidden, local_ids, weights)
        rows = _Wait.apply(rows, there)

        keep = torch.arange(incoming.shape[0], device=ids.device) != self.rank
        counts = (incoming * keep.unsqueeze(1)).flatten()
        experts = torch.arange(end - first, device=ids.device).repeat(incoming.shape[0])
        row_ids = experts.repeat_interleave(counts, output_size=received).unsqueeze(1)
        rows = self._experts(rows, row_ids, rows.new_ones(received, 1))

        back = _Flight(receive, send, self.group)
        rows = _Wait.apply(_Start.apply(rows, back), back)
        # One more row, of zeros, stands for the slots that were not sent; it also keeps every rank in the backward.
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        at = dispatch.inverse
        at = torch.where(at < before, at, torch.where((at >= before + own) & (at < total), at - own, total - own))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        away = (rows[at.long()].view(tokens, top_k, rows.shape[1]).to(wide) * weights.to(wide).unsqueeze(2)).sum(1)
        return (out.to(wide) + away).to(hidden.dtype)

    def extra_repr(self) -> str:
        first, end = self.bounds[self.rank], self.bounds[self.rank + 1]
        return f"experts {first} to {end} of {self.num_experts}, {self.activation}, {self.layout}"
