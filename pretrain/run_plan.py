"""What a run does at a given world size: pure arithmetic over the config."""

import math
from dataclasses import dataclass

from configs.schema import OptimizerConfig, TrainConfig
from data_pipelines.sample_order import legal_world_sizes


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How the global batch is split, and when things happen; a step is one optimizer step."""

    world_size: int
    micro_batch: int
    """Images per rank in one forward pass."""
    accumulation: int
    """Forward passes per step."""
    total_steps: int
    checkpoint_every_steps: int
    keep_every_steps: int | None = None
    """Of complete checkpoints; None where only the newest stay."""

    @property
    def num_checkpoints(self) -> int:
        """That a run from its start publishes, step 0 included."""
        return 1 + -(-self.total_steps // self.checkpoint_every_steps)

    def publishes_at(self, step: int) -> bool:
        """Whether a checkpoint is published once `step` steps are done."""
        return step % self.checkpoint_every_steps == 0 or step == self.total_steps


def plan_run(train: TrainConfig, world_size: int) -> RunPlan:
    """Split the global batch over `world_size` ranks.

    Raises:
        ValueError: it cannot be split evenly; the message lists the world sizes that can.
    """
    if train.global_batch % world_size:
        raise ValueError(
            f"train.global_batch {train.global_batch} cannot be split over {world_size} workers; "
            f"set cluster.num_workers to one of {legal_world_sizes(train.global_batch)}"
        )
    share = train.global_batch // world_size
    micro_batch = max(n for n in range(1, min(share, train.max_micro_batch) + 1) if share % n == 0)
    checkpoint_every_steps = max(1, round(train.checkpoint_every_images / train.global_batch))
    kept_of = (train.keep_every_images or 0) // train.checkpoint_every_images  # one in so many
    return RunPlan(
        world_size=world_size,
        micro_batch=micro_batch,
        accumulation=share // micro_batch,
        total_steps=-(-train.total_images // train.global_batch),
        checkpoint_every_steps=checkpoint_every_steps,
        keep_every_steps=checkpoint_every_steps * kept_of or None,
    )


def learning_rate(optimizer: OptimizerConfig, images: int, total_images: int) -> float:
    """Linear warm-up, constant, cosine to 0 over the last `decay_images`; by images seen."""
    rate = optimizer.learning_rate
    if images < optimizer.warmup_images:
        return rate * images / optimizer.warmup_images
    left = total_images - images
    if left < optimizer.decay_images:
        return rate * 0.5 * (1 - math.cos(math.pi * max(left, 0) / optimizer.decay_images))
    return rate
