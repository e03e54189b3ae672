"""Scores of swaps as text: the same cells on standard output and on the page."""

from collections.abc import Iterator, Sequence

import typer
from rich.console import Console
from rich.table import Column, Table

from tools.attribute_directions import Direction
from tools.counterfactual import SwapScore
from tools.evaluate_counterfactual import WHOLE, AttributeScores

EXPLAINED = {
    "reached": "how much nearer than the unchanged face the swap comes to the other drawing; 100% "
    "is that drawing, below 0% it is farther away",
    "inside": "the same, only where the two drawings differ",
    "leak": "change where they do not, as a share of the change that was wanted",
    "error": "mean squared difference from the other drawing, pixels in [0, 1]",
    "flipped": "how often a classifier of pixels sees the option as in the other drawing, where it "
    "tells the two drawings apart",
    "others": "other attributes, per face, that it sees otherwise than in the other drawing",
}
COLUMNS = tuple(EXPLAINED)
_IN_A_TERMINAL = ("reached", "leak", "error", "flipped", "others")


def cells(score: SwapScore) -> list[str]:
    """In the order of COLUMNS."""
    return [
        f"{score.reached:.1%} ±{score.uncertainty:.1%}",
        f"{score.inside:.1%}",
        f"{score.leak:.1%}",
        f"{score.error:.5f}",
        "-" if score.flipped is None else f"{score.flipped:.0%}",
        "-" if score.others is None else f"{score.others:.2f}",
    ]


def chosen_rows(scores: AttributeScores) -> Iterator[tuple[str, int, list[str]]]:
    """The best part and the whole feature."""
    for name in dict.fromkeys((scores.best, WHOLE)):
        yield name, scores.dims[name], cells(scores.parts[name])


def print_swaps(results: Sequence[AttributeScores]) -> None:
    table = Table(
        Column("swapped, of time-steps", no_wrap=True),
        *(Column(name, no_wrap=True, justify="right") for name in _IN_A_TERMINAL),
        title="swaps between two drawings of a face, on pairs that no part was chosen on",
    )

    def add(name: str, row: Sequence[str], *, last: bool = False) -> None:
        shown = (row[COLUMNS.index(column)] for column in _IN_A_TERMINAL)
        table.add_row(f"  {name.replace(': time-steps', '')}", *shown, end_section=last)

    for scores in results:
        table.add_row(scores.attribute)
        for part, _, row in chosen_rows(scores):
            add(part, row)
        add("nothing", cells(scores.nothing), last=True)
    Console().print(table)
    for name, text in EXPLAINED.items():
        if name in _IN_A_TERMINAL:
            typer.echo(f"{name}: {text}")


def print_directions(directions: Sequence[Direction]) -> None:
    """How well few dimensions tell each attribute, and where they lie."""
    table = Table(
        "attribute",
        *directions[0].precision,
        "kept by ProbMask, by subset",
        title="average precision on unseen images, by the dimensions that a probe is given",
    )
    for direction in directions:
        precision = (f"{value:.3f}" for value in direction.precision.values())
        kept = ", ".join(f"{name} {count}" for name, count in direction.kept.items() if count)
        table.add_row(direction.attribute, *precision, kept)
    Console().print(table)
