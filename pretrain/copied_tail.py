"""The decoder beside a model of diffusers: a copy of the model's tail, steered by z.

The frozen model runs once, whole, and what its front makes is recorded: embeddings of time and
condition, then the down path of a U-Net or all but the last blocks of a transformer. The decoder is
a copy of the model in which every module of the front only plays that back, so the model's own
`forward` walks the tail and none of it is written again here. The copy begins with the model's
weights and its last layer with 0: at first the shift is nothing (METHOD section 4).

Letters: B batch, C channels, H height, W width, D = latent_dim, E width of the time embedding.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from pretrain.noise_schedule import NoiseSchedule, Prediction

Condition = Mapping[str, Any]
"""Arguments of the model's `forward` beside image and time: prompt, class, sizes."""


FLOW_TIME = 1000.0
"""What a rectified flow's model is told where all is noise."""


class Anatomy(NamedTuple):
    """Where a model's front ends and where z goes in; names of modules."""

    front: tuple[str, ...]
    """Recorded and replayed."""
    steered: tuple[str, ...]
    """GroupNorms of the tail that z scales and shifts, or embeddings of the front that it joins."""
    last: str
    """The layer that makes the output."""
    width: int
    """E."""


class TailPass(NamedTuple):
    """What the backbone makes of (x_t, t) under a condition; nothing in it carries a gradient."""

    x_BCHW: Tensor
    time_B: Tensor
    condition: Condition
    front: Mapping[str, Any]
    """Outputs of the front's modules."""
    output_BCHW: Tensor
    """The backbone's own prediction."""


class TailTrunk(nn.Module):
    """All that the frozen model does in a step, as one call."""

    def __init__(self, model: nn.Module, front: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._recorded: dict[str, Any] = {}
        for name in front:
            model.get_submodule(name).register_forward_hook(partial(self._record, name))

    def _record(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        # In a norm's backward, torch 2.13 crashes on channels-last input that has no gradient.
        self._recorded[name] = tree_map_only(Tensor, Tensor.contiguous, output)

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor, time_B: Tensor, condition: Condition) -> TailPass:
        dtype = next(self.model.parameters()).dtype
        x = x_BCHW.to(dtype)
        condition = tree_map_only(Tensor, partial(_in_dtype, dtype=dtype), condition)
        output = run_model(self.model, x, time_B, condition)
        recorded, self._recorded = self._recorded, {}
        return TailPass(x, time_B, condition, recorded, output)


class Playback(nn.Module):
    """Stands in the copy for a module of the front; with `width`, z's embedding is added."""

    given: Any = None
    given_z_BE: Tensor | None = None

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        if width is not None:
            self.emb_z_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width))

    def forward(self, *inputs: object, **named: object) -> Any:
        if self.given_z_BE is None:
            return self.given
        return self.given + self.emb_z_layers(self.given_z_BE)


class SteeredNorm(nn.Module):
    """h <- (1 + s_z) GN(h) + b_z: a residual block's second GroupNorm."""

    given_z_BE: Tensor | None = None

    def __init__(self, norm: nn.GroupNorm, width: int) -> None:
        super().__init__()
        self.norm = norm
        self.emb_z_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * norm.num_channels))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        scale, shift = self.emb_z_layers(self.given_z_BE)[:, :, None, None].chunk(2, dim=1)
        return self.norm(h_BCHW) * (1 + scale) + shift


