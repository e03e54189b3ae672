"""A run on several ranks without Ray: a process each, as torchrun starts them."""

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch

from configs.schema import RunConfig
from pretrain.progress import Progress
from pretrain.train import Wish, run


def run_on_ranks(config: RunConfig, local_dir: Path, *, stop_at: int | None = None) -> None:
    """`run` on `cluster.num_workers` ranks, asked to stop once `stop_at` steps are done."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=_one_rank, args=(rank, port, config, local_dir, stop_at))
        for rank in range(config.cluster.num_workers)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks)


def _one_rank(
    rank: int, port: int, config: RunConfig, local_dir: Path, stop_at: int | None
) -> None:
    done = 0

    def note(progress: Progress) -> None:
        nonlocal done
        done = progress.step + config.train.log_every_steps

    def asked() -> Wish:
        return Wish.STOP if stop_at is not None and done >= stop_at else Wish.GO_ON

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("RANK", rank),
            ("WORLD_SIZE", config.cluster.num_workers),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
        ):
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        run(config, local_dir=local_dir, report=note, asked=asked)
