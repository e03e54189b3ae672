"""This process's place among the ranks: under Ray Train, under torchrun, or alone."""

import os
import resource
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


@dataclass(frozen=True, slots=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def peak_memory_gib(self) -> float:
        """Most memory that this rank has held so far: of its GPU, or of its process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        in_kib = sys.platform != "darwin"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1024 if in_kib else 1) / 2**30


def join_world(*, timeout_seconds: float = 300.0) -> World:
    """Join the process group that the launcher's environment describes, or form one alone.

    Ray Train has already joined it; torchrun has only set RANK, WORLD_SIZE and MASTER_*.
    """
    use_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
        _choose_repeatable_kernels()
    if not dist.is_initialized():
        alone = "RANK" not in os.environ
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            rank=0 if alone else -1,
            world_size=1 if alone else -1,
            store=HashStore() if alone else None,
            timeout=timedelta(seconds=timeout_seconds),
        )
    return World(dist.get_rank(), dist.get_world_size(), device)


def _choose_repeatable_kernels() -> None:
    """Have a GPU compute the same bits each time, as a CPU does anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling: Any = torch.utils.deterministic  # of memory that nothing here reads before it writes
    filling.fill_uninitialized_memory = False


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean of a scalar over all ranks, as a number; every rank must call it."""
    total = value.detach().clone().double()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def from_first_rank(value: object) -> object:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_from_ranks(value: object) -> list[object]:
    """Every rank's value, in order of rank, on every rank."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
