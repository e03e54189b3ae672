"""DeepSpeed: the only module that knows it. Typed config in, ZeRO engine out.

ZeRO's optimizer sees the trained parameters only. The frozen backbone has no optimizer: it is whole
on every rank, or has a ZeRO-3 engine of its own that partitions or offloads its weights.

On CPU, DeepSpeed's own shared-memory collective is switched off: it needs a compiler, takes minutes
to build, and a rank whose peer dies spins in it for ever; gloo notices.
"""

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import EngineConfig, OptimizerConfig
from pretrain.attention import DTYPES
from pretrain.pieces import Piece, shared_out
from pretrain.run_plan import RunPlan
from pretrain.step_clock import Clock, timed, untimed
from pretrain.world import World

# DeepSpeed calls collectives by names that torch warns about, on every rank and in every run.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's dynamic loss scaler that its next steps depend on; stage 0's has no
hysteresis."""


BUCKET_NUMBERS = 2**24
"""Gradients that are summed over ranks at a time. DeepSpeed's default would hold 2 GB for them."""
LIVE_NUMBERS = 2**24
"""Most weights that are whole at a time where weights are in parts, beside a layer's own."""
_IN_PARTS = {
    "stage": 3,
    "stage3_max_live_parameters": LIVE_NUMBERS,
    "stage3_prefetch_bucket_size": LIVE_NUMBERS // 2,
    "stage3_max_reuse_distance": 0,  # a layer's weights are let go as soon as it has computed
    "stage3_param_persistence_threshold": 4096,  # biases and norms stay
}


def place_frozen(trunk: nn.Module, engine: EngineConfig, device: torch.device) -> None:
    """Put frozen weights where `engine.backbone` says, in the run's precision.

    Where they are in parts, this, and every call of `trunk` from then on, is collective.
    """
    trunk.to(device, DTYPES[engine.precision])
    if engine.backbone == "replicated":
        return
    offload = {"offload_param": {"device": "cpu"}} if engine.backbone == "offloaded" else {}
    _import_deepspeed(device).initialize(
        model=trunk,
        config={
            "train_micro_batch_size_per_gpu": 1,  # which it insists on, and does not use
            "zero_optimization": _IN_PARTS | offload,
            **_digits(engine),
        },
        dist_init_required=False,
    )


