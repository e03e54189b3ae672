"""The report's figures as data URLs: matplotlib in, nothing to load from a network."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from data_pipelines.set_stats import Histogram, Quantity
from tools.attribute_probe import ProbeResult
from tools.denoising import TimestepLosses
from tools.few_shot import FewShotResult
from tools.pictures import Grid, Interpolation, Reconstructions

BACKBONE, DITI, SOFT = "#9a6a00", "#0b6bcb", "#b9c1ca"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "figure.dpi": 130,
}


def histogram_bars(histogram: Histogram, quantity: Quantity) -> str:
    """Samples per bin; the first and the last bin hold what lies beyond them, too."""
    edges = np.linspace(quantity.low, quantity.high, len(histogram.counts) + 1)
    shown = max(len(histogram.counts) // 4, int(np.flatnonzero(histogram.counts)[-1]) + 2)
    right = edges[min(shown, len(edges) - 1)]
    with mpl.rc_context({**STYLE, "axes.grid.axis": "y"}):
        figure = Figure(figsize=(8, 2.2), layout="constrained")
        axes = figure.subplots()
        axes.bar(edges[:-1], histogram.counts, width=np.diff(edges), align="edge", color=DITI)
        axes.axvline(histogram.mean, color=BACKBONE, linewidth=1.2)
        axes.set(xlabel=quantity.unit, ylabel="samples", xlim=(quantity.low, right))
        axes.set_axisbelow(True)
        return _png(figure)


def loss_curve(metrics: Sequence[dict[str, Any]]) -> str:
    """Training loss over images, with a running mean."""
    images = np.array([line["images"] for line in metrics])
    loss = np.array([line["loss"] for line in metrics])
    span = max(1, len(loss) // 20)
    running = np.array([loss[max(0, i - span) : i + 1].mean() for i in range(len(loss))])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(images, loss, color=SOFT, linewidth=0.8)
        axes.plot(images, running, color=DITI)
        axes.set(xlabel="images", ylabel="loss", xlim=(0, images.max()))
        return _png(figure)


def timestep_curve(losses: TimestepLosses, subset_ends: Sequence[int]) -> str:
    """Loss of backbone and DiTi by time-step, on a logarithmic scale."""
    centres = [start + losses.bin_width / 2 for start in losses.bin_starts]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(centres, losses.backbone, color=BACKBONE, marker=".", label="backbone alone")
        axes.plot(centres, losses.diti, color=DITI, marker=".", label="with the feature (DiTi)")
        axes.fill_between(centres, losses.diti, losses.backbone, color=DITI, alpha=0.12)
        right = losses.bin_starts[-1] + losses.bin_width
        for end in subset_ends:
            if end < right:
                axes.axvline(end, color=SOFT, linestyle=":", linewidth=1)
        axes.set(
            xlabel="time-step", ylabel="loss", yscale="log", xlim=(losses.bin_starts[0], right)
        )
        axes.legend(frameon=False)
        return _png(figure)


def precision_bars(results: Sequence[ProbeResult]) -> str:
    """Mean average precision per feature, one bar each."""
    with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(8, 0.34 * len(results) + 0.8), layout="constrained")
        axes = figure.subplots()
        colours = [SOFT if r.name in ("untrained encoder", "raw pixels") else DITI for r in results]
        means = [r.mean for r in results]
        axes.barh([r.name for r in results], means, color=colours)
        for row, mean in enumerate(means):
            axes.text(mean + 0.005, row, f"{mean:.3f}", va="center", fontsize=9)
        axes.set(xlim=(0, 1.05), xlabel="mean average precision")
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        return _png(figure)


def share_map(
    shares: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], most: float
) -> str:
    """A cell per attribute and subset, darker where more is told; `most` and above are darkest."""
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(8, 0.24 * len(rows) + 1.1), layout="constrained")
        axes = figure.subplots()
        axes.imshow(np.array(shares), cmap="Blues", vmin=0, vmax=most, aspect="auto")
        axes.set_yticks(range(len(rows)), rows)
        every = max(1, len(columns) // 12)  # more names would run into each other
        axes.set_xticks(range(0, len(columns), every), columns[::every])
        axes.tick_params(length=0)
        axes.set_xlabel("subset, by its time-steps")
        if len(columns) <= 12:
            for (row, column), share in np.ndenumerate(np.array(shares)):
                colour = "white" if share > 0.6 * most else "#1b1f24"
                axes.text(
                    column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8
                )
        return _png(figure)


def few_shot_curves(
    plain: Sequence[FewShotResult], misled: Sequence[FewShotResult], names: dict[str, str]
) -> str:
    """Accuracy over the number of examples, without and with a misleading attribute.

    Args:
        names: of the results to show, and what each is called.
    """
    colours = (DITI, BACKBONE, SOFT)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        sides = figure.subplots(1, 2, sharey=True)
        shots = sorted({result.shots for result in plain})
        for axes, results in zip(sides, (plain, misled), strict=True):
            for (name, title), colour in zip(names.items(), colours, strict=False):
                some = [result for result in results if result.name == name]
                means = [result.mean for result in some]
                spread = [result.spread for result in some]
                axes.errorbar(
                    shots, means, spread, color=colour, marker=".", capsize=2, label=title
                )
            axes.axhline(0.5, color="#1b1f24", linestyle=":", linewidth=1)
            axes.set(xlabel="examples with, and as many without", xscale="log")
            axes.set_xticks(shots, map(str, shots))
            axes.minorticks_off()
        sides[0].set(ylabel="accuracy", title="nothing misleads")
        sides[1].set(title="another attribute misleads")
        sides[0].legend(frameon=False, fontsize=9)
        return _png(figure)


def reconstruction_grid(result: Reconstructions) -> str:
    """Faces as columns, versions of them as named rows: reads best on a wide page."""
    return _png(_labelled_grid(result.grid.transpose(1, 0, 2, 3, 4), result.columns))


def interpolation_grid(interpolations: Sequence[Interpolation], face_a: Grid, face_b: Grid) -> str:
    """For each pair of faces, a row per range of subsets: A on the left, towards B on the right."""
    rows, labels = [], []
    for pair in range(len(interpolations[0].grid)):
        for item in interpolations:
            rows.append(np.concatenate([face_a[pair], item.grid[pair], face_b[pair]]))
            first, last = item.subsets[0].timesteps[0], item.subsets[-1].timesteps[1]
            labels.append(f"{item.name} (time-steps {first}-{last})")
    steps = interpolations[0].grid.shape[1]
    titles = ["A itself", *[f"{i / (steps - 1):.0%}" for i in range(steps)], "B itself"]
    return _png(_labelled_grid(np.stack(rows), labels, titles, gap_every=len(interpolations)))


def image_grid(grid: Grid, scale: int) -> bytes:
    """A plain grid of images as PNG, each pixel `scale` pixels wide."""
    from PIL import Image

    rows, columns, height, width, _ = grid.shape
    sheet = grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    image = Image.fromarray(sheet).resize(
        (columns * width * scale, rows * height * scale), Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _labelled_grid(
    grid: Grid, labels: Sequence[str], titles: Sequence[str] = (), gap_every: int = 0
) -> Figure:
    num_rows, num_columns = grid.shape[:2]
    gaps = num_rows // gap_every - 1 if gap_every else 0
    figure = Figure(figsize=(8, 0.2 + (num_rows + 0.4 * gaps) * 6.2 / num_columns), dpi=130)
    left, top = 0.24, 0.97 if titles else 1.0
    cell_width = (1 - left) / num_columns
    cell_height = top / (num_rows + 0.4 * gaps)
    for row in range(num_rows):
        shift = 0.4 * (row // gap_every) if gap_every else 0
        bottom = top - (row + 1 + shift) * cell_height
        figure.text(
            left - 0.01, bottom + cell_height / 2, labels[row], ha="right", va="center", fontsize=8
        )
        for column in range(num_columns):
            axes = figure.add_axes(
                (left + column * cell_width, bottom, cell_width * 0.96, cell_height * 0.96)
            )
            axes.imshow(grid[row, column], interpolation="nearest")
            axes.set_axis_off()
            if titles and row % (gap_every or num_rows) == 0:
                axes.set_title(titles[column], fontsize=8, pad=2)
    return figure


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
