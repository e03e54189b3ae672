"""THE loop. Read it from top to bottom: that is what a run does.

`run` is the same function under Ray Train, under torchrun and alone. It knows nothing of Ray: the
launcher hands it `report`. All state that matters is in the last complete checkpoint and one
integer, the number of samples consumed; so a killed run is continued by calling `run` again.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.schema import DitiTask, RunConfig
from data_pipelines.bad_samples import TooManyBadSamplesError
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_mix import Order
from data_pipelines.sample_order import mix64
from data_pipelines.sample_stream import Batch, open_stream
from data_pipelines.shard_index import ShardIndex, read_sets
from pretrain import checkpoint
from pretrain.attention import DTYPES, choose_kernel
from pretrain.backbone import Backbone, load_backbone
from pretrain.denoiser import Denoiser
from pretrain.diti import DiTi
from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.error_budget import ErrorBudget
from pretrain.metrics import MetricsLog
from pretrain.position_noise import draw
from pretrain.preflight import load_start, open_store, run_url, sample_order
from pretrain.run_plan import RunPlan, learning_rate, plan_run
from pretrain.saver import Saver
from pretrain.timesteps import TimestepDistribution
from pretrain.unet import set_attention
from pretrain.world import World, from_first_rank, join_world, mean_over_ranks


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a number."""


class Wish(StrEnum):
    """What a run may be asked for between two steps."""

    GO_ON = "go on"
    SAVE = "save"
    """Publish now: this place may be taken away soon."""
    STOP = "stop"
    """Publish now, and end; the run can go on later."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One rank's report, every `log_every_steps` steps and at every checkpoint."""

    rank: int
    pid: int
    step: int
    total_steps: int
    images: int
    loss: float
    images_per_second: float
    """Of the whole run, over the last reporting window."""
    data_wait_share: float
    """Part of the window that this rank spent waiting for decoded images."""
    peak_memory_gib: float
    """Most memory that this rank has held so far: of its GPU, or of its process on a CPU."""
    bad_samples: int
    """Of the whole run so far: samples that had to be replaced."""
    checkpoint_step: int
    """Step of the newest complete checkpoint."""


def run(
    config: RunConfig,
    *,
    local_dir: Path,
    index: ShardIndex | None = None,
    report: Callable[[Progress], None] | None = None,
    asked: Callable[[], Wish] = lambda: Wish.GO_ON,
    allow_change: Sequence[str] = (),
) -> checkpoint.Manifest:
    """Train until `train.total_images`, from the newest complete checkpoint if there is one.

    Args:
        local_dir: folder of this node for wandb's files.
        index: the shard index, where the caller already has it.
        report: called with this rank's progress.
        asked: what whoever runs this wants; called by all ranks together, with each report. The
            answer of rank 0 counts.
        allow_change: settings that may differ from those of the checkpoint, see `resumable`.

    Returns:
        The manifest of the last checkpoint.

    Raises:
        CheckpointError: the run's folder holds checkpoints of another configuration.
        TrainingDivergedError: the loss is NaN or infinite.
        TooManyBadSamplesError: more samples cannot be used than `data.error_budget` allows.
    """
    # --- where: ranks, storage, plan ---------------------------------------------------------
    world = join_world()
    store = open_store(config)
    plan = plan_run(config.train, world.size)
    index = index or read_sets(store, config.data.folders)
    order = sample_order(config, index)
    newest = checkpoint.newest_for_all(store, run_url(config), world)

    # --- what: model, engine, average --------------------------------------------------------
    torch.manual_seed(config.seed)
    model, backbone = build_model(config, store, world.device)
    if newest is None and isinstance(model, DiTi):
        load_start(model, store)
    timesteps = model.timesteps
    engine = Engine(model, config.engine, config.optimizer, plan, world)
    ema = Ema([piece.weights for piece in engine.pieces], config.train.ema_decay)
    saver = Saver(config, store, world, plan, index, backbone, newest)
    step = saver.restore(engine, ema, allow_change)
    budget = ErrorBudget(
        config.data.error_budget, index.num_samples, newest.bad_samples if newest else {}
    )

    # --- loop --------------------------------------------------------------------------------
    batches = _timed(_open_batches(store, index, order, config, plan, world, first_batch=step))
    window = _Window()
    model.train()
    progress: Progress | None = None
    with MetricsLog(config, local_dir, world) as metrics, saver:
        if saver.newest is None:
            # Step 0 is published too: it proves early that storage takes our checkpoints, and it
            # is the untrained encoder that every evaluation compares with.
            saver.publish(0, engine, ema, metrics, budget)
            saver.finish(metrics)
        wish = Wish.GO_ON
        while step < plan.total_steps and wish is not Wish.STOP:
            torch.manual_seed(int(mix64(config.seed, step, world.rank) >> np.uint64(1)))  # dropout
            micro_batches = []
            for _ in range(plan.accumulation):
                batch, waited = _next_or_letters(batches, step, budget, saver)
                saver.note(batch)
                budget.note(batch.dead_letters)
                window.waited += waited
                micro_batches.append(_to_tensors(batch, config, timesteps, world.device))

            images_before = step * config.train.global_batch
            rate = learning_rate(config.optimizer, images_before, config.train.total_images)
            window.losses.append(engine.step(rate, micro_batches))
            ema.update()
            step += 1

            if step % config.train.log_every_steps == 0 or plan.publishes_at(step):
                progress = window.close(step, config, plan, world, budget.settle())
                metrics.record(_metrics_line(progress, rate))
                _check(progress, budget, saver)
                saver.settle(metrics, wait=False)
                wish = Wish(from_first_rank(asked()))
                if plan.publishes_at(step) or wish is not Wish.GO_ON:
                    saver.publish(step, engine, ema, metrics, budget)
                if report and step < plan.total_steps and wish is not Wish.STOP:
                    report(replace(progress, checkpoint_step=saver.newest_step))
                window = _Window()
        manifest = saver.finish(metrics)
        if report and progress:
            report(replace(progress, checkpoint_step=manifest.step))
    return manifest


