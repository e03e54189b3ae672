"""One step of a run again: what each of its samples cost, and which of them broke it.

The run's folder is only read. From the newest complete checkpoint before the step, the steps up to
it are taken again on one rank. Where the run had several, sums ran in another order, so the last
digits may differ; and with dropout each of them drew its own, so the loss is only a like one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from configs.schema import RunConfig
from data_pipelines.shard_index import read_sets
from pretrain import checkpoint
from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.inputs import OfTimesteps, to_tensors
from pretrain.preflight import open_store, run_url, sample_order
from pretrain.restore import restore
from pretrain.run_plan import learning_rate, plan_run
from pretrain.train import build_model, open_batches, seed_dropout, set_execution
from pretrain.world import join_world


@dataclass(frozen=True, slots=True)
class ReplayedSample:
    position: int
    key: str
    timestep: int | None
    """None where the task has none."""
    loss: float


@dataclass(frozen=True, slots=True)
class Replayed:
    """A step that was taken again."""

    step: int
    from_step: int
    """Of the checkpoint that it was begun from."""
    loss: float
    gradient_norm: float
    """Before it was clipped."""
    samples: tuple[ReplayedSample, ...]
    """In order of position."""


def replay(config: RunConfig, step: int, allow_change: Sequence[str] = ()) -> Replayed:
    """Take step number `step` (from 1) of the run again.

    Args:
        allow_change: settings that may differ from those of the checkpoint, see `resumable`.

    Raises:
        ValueError: the run has no such step, or no complete checkpoint before it.
        CheckpointError: the checkpoint is damaged, or of another configuration.
    """
    world, store, where = join_world(), open_store(config), run_url(config)
    plan = plan_run(config.train, world.size)
    if not 1 <= step <= plan.total_steps:
        raise ValueError(f"the run has steps 1 to {plan.total_steps}; there is no step {step}")
    before = [done for done in checkpoint.complete_steps(store, where) if done < step]
    if not before:
        raise ValueError(f"{where} has no complete checkpoint before step {step}")
    manifest = checkpoint.read_manifest(store, where, before[-1])
    index = read_sets(store, config.data.folders)

    model, backbone = build_model(config, store, world.device)
    set_execution(model, config.engine)
    engine = Engine(model, config.engine, config.optimizer, plan, world)
    ema = Ema([piece.weights for piece in engine.pieces], config.train.ema_decay)
    restore(
        manifest, store, config, index, backbone, engine, ema,
        rank=world.rank, allow_change=allow_change,
    )  # fmt: skip
    model.train()
    order = sample_order(config, index)
    batches = open_batches(
        store, index, order, config, plan, world, first_batch=manifest.step, backbone=backbone
    )

    samples: list[ReplayedSample] = []
    loss = torch.zeros(())
    for done in range(manifest.step, step):
        seed_dropout(config, done, world)
        micro_batches = []
        for _ in range(plan.accumulation):
            batch = next(batches)
            inputs = to_tensors(batch, config, model, world.device)
            micro_batches.append(inputs)
            if done == step - 1:
                with torch.no_grad():
                    losses = model(*inputs).tolist()
                has_timesteps = isinstance(model, OfTimesteps)
                t = inputs[1].tolist() if has_timesteps else [None] * len(losses)
                rows = zip(batch.positions.tolist(), batch.keys, t, losses, strict=True)
                samples += [ReplayedSample(*row) for row in rows]
        if done == step - 1:
            seed_dropout(config, done, world)  # looking has used it up
        images_before = done * config.train.global_batch
        rate = learning_rate(config.optimizer, images_before, config.train.total_images)
        loss = engine.step(rate, micro_batches)
    return Replayed(step, manifest.step, loss.item(), float(engine.gradient_norm), tuple(samples))
