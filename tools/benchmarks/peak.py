"""What this machine can reach at best on the convolutions and matrix products of one model.

Every such operation of a forward and backward pass is listed with its shapes, run alone on random
numbers in each memory layout, and its best time kept. The peak is then the model's own mix: all its
FLOPs divided by the sum of all its best times.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

REPEATS = 4
_WEIGHT_AND_DILATION = {
    torch.ops.aten.convolution: (1, 5),
    torch.ops.aten.convolution_backward: (2, 6),
}
"""Which arguments of an operation are its weight and its dilation."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Stands for a tensor in a listed operation."""

    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One convolution or matrix product, forward or backward."""

    function: Any
    arguments: tuple[Any, ...]
    flops: int


@dataclass(frozen=True, slots=True)
class Peak:
    """The best that was measured, over the model's mix."""

    flops: int
    seconds: float

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds


class OperationList(TorchDispatchMode):
    """Counts the operations with FLOPs that run inside it; tensors on `meta` will do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Operation] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.counts[Operation(func, tuple(map(_without_tensor, args)), flops)] += 1
        return out


def measure_peak(counts: Counter[Operation]) -> Peak:
    """Run every operation alone, in each way REPEATS times."""
    flops = sum(operation.flops * count for operation, count in counts.items())
    seconds = sum(_best_seconds(operation) * count for operation, count in counts.items())
    return Peak(flops, seconds)


def best_cpu_seconds(function: Callable[[], object]) -> float:
    """The least CPU time of REPEATS calls, after one that is not counted."""
    function()
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


@torch.no_grad()
def _best_seconds(operation: Operation) -> float:
    best = float("inf")
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = [_with_tensor(argument, layout) for argument in operation.arguments]
        for arguments in _equivalents(operation, tensors):
            best = min(best, best_cpu_seconds(lambda a=arguments: operation.function(*a)))
    return best


def _equivalents(operation: Operation, arguments: list[Any]) -> list[list[Any]]:
    """A 1x1 kernel does the same at any dilation, but PyTorch runs it by other means then."""
    kind = operation.function.overloadpacket
    if kind not in _WEIGHT_AND_DILATION:
        return [arguments]
    weight, dilation = _WEIGHT_AND_DILATION[kind]
    if any(size != 1 for size in arguments[weight].shape[2:]):
        return [arguments]
    dilated = list(arguments)
    dilated[dilation] = [2] * len(arguments[dilation])
    return [arguments, dilated]


def _without_tensor(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Shape(tuple(argument.shape))
    return tuple(argument) if isinstance(argument, list) else argument


def _with_tensor(argument: Any, layout: torch.memory_format) -> Any:
    if isinstance(argument, Shape):
        random = torch.randn(argument.sizes)
        return random.contiguous(memory_format=layout) if random.ndim == 4 else random
    return list(argument) if isinstance(argument, tuple) else argument
