"""Results as tables on standard output."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cluster.features import FeaturesDiff
    from data_pipelines.feature_store import FeatureManifest
    from data_pipelines.set_stats import SetStats
    from data_pipelines.verdicts import Audit
    from pretrain.replay import Replayed
    from tools.export_plan import ExportOutlook
    from tools.plan import Outlook

MOST_ROWS = 64


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size_of(index: Any) -> str:
    """A shard set's, for a line of text."""
    return f"{counted(index.num_samples, 'sample')} in {counted(len(index.shards), 'shard')}"


def print_outlook(outlook: Outlook) -> None:
    plan = outlook.plan
    times = f" x {plan.accumulation} times" if plan.accumulation > 1 else ""
    typer.echo(
        f"{counted(plan.world_size, 'worker')}, {plan.micro_batch} images each{times}: "
        f"{counted(plan.total_steps, 'step')}; {counted(outlook.checkpoints, 'checkpoint')} of "
        f"{_mib(outlook.checkpoint_bytes)} MiB\n"
        f"{outlook.trained_parameters:,} parameters are trained, {outlook.frozen_parameters:,} of "
        f"the backbone are not\n"
        f"world sizes that split the batch: {', '.join(map(str, outlook.legal_world_sizes))}"
    )
    stages = [
        f"ZeRO {stage}" + (" (set)" if stage == outlook.zero_stage else "")
        for stage in outlook.memory
    ]
    table = Table(
        "part",
        *stages,
        title="MiB that each worker holds at each stage's own fullest moment of a step",
    )
    parts = {part: None for held in outlook.memory.values() for part in held if held[part]}
    for part in parts:
        table.add_row(part, *(_mib(held[part]) for held in outlook.memory.values()))
    table.add_section()
    on_host = set(outlook.in_host_memory)
    places = {"on the GPU": parts.keys() - on_host, "in the host's": parts.keys() & on_host}
    for place, there in (places if on_host else {"together": parts.keys()}).items():
        sums = (sum(held[part] for part in there) for held in outlook.memory.values())
        table.add_row(place, *map(_mib, sums))
    Console().print(table)
    more = (
        "What CUDA takes for itself has not been measured."
        if on_host
        else "Freed memory is kept for the next step, which took 8 to 30 % more than this."
    )
    typer.echo(f"The interpreter and its libraries come on top: about 300 MiB on a CPU. {more}")
    if outlook.not_counted:
        typer.echo(outlook.not_counted)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f}"


def print_replay(replayed: Replayed) -> None:
    table = Table(
        "position", "key", "time-step", "loss",
        title=f"step {replayed.step}, taken again from step {replayed.from_step}: "
        f"loss {replayed.loss:.6g}, gradient norm {replayed.gradient_norm:.6g}",
    )  # fmt: skip
    worst = sorted(replayed.samples, key=lambda s: -math.inf if math.isnan(s.loss) else -s.loss)
    for sample in worst[:MOST_ROWS]:
        table.add_row(
            str(sample.position),
            sample.key,
            "-" if sample.timestep is None else str(sample.timestep),
            f"{sample.loss:.6g}",
        )
    Console().print(table)
    if len(worst) > MOST_ROWS:
        typer.echo(f"the {MOST_ROWS} of the largest loss, of {counted(len(worst), 'sample')}")


def print_export_outlook(outlook: ExportOutlook) -> None:
    typer.echo(
        f"{outlook.images:,} images in {outlook.shards:,} shards: {outlook.shards_per_worker:,} "
        f"for each of {counted(outlook.workers, 'worker')}, {outlook.hours:,.0f} hours at "
        f"{outlook.images_per_second:.0f} images/s a worker"
    )
    dtypes = tuple(outlook.choices[0].bytes_per_sample)
    typer.echo("bytes of a sample with its key and row, and of all of them:")
    table = Table("time-steps", "dims", *dtypes)
    for choice in outlook.choices:
        table.add_row(
            f"{choice.timesteps[0]}-{choice.timesteps[1]} {choice.name}",
            str(choice.dims),
            *(
                f"{size:,.0f} B {size * outlook.images / 1e12:.2f} TB"
                for size in choice.bytes_per_sample.values()
            ),
        )
    Console().print(table)