def build_model(
    config: RunConfig, store: ObjectStore, device: torch.device
) -> tuple[DiTi | Denoiser, Backbone | None]:
    """The module that a run trains, on its device, and its backbone if it has one."""
    kernel = choose_kernel(
        config.engine.attention, device=device, dtype=DTYPES[config.engine.precision]
    )
    if isinstance(config.task, DitiTask):
        backbone = load_backbone(store, config.task.backbone)
        model = DiTi(config.task, backbone, image_size_px=config.data.image_size_px)
    else:
        model, backbone = Denoiser(config.task), None
    model.tables_to(device)
    set_attention(model, kernel)
    return model.to(device), backbone


def _check(progress: Progress, budget: ErrorBudget, saver: Saver) -> None:
    """Stop, on every rank alike, where going on makes no sense."""
    if not math.isfinite(progress.loss):
        raise TrainingDivergedError(
            f"loss is {progress.loss} by step {progress.step}; the newest complete checkpoint is "
            f"step {saver.newest_step}. Lower optimizer.learning_rate or set optimizer.clip_norm, "
            f"and say that it is meant (--allow-change optimizer); --from-step goes back further."
        )
    try:
        budget.check(progress.images)
    except TooManyBadSamplesError:
        saver.write_dead_letters(progress.step, budget.take_unwritten())
        raise


def _open_batches(
    store: ObjectStore,
    index: ShardIndex,
    order: Order,
    config: RunConfig,
    plan: RunPlan,
    world: World,
    *,
    first_batch: int,
) -> Iterator[Batch]:
    return open_stream(
        store,
        index,
        order,
        config.data,
        global_batch=config.train.global_batch,
        micro_batch=plan.micro_batch,
        rank=world.rank,
        world_size=world.size,
        first_batch=first_batch,
    )


def _next_or_letters(
    batches: Iterator[tuple[Batch, float]], step: int, budget: ErrorBudget, saver: Saver
) -> tuple[Batch, float]:
    """The next batch; where there is no sample left for it, the dead letters are written."""
    try:
        return next(batches)
    except TooManyBadSamplesError as error:
        saver.write_dead_letters(step, [*budget.take_unwritten(), *error.letters])
        raise


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds it was waited for."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - start


def _to_tensors(
    batch: Batch, config: RunConfig, timesteps: TimestepDistribution, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Images in [-1, 1], time-steps and noise of a micro-batch, on the device."""
    pixels_BHWC = torch.from_numpy(batch.images).to(device)
    images = pixels_BHWC.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    drawn = draw(
        batch.positions,
        seed=config.seed,
        timesteps=timesteps,
        global_batch=config.train.global_batch,
        image_shape=(3, config.data.image_size_px, config.data.image_size_px),
    )
    if config.data.horizontal_flip:
        mirrored = drawn.flip_B.to(device)[:, None, None, None]
        images = torch.where(mirrored, images.flip(3), images)
    return images, drawn.t_B.to(device), drawn.noise_BCHW.to(device)


class _Window:
    """What happened since the last report."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.losses: list[Tensor] = []

    def close(
        self, step: int, config: RunConfig, plan: RunPlan, world: World, bad_samples: int
    ) -> Progress:
        """Collective: the loss is the mean over ranks."""
        loss = mean_over_ranks(torch.stack(self.losses).mean())
        seconds = time.perf_counter() - self.start
        return Progress(
            rank=world.rank,
            pid=os.getpid(),
            step=step,
            total_steps=plan.total_steps,
            images=step * config.train.global_batch,
            loss=loss,
            images_per_second=len(self.losses) * config.train.global_batch / seconds,
            data_wait_share=self.waited / seconds,
            peak_memory_gib=world.peak_memory_gib(),
            bad_samples=bad_samples,
            checkpoint_step=0,
        )


def _metrics_line(progress: Progress, rate: float) -> dict[str, float]:
    return {
        "step": progress.step,
        "images": progress.images,
        "loss": progress.loss,
        "learning_rate": rate,
        "images_per_second": progress.images_per_second,
        "data_wait_share": progress.data_wait_share,
        "peak_memory_gib": progress.peak_memory_gib,
        "bad_samples": progress.bad_samples,
    }
