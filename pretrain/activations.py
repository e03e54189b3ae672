"""What a forward and backward pass will hold in memory, found by taking it with fake tensors."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.inputs import zeros


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes beyond weights and inputs, at the moment when they are most."""

    without_gradients: int
    """If each weight's gradient goes elsewhere as soon as it is there."""
    with_gradients: int
    """If all of them stay to the end."""


def measure_pass(
    model: nn.Module, *frozen: nn.Module, image_size_px: int, micro_batch: int
) -> PassMemory:
    """Of a micro-batch. Nothing is computed; `model` and `frozen` are of no use afterwards.

    Args:
        model: inputs to losses (see `inputs`), on the CPU or on the meta device.
        frozen: what it calls that is no part of it.
    """
    # What is not made here, such as a noise schedule, becomes fake where it is used.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (model, *frozen):
            module.train(module is model)
            _make_fake(module, mode)
        inputs = zeros(model, micro_batch, image_size_px, "cpu")
        with _LiveBytes(list(model.parameters())) as live:
            model(*inputs).mean().backward()
    return PassMemory(live.most_without_gradients, live.most)


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            fake = nn.Parameter(_on_cpu(weight, mode), requires_grad=weight.requires_grad)
            setattr(part, name, fake)
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, _on_cpu(buffer, mode))


def _on_cpu(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Fake, with the shape of one on the CPU or on the meta device."""
    with mode:
        return torch.empty_like(tensor, device="cpu")


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off as they are freed."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.most = self.most_without_gradients = 0
        self._now = self._gradients = 0
        self._known: set[int] = set()
        for weight in weights:
            weight.register_post_accumulate_grad_hook(self._note_gradient)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        before = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _storage(tensor) not in before:
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self._now)
        self.most_without_gradients = max(self.most_without_gradients, self._now - self._gradients)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._now += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size

    def _note_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self._gradients += weight.grad.nbytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