class Engine:
    """One model under ZeRO. `step` is collective: all ranks call it together.

    Args:
        model: all its parameters are trained.
        clock: charged with forward, backward, communication and optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        plan: RunPlan,
        world: World,
        clock: Clock = untimed,
    ) -> None:
        deepspeed = _import_deepspeed(world.device)
        self._clock, self._norm = clock, torch.zeros(())
        _time_collectives(deepspeed, clock)
        if world.device.type == "cpu":
            keep_freed_memory()
        self.zero_stage = engine.zero_stage
        self.trainable = dict(model.named_parameters())
        self.shapes = {name: list(p.shape) for name, p in self.trainable.items()}
        self.buffers = dict(model.named_buffers())  # BatchNorm's; nothing else here has any
        self._adam = torch.optim.AdamW(
            list(self.trainable.values()),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._adam,
            config=deepspeed_config(engine, optimizer, plan),
            dist_init_required=False,
        )
        self.pieces = self._own_pieces()

    def step(self, learning_rate: float, micro_batches: list[tuple[Tensor, ...]]) -> Tensor:
        """One optimizer step over micro-batches, see `inputs`; the mean loss, a scalar."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        losses = []
        for inputs in micro_batches:
            with self._clock("forward"):
                loss = self._engine(*inputs).mean()
            with self._clock("backward"):
                self._engine.backward(loss)
            with self._clock("optimizer"):
                self._keep_norm()
                self._engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    @property
    def gradient_norm(self) -> Tensor | float:
        """Of the last step's whole gradient, before it was clipped; the same on every rank.

        0 where fp16's loss scale was too large and the step was skipped: that is no fault.
        """
        if self._optimizer is self._adam:
            return self._norm
        skipped = self._loss_scaler() is not None and self._optimizer.overflow
        return 0.0 if skipped else self._optimizer._global_grad_norm

    def _keep_norm(self) -> None:
        """Where no ZeRO optimizer computes it. The gradients of a step's end are whole."""
        if self._optimizer is self._adam and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)

    @property
    def saves(self) -> list[int]:
        """Which of its pieces this rank puts into a checkpoint: all, or its share of those that
        every rank has."""
        if self.zero_stage:
            return list(range(len(self.pieces)))
        sizes = [piece.weights.numel() for piece in self.pieces]
        return shared_out(sizes, dist.get_world_size())[dist.get_rank()]

    def average_buffers(self) -> None:
        """Give every rank the mean over ranks of BatchNorm's averages.

        Each rank has averaged over its own images. Training does not read them, so once before
        every checkpoint is enough; from there a resumed run and an undisturbed one go on alike.
        """
        for buffer in self.buffers.values():
            if buffer.is_floating_point():  # the count of batches is the same everywhere
                dist.all_reduce(buffer)
                buffer.div_(dist.get_world_size())

    def num_optimized(self) -> int:
        """Numbers that this rank's optimizer keeps moments of; ZeRO's padding included."""
        return sum(state["exp_avg"].numel() for state in self._adam.state.values())

    def counters(self) -> dict[str, float]:
        """What a checkpoint must hold beside the pieces: Adam's updates, and fp16's loss scale."""
        state = next(iter(self._adam.state.values()))
        found = {"updates": float(state["step"])}
        scaler = self._loss_scaler()
        return found | {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)}

    def restore(self, counters: Mapping[str, float]) -> None:
        """Go on from pieces that have been filled: counters, and what ZeRO derives from them."""
        for state in self._adam.state.values():
            state["step"].fill_(counters["updates"])
        scaler = self._loss_scaler()
        for key in _SCALER:
            if hasattr(scaler, key) and key in counters:
                setattr(scaler, key, type(getattr(scaler, key))(counters[key]))
        self._weights_from_pieces()

    def _loss_scaler(self) -> Any:
        """fp16's dynamic one; None where losses are not scaled. Stage 0 keeps it elsewhere."""
        if self.zero_stage == 0:
            scaler = getattr(self._optimizer, "loss_scale_config", None)
            return scaler if getattr(scaler, "dynamic_loss_scale", False) else None
        scaler = getattr(self._optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    # --- where ZeRO keeps what ------------------------------------------------------------------

    def _own_pieces(self) -> list[Piece]:
        """Views of the float32 weights that this rank's optimizer updates, and of its moments.

        AdamW makes its moments in its first step; here they are made at once, so that a checkpoint
        can hold them before it. (Stage 0 in fewer digits has taken a step already, with gradients
        of zero.)
        """
        if self.zero_stage == 0 and self._optimizer is not self._adam:
            self._adam.state.clear()
            for parameter, copy in zip(self.trainable.values(), self._copies(), strict=True):
                copy.data.copy_(parameter.data)
        pieces = []
        for number, (name, parameter) in enumerate(self.trainable.items()):
            for flat, at, start, size in self._places(number, parameter):
                state = self._adam.state[flat]
                if not state:
                    state["step"] = torch.zeros((), device=flat.device)
                    state["exp_avg"] = torch.zeros_like(flat)
                    state["exp_avg_sq"] = torch.zeros_like(flat)
                views = [
                    tensor.detach().view(-1).narrow(0, at, size)
                    for tensor in (flat, state["exp_avg"], state["exp_avg_sq"])
                ]
                pieces.append(Piece(name, start, *views))
        return pieces

    def _places(self, number: int, parameter: nn.Parameter) -> list[tuple[Tensor, int, int, int]]:
        """(float32 tensor, place in it, place in the parameter, numbers) that are this rank's."""
        zero: Any = self._optimizer
        if self.zero_stage == 3:
            group, at, size = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank() * size
            real = min(size, max(0, parameter.ds_numel - start))  # pyright: ignore[reportAttributeAccessIssue]
            flat = zero.fp32_partitioned_groups_flat[group]
            return [(flat, at, start, real)] if real else []
        if self.zero_stage:
            mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                return []
            there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
            flats = getattr(zero, "single_partition_of_fp32_groups", None)
            if flats is None:  # BF16_Optimizer: stage 1 in bf16
                flats = zero.fp32_groups_flat_partition
            flat = flats[mapping.param_group_index]
            return [(flat, there.start, here.start, there.numel)]
        if zero is self._adam:
            return [(parameter, 0, 0, parameter.numel())]
        return [(self._copies()[number], 0, 0, parameter.numel())]

    def _copies(self) -> list[Tensor]:
        """The float32 weights of stage 0 in fewer digits, in the order of the parameters."""
        zero: Any = self._optimizer
        return zero.fp32_groups[0]

    def _weights_from_pieces(self) -> None:
        """Have the model compute with the float32 weights as they are now; collective."""
        zero: Any = self._optimizer
        if self.zero_stage == 3:
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            kept = zero.persistent_parameters  # whole on every rank, because they are small
            if kept:
                kept[0].partition(kept)
                kept[0].all_gather(kept)
        elif self.zero_stage:
            zero.update_lp_params()
        elif zero is not self._adam:
            for parameter, copy in zip(self.trainable.values(), self._copies(), strict=True):
                parameter.data.copy_(copy.data)


def deepspeed_config(
    engine: EngineConfig, optimizer: OptimizerConfig, plan: RunPlan
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; the only one there is."""
    return {
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": optimizer.clip_norm or 0.0,
        "zero_optimization": {"stage": engine.zero_stage, "reduce_bucket_size": BUCKET_NUMBERS}
        | (_IN_PARTS if engine.zero_stage == 3 else {})
        | ({"offload_optimizer": {"device": "cpu"}} if engine.offload_optimizer else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
        "steps_per_print": 2**31,
        **_digits(engine),
    }


def _digits(engine: EngineConfig) -> dict[str, Any]:
    return {name: {"enabled": engine.precision == name} for name in ("bf16", "fp16")}


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones.

    It gives large blocks back to the system otherwise, and every step pays for fetching and
    clearing the same pages again.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mmap_threshold, trim_threshold = -3, -1
    mallopt(mmap_threshold, 32 * 2**20)  # the most that it accepts
    mallopt(trim_threshold, -1)  # never


_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "barrier",
)


def _time_collectives(deepspeed: Any, clock: Clock) -> None:
    """Charge what DeepSpeed's collectives take, wherever it calls them, to a phase of their own.

    Those that overlap with computing on a GPU run in a stream of their own and are not charged:
    what is left is the time that a step waits for them.
    """
    backend = deepspeed.comm.comm.cdb
    for name in _COLLECTIVES:
        method = getattr(backend, name)
        method = getattr(method, "__wrapped__", method)  # an engine before this one had a clock
        setattr(backend, name, timed(clock, "communication", method))


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Its import prints to standard output at level INFO, once per rank.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, verbose=False)
    return deepspeed
