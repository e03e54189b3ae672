"""`diti eval counterfactual`: what changes in an image when parts of its feature change.

Swaps are scored on shard sets of pairs, whose second image is the rendered counterfactual of the
first (`tools.counterfactual`). Which part of the feature to swap is chosen on every other pair, and
scored on the rest. PDAE's feature has one subset: its only part is the whole.

The noise that is kept is x_t at the end of the trained time-steps. Above it the backbone alone
steers, and takes the same way back: METHOD's x_T would cost steps and change nothing.

Letters: B batch, D = latent_dim, A attributes, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor

from data_pipelines.object_store import ObjectStore
from pretrain.diti import DiTi
from pretrain.partition import Partition, Subset
from pretrain.sampling import (
    Walk,
    ddim_walk,
    decode_walk,
    diti_estimate,
    encode_walk,
    mix_subsets,
)
from tools.attribute_directions import Direction, directions_of
from tools.attribute_probe import refuse_constant
from tools.counterfactual import (
    PairSums,
    Signs,
    SwapScore,
    nearest_swap,
    pair_sums,
    score_swap,
)
from tools.counterfactual_pairs import Labelled, Pairs, read_labelled, read_pairs
from tools.denoising import encode
from tools.ridge import fit_ridge, signed

CHUNK = 64
WHOLE = "all subsets"
CHOOSING, SCORING = slice(0, None, 2), slice(1, None, 2)


@dataclass(frozen=True, slots=True)
class Part:
    """Subsets that are swapped or moved together."""

    name: str
    subsets: tuple[Subset, ...]

    @property
    def dims(self) -> int:
        return sum(end - start for start, end in (subset.dims for subset in self.subsets))


@dataclass(frozen=True, slots=True)
class AttributeScores:
    """Swaps between the images of pairs that differ in one attribute."""

    attribute: str
    pairs: int
    distance: float
    """Mean squared difference of a and b, pixels in [0, 1]."""
    own_error: float
    """The same of a and the decode of its own feature."""
    best: str
    """The part that reaches most on every other pair."""
    nothing: SwapScore
    """Nothing swapped. This and every other score is of the pairs that the best part was not chosen
    on."""
    parts: dict[str, SwapScore]
    """By name of the part."""
    dims: dict[str, int]


@dataclass(frozen=True, slots=True)
class Swaps:
    """Scores, and the decodes behind them."""

    scores: AttributeScores
    pairs: Pairs
    own: Tensor
    """The decode of a's own feature, BCHW in [-1, 1]."""
    swapped: dict[str, Tensor]
    """By name of the part."""


class PixelClassifiers:
    """A linear classifier of each attribute, learnt on the pixels of labelled images.

    Raises:
        ValueError: an attribute has one value only.
    """

    def __init__(self, labelled: Labelled) -> None:
        refuse_constant(labelled.labels, labelled.names, "the labelled set")
        self.names = labelled.names
        x = labelled.images.flatten(1).numpy()
        self._mean, self._std = x.mean(axis=0), x.std(axis=0) + 1e-6
        self._ridge: RidgeCV = fit_ridge((x - self._mean) / self._std, signed(labelled.labels))

    def signs(self, images_BCHW: Tensor) -> Tensor:
        """Which attributes it sees; bool (B, A)."""
        x = (images_BCHW.flatten(1).numpy() - self._mean) / self._std
        return torch.from_numpy(self._ridge.predict(x).reshape(len(x), -1) > 0)


@dataclass(frozen=True, slots=True)
class Counterfactuals:
    """What `evaluate_counterfactual` finds, in the order of the sets of pairs."""

    swaps: list[Swaps]
    directions: list[Direction]
    """Of the same attributes; none without labelled images."""


def evaluate_counterfactual(
    store: ObjectStore,
    model: DiTi,
    *,
    pairs_urls: Sequence[str],
    labelled_url: str | None = None,
    count: int = 32,
    steps: int = 25,
    on_progress: Callable[[float, str], None] = lambda share, what: None,
) -> Counterfactuals:
    """Swap the parts of features between the images of pairs, and see what becomes of them.

    Args:
        pairs_urls: shard sets of pairs, each for one attribute.
        labelled_url: a shard set that classifiers learn on; they judge the swaps, and give the
            directions in which to move.
        count: pairs of each set.
        steps: of DDIM, in either direction.
        on_progress: told the share that is done, and what is being done.

    Raises:
        ValueError: a set is not what it should be, or is too small; the labelled set says nothing
            of an attribute; or there are more steps than time-steps.
    """
    sets = [read_pairs(store, url, count, model.image_size_px) for url in pairs_urls]
    attributes = [each.attribute for each in sets]
    if twice := [name for name in attributes if attributes.count(name) > 1]:
        raise ValueError(f"two sets of pairs differ in {twice[0]}; give one for each attribute")
    directions, classifiers = [], None
    if labelled_url is not None:
        on_progress(0.0, "learning classifiers")
        labelled = read_labelled(store, labelled_url, pairs_urls, model.image_size_px)
        directions = directions_of(model, labelled, attributes)
        classifiers = PixelClassifiers(labelled)
    swaps: list[Swaps] = []
    for each in sets:

        def show(share: float, attribute: str = each.attribute) -> None:
            on_progress((len(swaps) + share) / len(sets), attribute)

        swaps.append(
            evaluate_swaps(model, each, steps=steps, classifiers=classifiers, on_progress=show)
        )
    return Counterfactuals(swaps, directions)


