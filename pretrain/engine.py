"""DeepSpeed: the only module that knows it. Typed config in, ZeRO engine out.

ZeRO sees the trainable parameters only; the frozen backbone is neither in the optimizer nor in a
checkpoint. On CPU, DeepSpeed's own shared-memory collective is switched off: it needs a compiler,
takes minutes to build, and a rank whose peer dies spins in it for ever; gloo notices.
"""

import ctypes
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import EngineConfig, OptimizerConfig
from pretrain.run_plan import RunPlan
from pretrain.world import World

_TAG = "zero"


class Engine:
    """One model under ZeRO. Every method is collective: all ranks call it together.

    Args:
        model: its parameters with `requires_grad` are trained; the rest stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        plan: RunPlan,
        world: World,
    ) -> None:
        deepspeed = _import_deepspeed(world)
        if world.device.type == "cpu":
            keep_freed_memory()
        self.zero_stage = engine.zero_stage
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
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
        self._gathered = deepspeed.zero.GatheredParameters

    def step(
        self, learning_rate: float, micro_batches: list[tuple[Tensor, Tensor, Tensor]]
    ) -> Tensor:
        """One optimizer step over (images, t, noise) micro-batches; the mean loss, a scalar."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        losses = []
        for images, t, noise in micro_batches:
            loss = self._engine(images, t, noise).mean()
            self._engine.backward(loss)
            self._engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def local_shards(self) -> list[Tensor]:
        """This rank's piece of every trained parameter: all of it, or its ZeRO-3 partition."""
        if self.zero_stage == 3:
            return [parameter.ds_tensor.data for parameter in self.trainable.values()]  # type: ignore[attr-defined]
        return [parameter.data for parameter in self.trainable.values()]

    def shard_of(self, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's piece of a whole parameter: `like` is the piece it will replace."""
        if self.zero_stage != 3:
            return whole
        rank, size = dist.get_rank(), like.numel()
        padded = nn.functional.pad(
            whole.flatten(), (0, size * dist.get_world_size() - whole.numel())
        )
        return padded[rank * size : (rank + 1) * size]

    def average_buffers(self) -> None:
        """Give every rank the mean over ranks of BatchNorm's averages.

        Each rank has averaged over its own images. Training does not read them, so once before
        every checkpoint is enough; from there a resumed run and an undisturbed one go on alike.
        """
        for buffer in self.buffers.values():
            if buffer.is_floating_point():  # the count of batches is the same everywhere
                dist.all_reduce(buffer)
                buffer.div_(dist.get_world_size())

    def whole_state(self) -> dict[str, Tensor]:
        """Every trained parameter whole, float32, and every buffer; on the CPU.

        Parameters are gathered one at a time.
        """
        state = {name: buffer.cpu().clone() for name, buffer in self.buffers.items()}
        for name, parameter in self.trainable.items():
            with self._gathered([parameter]) if self.zero_stage == 3 else nullcontext():
                state[name] = parameter.detach().float().cpu().clone().contiguous()
        return state

    def num_optimized(self) -> int:
        """Numbers that this rank's optimizer keeps moments of; ZeRO's padding included."""
        return sum(state["exp_avg"].numel() for state in self._adam.state.values())

    def save(self, folder: Path) -> None:
        """Write this rank's parameters and optimizer state below `folder` (local)."""
        self._engine.save_checkpoint(
            str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
        )
        for script in folder.glob("*.py"):  # DeepSpeed leaves its conversion scripts there
            script.unlink()

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote at the same world size and stage.

        Not strict, because frozen parameters are left out; `trainable_names` is compared by the
        caller, so nothing else can be missing.
        """
        self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)


def deepspeed_config(
    engine: EngineConfig, optimizer: OptimizerConfig, plan: RunPlan
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; the only one there is."""
    return {
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": optimizer.clip_norm or 0.0,
        "bf16": {"enabled": engine.precision == "bf16"},
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


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


def _import_deepspeed(world: World) -> Any:
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Its import prints to standard output at level INFO, once per rank.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, verbose=False)
    return deepspeed
