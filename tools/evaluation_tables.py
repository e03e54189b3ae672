"""What features and models are worth, as tables on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from tools.tables import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.attribute_loss import AttributeLoss
    from tools.attribute_probe import ProbeResult, WeightShares
    from tools.class_probe import ClassResult
    from tools.denoising import FourLosses, TimestepLosses
    from tools.disentanglement import Disentanglement
    from tools.evaluate_reconstruction import Reconstruction
    from tools.few_shot import FewShotResult
    from tools.number_probe import NumberResult


def print_probes(results: Sequence[ProbeResult]) -> None:
    from data_pipelines.avatars import attribute_granularity

    granularity = attribute_granularity()
    groups = {
        group: [name for name in results[0].attributes if granularity.get(name) == group]
        for group in ("coarse", "middle", "fine")
    }
    groups = {group: names for group, names in groups.items() if names}
    table = Table("feature", "dims", "mean AP", *groups, title="average precision on unseen images")
    for result in results:
        means = [f"{result.mean_over(names):.3f}" for names in groups.values()]
        table.add_row(result.name, str(result.dims), f"{result.mean:.3f}", *means)
    Console().print(table)


def print_weights(found: WeightShares) -> None:
    """A row per attribute, coarse ones first where that is known, a column per subset."""
    from data_pipelines.avatars import attribute_granularity

    granularity = attribute_granularity()
    order = {"coarse": 0, "middle": 1, "fine": 2}
    names = sorted(found.shares, key=lambda name: (order.get(granularity.get(name, ""), 3), name))
    title = "share of each probe's squared weights by subset"
    subsets = [name.replace(": time-steps ", "\n") for name in found.subsets]
    table = Table(Column("attribute", no_wrap=True), "", *subsets, title=title)
    total = sum(found.dims)
    table.add_row("of the dimensions", "", *(f"{dims / total:.2f}" for dims in found.dims))
    for name in names:
        cells = [f"{share:.2f}" for share in found.shares[name]]
        table.add_row(name, granularity.get(name, ""), *cells)
    Console().print(table)


def print_attribute_loss(found: AttributeLoss) -> None:
    """A row per attribute, first lost first: where half is gone, and precision by time-step, of
    which every other one is shown."""
    lost = {name: found.half_lost(name) for name in found.attributes}
    names = sorted(lost, key=lambda name: (lost[name] is None, lost[name] or 0.0))
    title = "average precision of what x_t still tells, on unseen images, by t"
    steps = ["x_0" if t < 0 else str(t) for t in found.timesteps[::2]]
    table = Table(Column("attribute", no_wrap=True), "half\nlost at", *steps, title=title)
    for name in names:
        half, number = lost[name], found.attributes.index(name)
        cells = [f"{value:.2f}" for value in found.precision[::2, number]]
        table.add_row(name, "never" if half is None else f"{half:.0f}", *cells)
    Console().print(table)


def print_few_shot(results: Sequence[FewShotResult]) -> None:
    """A row per feature, a column per number of shots: mean over the draws, and their spread."""
    by_name: dict[str, list[FewShotResult]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    first = next(iter(by_name.values()))
    title = f"accuracy on unseen images, mean of {counted(len(first[0].attributes), 'attribute')}"
    shots = [f"{result.shots} shots" for result in first]
    feature = Column("feature", no_wrap=True)
    table = Table(feature, "dims", *shots, title=f"{title} (spread over the draws)")
    for name, some in by_name.items():
        cells = [f"{result.mean:.3f} ({result.spread:.3f})" for result in some]
        table.add_row(name, str(some[0].dims), *cells)
    Console().print(table)


def print_losses(losses: FourLosses) -> None:
    table = Table("feature given to the decoder", "loss", title="loss on unseen images")
    table.add_row("none: backbone alone", f"{losses.backbone:.5f}")
    table.add_row("the image's own (DiTi)", f"{losses.diti:.5f}")
    table.add_row("another image's", f"{losses.shuffled:.5f}")
    table.add_row("the average", f"{losses.mean:.5f}")
    Console().print(table)


def print_reconstructions(results: Sequence[Reconstruction]) -> None:
    table = Table(
        "sampler",
        "x_T inferred",
        "x_T random",
        "against the first",
        title="squared error of pixels in [0, 1]",
    )
    for result in results:
        table.add_row(
            result.sampler,
            f"{result.inferred:.6f}",
            f"{result.random:.5f}",
            f"{result.random_above_first:+.5f} ± {result.uncertainty:.5f}",
        )
    Console().print(table)


def print_classes(results: Sequence[ClassResult], label: str) -> None:
    table = Table(
        Column("feature", no_wrap=True), "dims", "accuracy", "mean over classes",
        title=f"recognition of {label} on unseen images",
    )  # fmt: skip
    for result in results:
        cells = f"{result.accuracy:.3f}", f"{result.balanced:.3f}"
        table.add_row(result.name, str(result.dims), *cells)
    Console().print(table)


def print_numbers(results: Sequence[NumberResult]) -> None:
    """Means of every feature; then each number by the first, the whole one."""
    table = Table(
        Column("feature", no_wrap=True), "dims", "Pearson r", "unexplained",
        title="numbers told on unseen images, mean",
    )  # fmt: skip
    for result in results:
        means = f"{result.mean_pearson:.3f}", f"{result.mean_unexplained:.3f}"
        table.add_row(result.name, str(result.dims), *means)
    Console().print(table)
    whole = results[0]
    table = Table("number", "Pearson r", "mean squared error", "unexplained", title=whole.name)
    for name, pearson, error, unexplained in zip(
        whole.numbers, whole.pearson, whole.squared_error, whole.unexplained, strict=True
    ):
        table.add_row(name, f"{pearson:.3f}", f"{error:.4g}", f"{unexplained:.3f}")
    Console().print(table)


def print_disentanglement(found: Disentanglement) -> None:
    scores = Table("", "disentanglement", "completeness", title="DCI, 1 is best")
    for name, each in (("by dimension", found.by_dimension), ("by subset", found.by_subset)):
        scores.add_row(name, f"{each.disentanglement:.3f}", f"{each.completeness:.3f}")
    Console().print(scores)
    leak = found.leakage
    table = Table(
        Column("attribute", no_wrap=True), Column("best subset", no_wrap=True), "its share",
        "the others' mean",
        title="of what the whole feature tells, what single subsets tell",
    )  # fmt: skip
    rows = zip(leak.attributes, leak.shares.argmax(axis=1), leak.best, leak.others, strict=True)
    for name, number, best, others in sorted(rows, key=lambda row: (row[1], row[0])):
        table.add_row(name, leak.subsets[number], f"{best:.2f}", f"{others:.2f}")
    table.add_section()
    table.add_row("mean", "", f"{leak.best.mean():.2f}", f"{leak.others.mean():.2f}")
    Console().print(table)
    if leak.untold:
        Console().print(f"next to nothing is told of {', '.join(leak.untold)}")


def print_timestep_losses(losses: TimestepLosses) -> None:
    table = Table(
        *("time-steps", "backbone alone", "DiTi", "gap", "another's feature", "the mean image"),
        title="loss on unseen images",
    )
    columns = (losses.backbone, losses.diti, losses.shuffled, losses.mean_image)
    for start, backbone, diti, shuffled, mean in zip(losses.bin_starts, *columns, strict=True):
        table.add_row(
            f"{start}-{start + losses.bin_width}",
            f"{backbone:.5f}",
            f"{diti:.5f}",
            f"{diti / backbone - 1:+.1%}",
            f"{shuffled / backbone - 1:+.1%}",
            f"{mean:.5f}",
        )
    Console().print(table)
    if (first := losses.worse_than_the_mean_image_from) is not None:
        Console().print(
            f"from time-step {first} on the backbone is worse than taking every image for the mean "
            f"one: its own error hides what a feature could add; train on time-steps below, or "
            f"against a backbone that predicts v"
        )
