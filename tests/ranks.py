"""A run on several ranks without Ray: a process each, as torchrun starts them."""

import multiprocessing
from pathlib import Path

from configs.schema import RunConfig
from pretrain.progress import Progress
from pretrain.train import Wish, run
from tools.benchmarks.ranks import become_rank, free_port


def run_on_ranks(config: RunConfig, local_dir: Path, *, stop_at: int | None = None) -> None:
    """`run` on `cluster.num_workers` ranks, asked to stop once `stop_at` steps are done."""
    spawn, port = multiprocessing.get_context("spawn"), free_port()
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

    become_rank(rank, config.cluster.num_workers, port)
    run(config, local_dir=local_dir, report=note, asked=asked)
