"""What goes wrong on one rank only is known to all of them, and named."""

import multiprocessing
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.schema import RunConfig
from data_pipelines.object_store import ObjectStore, join
from pretrain import checkpoint, train
from pretrain.engine import Engine
from pretrain.preflight import run_url
from pretrain.train import TrainingDivergedError
from tests.tiny_run import make_run
from tools.benchmarks.ranks import become_rank, free_port

STORE = ObjectStore()
BATCH = 8
TROUBLED_STEP = 4  # the second that is published


def spoil(what: str) -> None:
    """On this rank: the noise of a step's samples, or what the step makes of the weights."""
    to_tensors, step, steps = train.to_tensors, Engine.step, iter(range(1, 100))

    def spoiled_tensors(batch, *rest) -> tuple[Tensor, ...]:
        images, t, noise = to_tensors(batch, *rest)
        troubled = batch.positions[0] >= BATCH * (TROUBLED_STEP - 1)
        return images, t, noise * torch.nan if troubled else noise

    def spoiled_step(engine: Engine, *rest) -> Tensor:
        loss = step(engine, *rest)
        if next(steps) == TROUBLED_STEP:
            engine.pieces[0].weights.fill_(torch.inf)
        return loss

    if what == "noise":
        train.to_tensors = spoiled_tensors
    else:
        Engine.step = spoiled_step


def one_rank(rank: int, port: int, config: RunConfig, folder: Path, what: str, told: Queue) -> None:
    become_rank(rank, 2, port)
    if rank == 1:
        spoil(what)
    try:
        train.run(config, local_dir=folder)
    except TrainingDivergedError as error:
        told.put((rank, str(error)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("noise", f"loss is nan at step {TROUBLED_STEP}, first on rank 1; its samples, by"),
        pytest.param(
            "weights",
            f"the weights are no finite numbers after step {TROUBLED_STEP}, so they are",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_a_fault_of_one_rank_stops_all_with_its_name(
    tmp_path: Path, what: str, message: str
) -> None:
    settings = ("train.total_images=64", f"train.global_batch={BATCH}")
    config = make_run(STORE, str(tmp_path), *settings, "train.checkpoint_every_images=16")
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    told = spawn.Queue()
    ranks = [
        spawn.Process(target=one_rank, args=(rank, port, config, tmp_path, what, told), daemon=True)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = dict(told.get(timeout=300) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    assert found[0] == found[1]
    assert found[0].startswith(message)
    assert checkpoint.complete_steps(STORE, run_url(config)) == [0, 2]
    faults = [info.url for info in STORE.list(join(run_url(config), "faults"))]
    named = [url.endswith(f"step-0000000{TROUBLED_STEP}-rank-00001.json") for url in faults]
    assert named == ([True] if what == "noise" else [])
