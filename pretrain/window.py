"""What happened since the last report, as it is reported."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from data_pipelines.sample_stream import Batch
from pretrain.attention import DTYPES
from pretrain.flops import ModelFlops, count_flops, measured_peak
from pretrain.progress import Progress
from pretrain.run_plan import RunPlan
from pretrain.sentinels import Taken
from pretrain.step_clock import PHASES, StepClock
from pretrain.world import World, mean_over_ranks

STARVING = 0.1
"""Share of a step spent waiting for data above which something is said."""
BUSY = 0.8
"""Share of their time that decoding threads work above which they are what is waited for."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a machine could do, and what a step asks of it."""

    flops: ModelFlops
    peak: float
    """FLOP/s of a matrix product, measured on this rank at the start."""


class Window:
    """The steps since the last report."""

    def __init__(self, *, warm: bool = False) -> None:
        self._warm = warm  # in a run's first window everybody waits once
        self.taken: list[Taken] = []
        self.decode_seconds = 0.0
        self._positions: list[int] = []
        self._keys: list[str] = []

    def note(self, batch: Batch) -> None:
        """A micro-batch of the step that comes."""
        self._positions += batch.positions.tolist()
        self._keys += batch.keys
        self.decode_seconds += batch.decode_seconds

    def took(self, step: int, loss: Tensor, gradient_norm: Tensor | float) -> None:
        """The step is done."""
        samples = tuple(self._positions), tuple(self._keys)
        self.taken.append(Taken(step, loss, gradient_norm, *samples))
        self._positions, self._keys = [], []

    def close(
        self,
        clock: StepClock,
        config: RunConfig,
        plan: RunPlan,
        world: World,
        speed: Speed,
        bad_samples: int,
    ) -> Progress:
        """Collective: the loss is the mean over ranks."""
        with clock("communication"):
            loss = mean_over_ranks(torch.stack([taken.loss for taken in self.taken]).mean())
        phases = clock.close()
        seconds = sum(phases.values())
        shares = {phase: phases[phase] / seconds for phase in PHASES}
        step, images = self.taken[-1].step, len(self.taken) * config.train.global_batch
        here = images / plan.world_size / seconds
        frozen, trained = here * speed.flops.frozen, here * speed.flops.trained
        return Progress(
            rank=world.rank,
            pid=os.getpid(),
            step=step,
            total_steps=plan.total_steps,
            images=step * config.train.global_batch,
            loss=loss,
            images_per_second=images / seconds,
            data_wait_share=shares["data wait"],
            peak_memory_gib=world.peak_memory_gib(),
            bad_samples=bad_samples,
            checkpoint_step=0,
            gradient_norm=torch.tensor([float(t.gradient_norm) for t in self.taken]).max().item(),
            shares=shares,
            frozen_flops=frozen,
            trained_flops=trained,
            peak_share=(frozen + trained) / speed.peak,
            hint=starvation_hint(
                shares["data wait"],
                self.decode_seconds / seconds / config.data.decode_threads,
                config.data.decode_threads,
            )
            if self._warm
            else "",
        )


def measure_speed(model: nn.Module, config: RunConfig, world: World) -> Speed:
    """What a step of this model asks for, and what this rank's device could do."""
    flops = count_flops(model, config.data.image_size_px, world.device)
    return Speed(flops, measured_peak(world.device, DTYPES[config.engine.precision]))


def starvation_hint(waiting: float, decoding: float, threads: int) -> str:
    """What to change where data is waited for; nothing where it is not.

    Args:
        waiting: share of the time that the step waits for data.
        decoding: share of their time that the decoding threads work.
        threads: how many of them there are.
    """
    if waiting < STARVING:
        return ""
    if decoding > BUSY:
        more = max(1, round(threads * waiting / (1 - waiting)))
        return (
            f"decode-bound: raise data.decode_threads from {threads} to {threads + more} and "
            f"cluster.cpus_per_worker with it, or store smaller images"
        )
    return (
        "storage-bound: keep what is fetched with data.cache, raise data.prefetch_batches, or "
        "bring the shards nearer"
    )


def metrics_line(progress: Progress, rate: float) -> dict[str, float]:
    """A window's numbers, flat, for the metrics."""
    shares = progress.shares or {}
    return {
        "step": progress.step,
        "images": progress.images,
        "loss": progress.loss,
        "gradient_norm": progress.gradient_norm,
        "learning_rate": rate,
        "images_per_second": progress.images_per_second,
        "data_wait_share": progress.data_wait_share,
        "peak_memory_gib": progress.peak_memory_gib,
        "bad_samples": progress.bad_samples,
        "frozen_gflops": progress.frozen_flops / 1e9,
        "trained_gflops": progress.trained_flops / 1e9,
        "peak_share": progress.peak_share,
        **{f"share/{phase}": share for phase, share in shares.items()},
    }