class CopiedTail(nn.Module):
    """The shift G(x_t, t, c).

    The frozen trunk is no submodule: parameters and state, which engines shard, optimize and save,
    are what training changes.
    """

    recomputes = False
    """Keep only the inputs for the backward pass, which then walks the tail once more."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        schedule: NoiseSchedule,
        prediction: Prediction,
        condition: Condition,
        *,
        latent_dim: int,
    ) -> None:
        super().__init__()
        self._outside = (TailTrunk(model, anatomy.front),)  # a tuple hides it from nn.Module
        self._schedule, self._is_flow = schedule, prediction == "flow"
        self._condition = condition
        self.label_emb = nn.Linear(latent_dim, anatomy.width)
        self._playbacks = {
            name: Playback(anatomy.width if name in anatomy.steered else None)
            for name in anatomy.front
        }
        self.tail = _copy_tail(model, self._playbacks)
        self._steered = [
            self._playbacks.get(name) or _steer_norm(self.tail, name, anatomy.width)
            for name in anatomy.steered
        ]
        for parameter in self.tail.get_submodule(anatomy.last).parameters():
            nn.init.zeros_(parameter)
        self.tail.requires_grad_(True)

    @property
    def trunk(self) -> TailTrunk:
        """The frozen model, as it is run."""
        return self._outside[0]

    def look(self, x_BCHW: Tensor, t_B: Tensor, *caption: Tensor) -> TailPass:
        """Everything that the frozen model contributes at (x_t, t).

        Args:
            caption: embeddings of each image's caption, token by token and, where the model takes
                them, pooled; instead of what every image is told alike.
        """
        condition = tree_map_only(Tensor, partial(_for_each, x_BCHW=x_BCHW), self._condition)
        if caption:
            condition = with_caption(condition, *caption)
        if not self._is_flow:
            return self.trunk(x_BCHW, t_B, condition)
        schedule = self._schedule.to(x_BCHW.device)
        time_B = schedule.flow_sigma(t_B) * FLOW_TIME
        return self.trunk(schedule.flow_scale(t_B) * x_BCHW, time_B, condition)

    def forward(self, frozen: TailPass, condition_BD: Tensor) -> Tensor:
        """The shift under a condition, BCHW; may be called again on the same frozen pass."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._walk, frozen, condition_BD, use_reentrant=False)
        return self._walk(frozen, condition_BD)

    def _walk(self, frozen: TailPass, condition_BD: Tensor) -> Tensor:
        emb_z = self.label_emb(condition_BD)
        for name, playback in self._playbacks.items():
            playback.given = frozen.front[name]
        for module in self._steered:
            module.given_z_BE = emb_z
        return run_model(self.tail, frozen.x_BCHW, frozen.time_B, frozen.condition)


def with_caption(
    condition: Condition, prompt_BLE: Tensor, pooled_BE: Tensor | None = None
) -> Condition:
    """A condition that tells a caption, in the words of the model that it was made for."""
    told = {**condition, "encoder_hidden_states": prompt_BLE}
    if "pooled_projections" in condition:
        told["pooled_projections"] = pooled_BE
    if "added_cond_kwargs" in condition:
        told["added_cond_kwargs"] = {**condition["added_cond_kwargs"], "text_embeds": pooled_BE}
    return told


def _for_each(told: Tensor, *, x_BCHW: Tensor) -> Tensor:
    """What is told of one image, for every image of a batch."""
    return told.expand(len(x_BCHW), *told.shape[1:]).to(x_BCHW.device)


def _in_dtype(told: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Class numbers stay whole."""
    return told.to(dtype) if told.is_floating_point() else told


def run_model(model: nn.Module, x_BCHW: Tensor, time_B: Tensor, condition: Condition) -> Tensor:
    """A diffusers model's prediction, BCHW; learnt variances are dropped."""
    output = model(x_BCHW, timestep=time_B, return_dict=False, **condition)[0]
    return output[:, : x_BCHW.shape[1]]


def _copy_tail(model: nn.Module, playbacks: Mapping[str, Playback]) -> nn.Module:
    """`model` copied, but for its front, which is never copied: it may be most of the weights."""
    memo = {id(model.get_submodule(name)): playback for name, playback in playbacks.items()}
    tail = copy.deepcopy(model, memo)
    for name, playback in playbacks.items():  # some lie inside others that are replayed as a whole
        *parents, leaf = name.split(".")
        at = tail
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        setattr(at, leaf, playback)
    return tail


def _steer_norm(tail: nn.Module, name: str, width: int) -> SteeredNorm:
    norm = tail.get_submodule(name)
    assert isinstance(norm, nn.GroupNorm)
    steered = SteeredNorm(norm, width)
    tail.set_submodule(name, steered)
    return steered