def parts_of(partition: Partition) -> tuple[Part, ...]:
    """Each subset, each named range, and the whole feature last; each set of dimensions once.

    A range of one subset has both names.
    """
    ranges = partition.named_ranges(0, partition.num_timesteps)
    names: dict[tuple[Subset, ...], str] = {(each,): each.name for each in partition.subsets}
    for name, subsets in ranges.items():
        names[subsets] = f"{names[subsets]}, {name}" if subsets in names else name
    names.pop(partition.subsets, None)
    parts = []
    for subsets, name in names.items():
        start, end = subsets[0].timesteps[0], subsets[-1].timesteps[1]
        parts.append(Part(f"{name}: time-steps {start}-{end}", subsets))
    parts = [part for part in parts if part.dims]  # some published recipes have subsets of none
    return *parts, Part(WHOLE, partition.subsets)


@torch.inference_mode()
def evaluate_swaps(
    model: DiTi,
    pairs: Pairs,
    *,
    steps: int,
    classifiers: PixelClassifiers | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Swaps:
    """Put each part of b's feature into a's, decode, and compare with b.

    Args:
        steps: of DDIM, in either direction.
        on_progress: told the share that is done.

    Raises:
        ValueError: more steps than time-steps.
    """
    parts = parts_of(model.partition)
    z_a, z_b = encode(model, pairs.a), encode(model, pairs.b)
    x_t = infer_noise(model, pairs.a, z_a, steps=steps)
    own = decode(model, x_t, z_a, steps=steps)
    swapped: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        on_progress((number + 2) / (len(parts) + 2))
        mixed = mix_subsets(z_a, z_b, part.subsets, 1.0)
        swapped[part.name] = decode(model, x_t, mixed, steps=steps)
    on_progress(1.0)
    return Swaps(_scores(pairs, parts, own, swapped, classifiers), pairs, own, swapped)


def infer_noise(
    model: DiTi, images_BCHW: Tensor, z_BD: Tensor, *, steps: int, end: int | None = None
) -> Tensor:
    """The x_t that decodes to these images, at the end of the trained time-steps or at `end`."""
    return _walked(model, images_BCHW, z_BD, encode_walk(model.schedule, _last(model, end), steps))


def decode(
    model: DiTi, xt_BCHW: Tensor, z_BD: Tensor, *, steps: int, start: int | None = None
) -> Tensor:
    """Images in [-1, 1] from what `infer_noise` gives at the same time-step."""
    return _walked(model, xt_BCHW, z_BD, decode_walk(model.schedule, _last(model, start), steps))


def _last(model: DiTi, t: int | None) -> int:
    return model.timesteps.trained_range[1] - 1 if t is None else t


def _walked(model: DiTi, x_BCHW: Tensor, z_BD: Tensor, walk: Walk) -> Tensor:
    return torch.cat(
        [
            ddim_walk(model.schedule, diti_estimate(model, z), x, walk)
            for x, z in zip(x_BCHW.split(CHUNK), z_BD.split(CHUNK), strict=True)
        ]
    )


def swap_numbers(scores: Sequence[AttributeScores]) -> dict[str, float]:
    """Means over attributes, of the part that was chosen for each and of the whole feature, on the
    pairs that it was not chosen on: a row of a table of methods."""
    found = {"own_error": mean(each.own_error for each in scores)}
    for name in ("best", "whole"):
        of_attributes = [each.parts[each.best if name == "best" else WHOLE] for each in scores]
        for what in ("reached", "inside", "leak", "error", "flipped", "others"):
            values = [
                value for score in of_attributes if (value := getattr(score, what)) is not None
            ]
            if values:
                found[f"{name}_{what}"] = mean(values)
    return found


def _scores(
    pairs: Pairs,
    parts: Sequence[Part],
    own: Tensor,
    swapped: dict[str, Tensor],
    classifiers: PixelClassifiers | None,
) -> AttributeScores:
    a, b, own_01 = (_from_0_to_1(images) for images in (pairs.a, pairs.b, own))
    sums = {name: pair_sums(a, b, own_01, _from_0_to_1(x)) for name, x in swapped.items()}
    target = classifiers.names.index(pairs.attribute) if classifiers else 0

    def score(of: PairSums, images: Tensor) -> SwapScore:
        signs = None
        if classifiers:
            signs = Signs(*map(classifiers.signs, (pairs.a, pairs.b, images)))
        return score_swap(of, SCORING, signs, target)

    return AttributeScores(
        attribute=pairs.attribute,
        pairs=len(a),
        distance=(a - b).square().mean().item(),
        own_error=(own_01 - a).square().mean().item(),
        best=nearest_swap(sums, CHOOSING),
        nothing=score(pair_sums(a, b, own_01, own_01), own),
        parts={name: score(sums[name], swapped[name]) for name in sums},
        dims={part.name: part.dims for part in parts},
    )


def _from_0_to_1(images_BCHW: Tensor) -> Tensor:
    return (images_BCHW + 1) / 2