def print_features(manifest: FeatureManifest) -> None:
    size, layout = sum(part.size_bytes for part in manifest.parts.values()), manifest.layout
    typer.echo(
        f"{counted(manifest.rows, 'row')}, {layout.num_dims} dimensions {layout.dtype}, "
        f"{counted(len(manifest.parts), 'part')}, {size} bytes ({size / manifest.rows:.0f} per row)"
    )
    if manifest.skipped:
        typer.echo(f"without  {counted(manifest.skipped, 'sample')} that could not be used")
    typer.echo(
        f"source   {manifest.source_url} (index {manifest.index_digest[:12]})\n"
        f"encoder  {manifest.checkpoint} (SHA-256 {manifest.encoder_sha256[:12]}), "
        f"computed in {manifest.precision}, backbone {(manifest.backbone_sha256 or 'none')[:12]}"
    )
    if layout.copied:
        copied = ", ".join(f"{name} ({kind})" for name, kind in layout.copied.items())
        typer.echo(f"copied   {copied}")
    table = Table("column", "time-steps", "dimensions", "mean", "std")
    for column in manifest.columns:
        dims = slice(*(dim - layout.dims[0] for dim in column.dims))
        table.add_row(
            column.name,
            f"{column.timesteps[0]}-{column.timesteps[1]}",
            f"{column.dims[0]}-{column.dims[1]}",
            f"{_average(manifest.mean[dims]):.3f}",
            f"{_average(manifest.std[dims]):.3f}",
        )
    Console().print(table)


def print_features_diff(diff: FeaturesDiff) -> None:
    if diff.manifests:
        typer.echo(f"the manifests differ in: {', '.join(diff.manifests)}")
    for what, rows in (("first", diff.only_first), ("second", diff.only_second)):
        if rows:
            typer.echo(f"only in the {what}: {counted(rows, 'row')}")
    table = Table("column", "rows in both", "equal", "largest difference", "mean cosine")
    for name, column in diff.columns.items():
        table.add_row(
            name,
            str(column.rows),
            str(column.equal),
            f"{column.largest:.3g}",
            f"{column.cosine / max(1, column.rows):.6f}",
        )
    for name, column in diff.copied.items():
        table.add_row(name, str(column.rows), str(column.equal), "", "")
    Console().print(table)


def print_set_stats(stats: SetStats) -> None:
    from tools.set_report import quantity_rows

    table = Table("measured", "samples", "least", "mean", "most", "unit")
    for row in quantity_rows(stats).values():
        table.add_row(*(row[name] for name in ("title", "count", "least", "mean", "most", "unit")))
    Console().print(table)
    for what, count in (*stats.members.most_common(), *stats.problems.most_common()):
        typer.echo(f"{what}: {counted(count, 'sample')} ({count / stats.samples:.1%})")


def print_audit(audit: Audit) -> None:
    """What became of every raw sample; the lines add up to the first one."""
    table = Table("samples", "", "share", show_header=False, box=None)

    def row(what: str, count: int) -> None:
        table.add_row(what, f"{count:,}", f"{count / max(1, audit.samples):.1%}")

    row(f"samples in {counted(audit.tars - len(audit.unreadable), 'tar')}", audit.samples)
    for kind, counts in (
        ("filtered by", audit.filtered),
        ("failed:", audit.failed),
        ("duplicate:", audit.duplicates),
    ):
        for why, count in counts.most_common():
            row(f"  {kind} {why}", count)
    row("  kept", audit.kept)
    Console().print(table)
    for name, problem in audit.unreadable.items():
        typer.echo(f"not read, its samples are not counted: {name}: {problem}")


def print_contents(found: dict[str, Any]) -> None:
    weights = "" if found.get("step") is None else f", step {found['step']}"
    weights += "" if "ema" not in found else ", averaged" if found["ema"] else ", online"
    typer.echo(f"{found['file']}: {found['kind']}{weights}\nSHA-256 {found['sha256']}")
    parts = Table("part", "tensors", "parameters")
    for name, counts in found["parts"].items():
        parts.add_row(name, str(counts["tensors"]), f"{counts['parameters']:,}")
    Console().print(parts)
    shown = ("image_size_px", "prediction", "unet", "schedule", "encoder", "mode")
    for key in (key for key in shown if found.get(key) is not None):
        typer.echo(f"{key}: {_in_a_line(found[key])}")
    if partition := found.get("partition"):
        dims = partition["dim_ends"]
        typer.echo(
            f"partition: {counted(len(dims), 'subset')} of {dims[-1]} dimensions, ending at {dims}"
        )
    typer.echo(f"config: {found['config'] or 'none found'}")
    for what, origin in found["origins"].items():
        typer.echo(f"  {what}: {origin}")


def _in_a_line(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {inner}" for key, inner in value.items())


def _average(values: list[float]) -> float:
    return sum(values) / len(values)
