"""Progress of anything longer than a few seconds: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from cluster.leases import QueueState
from pretrain.feature_export import ExportStart
from pretrain.preflight import Preflight
from pretrain.window import Progress as RankProgress
from tools.tables import counted

PLAIN_LINE_SECONDS = 10.0
console = Console(stderr=True)

Update = Callable[[float, str], None]
"""(done so far, text beside the bar)."""


@contextmanager
def progress_bar(label: str, total: float) -> Iterator[Update]:
    """A bar towards `total`, driven by the function that the block receives."""
    if not console.is_terminal:
        yield _plain_lines(label, total)
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(min_width=len(label))),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f}%", table_column=Column(min_width=4)),
        TimeRemainingColumn(compact=True, table_column=Column(min_width=5)),
        # The rest of the line; a narrow terminal does not show its end.
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(label, total=total, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


def _plain_lines(label: str, total: float) -> Update:
    last, shown = time.monotonic() - PLAIN_LINE_SECONDS, 0.0
    first: tuple[float, float] | None = None  # when something had been done, and how much

    def update(done: float, text: str) -> None:
        nonlocal last, shown, first
        now = time.monotonic()
        if done == shown:
            return  # nothing has happened, and before the start something may still be refused
        if now - last < PLAIN_LINE_SECONDS and done < total:
            return
        last, shown = now, done
        first = first or (now, done)  # what came before is starting up, or was done in another run
        since, had = first
        said = [text] if text else []
        if had < done < total:
            said.append(f"{(now - since) * (total - done) / (done - had):.0f} s left")
        line = f"{label}: {done / total:.0%} {', '.join(said)}"
        console.print(line.rstrip(), highlight=False, soft_wrap=True)

    return update


@contextmanager
def working(on: str) -> Iterator[Callable[[str], None]]:
    """Says what is being done, where there is nothing to count; the block may say what comes."""
    if not console.is_terminal:
        console.print(on)
        yield console.print
        return
    with console.status(on) as status:
        yield status.update


@contextmanager
def image_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over images with their rate; the function it yields takes further finished images."""
    start = time.monotonic()
    done = 0
    with progress_bar(label, total) as update:
        update(0, "")

        def advance(images: int) -> None:
            nonlocal done
            done += images
            update(done, f"{done / (time.monotonic() - start):.0f} images/s")

        yield advance


@contextmanager
def shard_bar(label: str) -> Iterator[Callable[[QueueState], None]]:
    """A bar over batch work; the function it yields takes the state of the queue."""
    with progress_bar(label, 1.0) as update:

        def show(state: QueueState) -> None:
            update(_share_done(state), f"{counted(state.done, 'shard')} done")

        yield show


@contextmanager
def pass_bars(labels: Mapping[str, str]) -> Iterator[Callable[[str, QueueState], None]]:
    """A bar for each pass of batch work, one after the other; takes a pass and its queue's state.

    `labels` say by the name of a pass what it does.
    """
    with ExitStack() as open_bar:
        bars: dict[str, Callable[[QueueState], None]] = {}

        def show(name: str, state: QueueState) -> None:
            if name not in bars:
                open_bar.close()
                bars[name] = open_bar.enter_context(shard_bar(labels[name]))
            bars[name](state)

        yield show


def _share_done(state: QueueState) -> float:
    everything = state.done + state.leased + state.waiting + len(state.failures)
    return state.done / max(1, everything)


@contextmanager
def export_bar(
    label: str,
) -> Iterator[tuple[Callable[[ExportStart], None], Callable[[QueueState], None]]]:
    """A bar over an export with its rate; takes what it begins with, and the state of its queue."""
    with progress_bar(label, 1.0) as update:
        images_per_shard, before = 0.0, 0
        begun_at: float | None = None  # with the first lease seen: before it workers start

        def start(found: ExportStart) -> None:
            nonlocal images_per_shard
            images_per_shard = found.images / found.shards
            said = f"encoder of {found.encoder.checkpoint}; {counted(found.images, 'image')} in "
            said += f"{counted(found.shards, 'shard')}"
            if found.done:
                left = found.shards - found.done
                said += f", {found.done} of them exported before, {left or 'none'} left"
            if found.done < found.shards:
                said += "; starting workers"
            console.print(said, highlight=False, soft_wrap=True)

        def show(state: QueueState) -> None:
            nonlocal begun_at, before
            if begun_at is None and state.leased:
                begun_at, before = time.monotonic(), state.done
            said = f"{counted(state.done, 'shard')} done"
            if begun_at is not None and state.done > before:
                rate = (state.done - before) * images_per_shard / (time.monotonic() - begun_at)
                said += f", {rate:.0f} images/s"
            update(_share_done(state), said)

        yield start, show


def say_start(found: Preflight) -> None:
    """Where a run goes on, and which settings are no longer what they were there."""
    if found.is_done:
        console.print("nothing is left to be done", highlight=False)
        return
    console.print(f"starting {counted(found.plan.world_size, 'worker')}", highlight=False)
    if found.resumes_at:
        console.print(f"going on from step {found.resumes_at}", highlight=False)
    for change in found.changed:
        console.print(f"changed since then: {change}", highlight=False, soft_wrap=True)


@contextmanager
def training_bar(
    label: str, total_images: int
) -> Iterator[Callable[[Mapping[int, RankProgress]], None]]:
    """A bar over a run: images/s, loss, the worst rank's waiting for data and for other ranks, the
    share of the machine's peak, the newest checkpoint; restarts in a line."""
    with progress_bar(label, total_images) as update:
        update(0, "starting workers")
        pids: dict[int, int] = {}

        def show(ranks: Mapping[int, RankProgress]) -> None:
            now = {number: rank.pid for number, rank in ranks.items()}
            if any(pids.get(number, pid) != pid for number, pid in now.items()):
                step = min(rank.checkpoint_step for rank in ranks.values())
                console.print(
                    f"workers were restarted after a failure; the newest checkpoint is step {step}",
                    highlight=False,
                    soft_wrap=True,
                )
            pids.update(now)
            slowest = min(ranks.values(), key=lambda rank: rank.step)
            hungry = max(ranks.values(), key=lambda rank: rank.data_wait_share)
            talking = max((rank.shares or {}).get("communication", 0) for rank in ranks.values())
            update(
                slowest.images,
                f"{slowest.images_per_second:.0f} images/s  loss {slowest.loss:.4f}  "
                f"checkpoint at step {slowest.checkpoint_step}  "
                f"data wait {hungry.data_wait_share:.0%}  communication {talking:.0%}  "
                f"{slowest.peak_share:.0%} of peak"
                + (f"  bad samples {slowest.bad_samples}" if slowest.bad_samples else "")
                + (f"  {hungry.hint}" if hungry.hint else ""),
            )

        yield show
