"""THE loop. Read it from top to bottom: that is what a run does.

`run` is the same function under Ray Train, under torchrun and alone. It knows nothing of Ray: the
launcher hands it `report`. All state that matters is in the last complete checkpoint and one
integer, the number of samples consumed; so a killed run is continued by calling `run` again.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch

from configs.schema import EngineConfig, RunConfig
from configs.task import DenoiserTask, DitiTask, LabelsTask
from data_pipelines.bad_samples import TooManyBadSamplesError
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_mix import Order
from data_pipelines.sample_order import mix64
from data_pipelines.sample_stream import Batch, open_stream
from data_pipelines.shard_index import ShardIndex, read_sets
from pretrain import checkpoint
from pretrain.attention import DTYPES, choose_kernel
from pretrain.baselines import make_baseline
from pretrain.denoiser import Denoiser
from pretrain.diffae import DiffAe
from pretrain.diti import DiTi
from pretrain.ema import Ema
from pretrain.encoded import open_encoded
from pretrain.engine import Engine, place_frozen
from pretrain.error_budget import ErrorBudget
from pretrain.fence import enter_together
from pretrain.frozen import Frozen, load_frozen
from pretrain.heartbeat import heartbeat
from pretrain.inputs import Model, OfTimesteps, to_tensors
from pretrain.metrics import MetricsLog
from pretrain.preflight import load_start, open_store, run_url, sample_order
from pretrain.progress import Progress, Pulse
from pretrain.restore import restore
from pretrain.run_plan import RunPlan, learning_rate, plan_run
from pretrain.saver import Saver
from pretrain.sentinels import Fault, LossWatch, first_fault
from pretrain.step_clock import Clock, StepClock, untimed
from pretrain.unet import set_attention, set_recomputing
from pretrain.window import Window, measure_speed, metrics_line
from pretrain.world import World, from_first_rank, gather_from_ranks, join_world

_log = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """The loss, the gradient, or a weight, is no longer a number."""


_LOWER_THE_RATE = (
    "Lower optimizer.learning_rate or set optimizer.clip_norm, and say that it is meant "
    "(--allow-change optimizer)."
)


class Wish(StrEnum):
    """What a run may be asked for between two steps."""

    GO_ON = "go on"
    SAVE = "save"
    """Publish now: this place may be taken away soon."""
    STOP = "stop"
    """Publish now, and end; the run can go on later."""


def run(
    config: RunConfig,
    *,
    local_dir: Path,
    index: ShardIndex | None = None,
    report: Callable[[Progress], None] | None = None,
    beat: Callable[[Pulse], object] = lambda pulse: None,
    asked: Callable[[], Wish] = lambda: Wish.GO_ON,
    allow_change: Sequence[str] = (),
    launch: str | None = None,
) -> checkpoint.Manifest:
    """Train until `train.total_images`, from the newest complete checkpoint if there is one.

    Args:
        local_dir: folder of this node for wandb's files.
        index: the shard index, where the caller already has it.
        report: called with this rank's progress.
        beat: called from another thread with what this rank is at.
        asked: what whoever runs this wants; called by all ranks together, with each report. The
            answer of rank 0 counts.
        allow_change: settings that may differ from those of the checkpoint, see `resumable`.
        launch: the driver's, see `fence`; None begins one.

    Returns:
        The manifest of the last checkpoint.

    Raises:
        SupersededError: another attempt of this run has started.
        CheckpointError: the run's folder holds checkpoints of another configuration.
        TrainingDivergedError: the loss, the gradient or a weight is NaN or infinite.
        TooManyBadSamplesError: more samples cannot be used than `data.error_budget` allows.
    """
    # --- where: ranks, storage, plan ---------------------------------------------------------
    world = join_world()
    store = open_store(config)
    plan = plan_run(config.train, world.size)
    index = index or read_sets(store, config.data.folders)
    order = sample_order(config, index)
    fence = enter_together(store, run_url(config), world, launch)  # before the newest is read
    newest = checkpoint.newest_for_all(store, run_url(config), world)

    # --- what: model, engine, average --------------------------------------------------------
    torch.manual_seed(config.seed)
    clock = StepClock(world.device)
    model, backbone = build_model(config, store, world.device, clock)
    speed = measure_speed(model, config, world)
    set_execution(model, config.engine)  # only now: what it does twice is no work of the model's
    if newest is None and isinstance(model, DiTi):
        load_start(model, store)
    engine = Engine(model, config.engine, config.optimizer, plan, world, clock)
    ema = Ema([piece.weights for piece in engine.pieces], config.train.ema_decay)
    saver = Saver(config, store, world, plan, index, backbone, newest, fence)
    if newest is not None:
        restore(
            newest, store, config, index, backbone, engine, ema,
            rank=world.rank, allow_change=allow_change,
        )  # fmt: skip
    clock.step = step = newest.step if newest else 0
    budget = ErrorBudget(
        config.data.error_budget, index.num_samples, newest.bad_samples if newest else {}
    )

    # --- loop --------------------------------------------------------------------------------
    batches = open_batches(
        store, index, order, config, plan, world, first_batch=step, backbone=backbone
    )
    window, watch = Window(), LossWatch()
    model.train()
    progress: Progress | None = None
    alive = heartbeat(clock, world, beat)
    with MetricsLog(config, local_dir, world) as metrics, saver, alive:
        if saver.newest is None:
            # Step 0 is published too: it proves early that storage takes our checkpoints, and it
            # is the untrained encoder that every evaluation compares with.
            saver.publish(0, engine, ema, metrics, budget)
            saver.finish(metrics)
        wish = Wish.GO_ON
        clock.close()
        while step < plan.total_steps and wish is not Wish.STOP:
            seed_dropout(config, step, world)
            micro_batches = []
            for _ in range(plan.accumulation):
                with clock("data wait"):
                    batch = _next_or_letters(batches, step, budget, saver)
                saver.note(batch)
                budget.note(batch.dead_letters)
                window.note(batch)
                with clock("host to device"):
                    micro_batches.append(to_tensors(batch, config, model, world.device))

            images_before = step * config.train.global_batch
            rate = learning_rate(config.optimizer, images_before, config.train.total_images)
            loss = engine.step(rate, micro_batches)
            with clock("average"):
                ema.update()
            clock.step = step = step + 1
            window.took(step, loss, engine.gradient_norm)

            if step % config.train.log_every_steps == 0 or plan.publishes_at(step):
                progress = window.close(clock, config, plan, world, speed, budget.settle())
                metrics.record(metrics_line(progress, rate))
                _check(progress, window, budget, saver)
                _say_jump(watch, progress, world)
                with clock("checkpoint"):
                    saver.settle(metrics, wait=False)
                    wish = Wish(from_first_rank(asked()))
                    if plan.publishes_at(step) or wish is not Wish.GO_ON:
                        _check_weights(engine, step, saver)
                        saver.publish(step, engine, ema, metrics, budget)
                if report and step < plan.total_steps and wish is not Wish.STOP:
                    report(replace(progress, checkpoint_step=saver.newest_step))
                window = Window(warm=True)
        manifest = saver.finish(metrics)
        if report and progress:
            report(replace(progress, checkpoint_step=manifest.step))
    return manifest


def build_model(
    config: RunConfig, store: ObjectStore, device: torch.device, clock: Clock = untimed
) -> tuple[Model, Frozen | None]:
    """The module that a run trains, on its device, and its backbone if it has one; collective.

    Args:
        clock: charged with the backbone's part of the forward pass.
    """
    dtype, backbone = DTYPES[config.engine.precision], None
    kernel = choose_kernel(config.engine.attention, device=device, dtype=dtype)
    match config.task:
        case DitiTask() as task:
            size = config.data.image_size_px
            backbone = load_frozen(store, task.backbone, image_size_px=size)
            model = DiTi(task, backbone, image_size_px=size)
            model.clock = clock
            for part in model.frozen:
                set_attention(part, kernel)
                place_frozen(part, config.engine, device)
        case DenoiserTask() as task:
            model = Denoiser(task)
        case task:
            model = make_baseline(task, image_size_px=config.data.image_size_px)
    if isinstance(model, OfTimesteps):
        model.tables_to(device)
    set_attention(model, kernel)
    return model.to(device, dtype), backbone


def set_execution(model: Model, engine: EngineConfig) -> None:
    """Recompute activations, and compile parts when they are first called, as `engine` says."""
    set_recomputing(model, engine.recompute_activations)
    frozen, trained = [], []
    match model:
        case DiTi():
            frozen, trained = model.frozen, [model.encoder, model.decoder]
        case Denoiser():
            trained = [model.unet]
        case DiffAe():
            trained = [model.encoder, model.unet]
        case _:
            trained = [model.encoder]
    chosen = {"nothing": [], "frozen": frozen, "trained": trained, "both": [*frozen, *trained]}
    for part in chosen[engine.compile]:
        part.compile()


def seed_dropout(config: RunConfig, step: int, world: World) -> None:
    """What a step draws at random beside its noise depends on nothing that was drawn before."""
    torch.manual_seed(int(mix64(config.seed, step, world.rank) >> np.uint64(1)))


def _check(progress: Progress, window: Window, budget: ErrorBudget, saver: Saver) -> None:
    """Stop, on every rank alike, where going on makes no sense."""
    if not math.isfinite(progress.loss) or not math.isfinite(progress.gradient_norm):
        raise TrainingDivergedError(_explain(window, saver))
    try:
        budget.check(progress.images)
    except TooManyBadSamplesError:
        saver.write_dead_letters(progress.step, budget)
        raise


def _check_weights(engine: Engine, step: int, saver: Saver) -> None:
    """Collective: a step may spoil the weights whose own loss and gradient were finite."""
    own = [torch.aminmax(piece.weights) for piece in engine.pieces if piece.weights.numel()]
    finite = all(math.isfinite(low) and math.isfinite(high) for low, high in own)
    if not all(gather_from_ranks(finite)):
        raise TrainingDivergedError(
            f"the weights are no finite numbers after step {step}, so they are not published; the "
            f"newest complete checkpoint is step {saver.newest_step}. {_LOWER_THE_RATE}"
        )


def _explain(window: Window, saver: Saver) -> str:
    """Collective: what came to no finite number first, where its samples are written, what to do.

    A broken gradient is everybody's: it is a sum over ranks.
    """
    own = first_fault(saver.world.rank, window.taken)
    faults = [fault for fault in gather_from_ranks(own) if isinstance(fault, Fault)]
    first = min(faults, key=lambda fault: (fault.taken.step, fault.what != "loss", fault.rank))
    if own and (own.taken.step, own.what) == (first.taken.step, first.what):
        saver.write_fault(own)
    step, value = first.taken.step, first.value
    return (
        f"{first.what} is {value} at step {step}, first on rank {first.rank}; its samples, by "
        f"position and key, are in {saver.faults_url}; the same command with --replay {step}, and "
        f"without --from-step, shows the loss of each. The newest complete checkpoint is step "
        f"{saver.newest_step}; if it is spoiled already, go further back with --from-step. "
        f"{_LOWER_THE_RATE}"
    )


def _say_jump(watch: LossWatch, progress: Progress, world: World) -> None:
    ratio = watch.jump(progress.loss)
    if ratio is not None and world.is_first:
        _log.warning(
            "the loss of %.4g up to step %d is %.1f times the usual one; if it stays, go back "
            "with --from-step or lower optimizer.learning_rate",
            progress.loss,
            progress.step,
            ratio,
        )


def open_batches(
    store: ObjectStore,
    index: ShardIndex,
    order: Order,
    config: RunConfig,
    plan: RunPlan,
    world: World,
    *,
    first_batch: int,
    backbone: Frozen | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches, from global batch number `first_batch` on.

    Raises:
        EncodedMismatchError: `data.encoded` is not what `backbone` would make of the shards.
    """
    index, encoded = open_encoded(store, config, index, backbone)
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
        attributes=config.task.attributes if isinstance(config.task, LabelsTask) else (),
        encoded=encoded,
    )


def _next_or_letters(
    batches: Iterator[Batch], step: int, budget: ErrorBudget, saver: Saver
) -> Batch:
    """The next batch; where there is no sample left for it, the dead letters are written."""
    try:
        return next(batches)
    except TooManyBadSamplesError as error:
        budget.put_back(error.letters)
        saver.write_dead_letters(step, budget)
        raise
