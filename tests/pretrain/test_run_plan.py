"""The plan of a run: how a batch is split, when things happen, how fast it learns."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import OptimizerConfig, TrainConfig
from pretrain.run_plan import RunPlan, learning_rate, plan_run


def train(**changes: int) -> TrainConfig:
    base = {"total_images": 1000, "global_batch": 24, "checkpoint_every_images": 240}
    return TrainConfig(**(base | changes))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize(
    ("world_size", "max_micro_batch", "micro_batch", "accumulation"),
    [
        (1, 128, 24, 1),
        (1, 24, 24, 1),
        (1, 23, 12, 2),
        (1, 7, 6, 4),
        (1, 5, 4, 6),
        (1, 1, 1, 24),
        (4, 128, 6, 1),
        (4, 5, 3, 2),
        (24, 128, 1, 1),
    ],
)
def test_the_largest_even_micro_batch_that_fits_is_taken(
    world_size: int, max_micro_batch: int, micro_batch: int, accumulation: int
):
    plan = plan_run(train(max_micro_batch=max_micro_batch), world_size)
    assert (plan.world_size, plan.micro_batch, plan.accumulation) == (
        world_size,
        micro_batch,
        accumulation,
    )


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 400))
def test_ranks_micro_batches_and_accumulation_make_up_the_global_batch(share, world_size, largest):
    batch = share * world_size
    plan = plan_run(
        train(global_batch=batch, total_images=batch, max_micro_batch=largest), world_size
    )
    assert plan.world_size * plan.micro_batch * plan.accumulation == batch
    assert plan.micro_batch <= largest
    larger = range(plan.micro_batch + 1, min(share, largest) + 1)
    assert not any(share % n == 0 for n in larger)


@pytest.mark.parametrize("world_size", [5, 7, 48])
def test_a_world_size_that_cannot_split_the_batch_is_refused_with_those_that_can(world_size: int):
    with pytest.raises(
        ValueError,
        match=rf"global_batch 24 cannot be split over {world_size} workers; set "
        r"cluster\.num_workers to one of \[1, 2, 3, 4, 6, 8, 12, 24\]",
    ):
        plan_run(train(), world_size)


# ------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize(
    ("total_images", "steps"), [(24, 1), (25, 2), (48, 2), (49, 3), (1000, 42)]
)
def test_the_run_ends_with_the_first_batch_that_reaches_its_images(total_images: int, steps: int):
    assert plan_run(train(total_images=total_images), 1).total_steps == steps


@pytest.mark.parametrize(
    ("every_images", "every_steps"),
    [(1, 1), (24, 1), (35, 1), (37, 2), (240, 10), (10**9, 41666667)],
)
def test_checkpoints_fall_on_whole_steps(every_images: int, every_steps: int):
    plan = plan_run(train(checkpoint_every_images=every_images), 1)
    assert plan.checkpoint_every_steps == every_steps


def test_checkpoints_are_published_at_the_start_regularly_and_at_the_end():
    plan = plan_run(train(), 2)
    assert [step for step in range(plan.total_steps + 1) if plan.publishes_at(step)] == [
        *(0, 10, 20, 30, 40),
        42,
    ]
    rare = plan_run(train(checkpoint_every_images=10**9), 1)
    assert [step for step in range(43) if rare.publishes_at(step)] == [0, 42]
    exact = RunPlan(1, 1, 1, total_steps=4, checkpoint_every_steps=2)
    assert [step for step in range(5) if exact.publishes_at(step)] == [0, 2, 4]


@pytest.mark.parametrize("batch", [1, 24, 128, 256, 1024, 10**6])
def test_what_is_kept_is_published_whatever_the_batch(batch: int):
    every, keep = 250_000, 1_000_000
    plan = plan_run(
        train(
            global_batch=batch,
            total_images=10**8,
            checkpoint_every_images=every,
            keep_last=3,
            keep_every_images=keep,
        ),
        1,
    )
    assert plan.keep_every_steps == 4 * plan.checkpoint_every_steps
    assert plan_run(train(), 1).keep_every_steps is None


@pytest.mark.parametrize("world_size", [1, 2, 3, 24])
def test_what_happens_when_does_not_depend_on_the_world_size(world_size: int):
    one, other = plan_run(train(), 1), plan_run(train(), world_size)
    assert (one.total_steps, one.checkpoint_every_steps) == (
        other.total_steps,
        other.checkpoint_every_steps,
    )


# -------------------------------------------------------------------------------- the learning rate


def rates(images: list[int], total: int = 1000, **ramps: int) -> list[float]:
    optimizer = OptimizerConfig(learning_rate=2.0, **ramps)  # pyright: ignore[reportArgumentType]
    return [learning_rate(optimizer, seen, total) for seen in images]


def test_without_ramps_the_rate_is_constant():
    assert rates([0, 1, 500, 999, 1000]) == [2.0] * 5


def test_the_warm_up_is_linear_from_zero_by_images():
    assert rates([0, 25, 50, 99, 100, 101, 999], warmup_images=100) == pytest.approx(
        [0.0, 0.5, 1.0, 1.98, 2.0, 2.0, 2.0]
    )


def test_the_decay_is_a_cosine_to_zero_at_the_end():
    found = rates([0, 599, 600, 700, 800, 900, 1000, 1010], decay_images=400)
    assert found[:3] == [2.0, 2.0, 2.0]
    half = 2**0.5 / 2
    assert found[3:] == pytest.approx([1 + half, 1.0, 1 - half, 0.0, 0.0])


def test_warm_up_and_decay_may_meet_in_one_peak():
    found = rates(list(range(0, 1001, 10)), warmup_images=600, decay_images=400)
    assert max(found) == found[60] == 2.0
    assert found[:61] == sorted(found[:61])
    assert found[60:] == sorted(found[60:], reverse=True)
    assert all(abs(a - b) < 0.1 for a, b in pairwise(found)), "no jump"
