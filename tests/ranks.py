"""Ranks of torch.distributed over gloo, processes of one machine."""

import contextlib

import torch
import torch.distributed as dist


@contextlib.contextmanager
def group(rank, size, store, **options):
    """In the group, one thread each. Nobody leaves before all are done: who goes early closes what others still use."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, **options)
    yield
    dist.barrier()
    dist.destroy_process_group()
