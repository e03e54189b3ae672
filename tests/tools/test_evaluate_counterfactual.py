"""Swaps in a tiny model: what stays, what moves, which part is chosen; and the command."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipelines.avatars import AvatarSpec, draw_avatar
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import write_index
from data_pipelines.shard_writer import write_shard
from pretrain.diti import DiTi
from pretrain.partition import Partition, published_partition
from pretrain.sampling import ddim_encode, ddim_sample, diti_estimate
from tests.diti_command import diti
from tests.published_files import write_run
from tests.tiny_model import SIZE_PX, tiny_diti
from tools.counterfactual_pairs import Pairs, read_pairs
from tools.denoising import encode
from tools.evaluate_counterfactual import WHOLE, evaluate_swaps, parts_of, swap_numbers

STORE, STEPS = ObjectStore(), 6


def random_pairs(count: int = 4) -> Pairs:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.rand(2, count, 3, SIZE_PX, SIZE_PX, generator=generator) * 2 - 1
    return Pairs("hat", a, b)


@pytest.fixture(scope="module")
def model() -> DiTi:
    """Whose feature is heard: the decoder's shift is made ten times as strong."""
    model = tiny_diti().eval().requires_grad_(False)
    for parameter in model.decoder.shift_out.parameters():
        parameter.mul_(10)
    return model


def decoded(model: DiTi, images: Tensor, z_own: Tensor, z_given: Tensor) -> Tensor:
    """From the noise inferred with one feature, decoded with another."""
    last = model.timesteps.trained_range[1] - 1
    noise = ddim_encode(model.schedule, diti_estimate(model, z_own), images, end=last, steps=STEPS)
    estimate = diti_estimate(model, z_given)
    return ddim_sample(model.schedule, estimate, noise, start=last, steps=STEPS)


def far(x: Tensor, y: Tensor) -> float:
    return (x - y).abs().mean().item()


def test_a_swap_with_the_same_face_changes_nothing(model: DiTi):
    a = random_pairs().a
    found = evaluate_swaps(model, Pairs("hat", a, a), steps=STEPS)
    for swapped in found.swapped.values():
        assert torch.equal(swapped, found.own)


def test_all_of_bs_feature_is_bs_decode_from_as_noise(model: DiTi):
    pairs = random_pairs()
    found = evaluate_swaps(model, pairs, steps=STEPS)
    z_a, z_b = encode(model, pairs.a), encode(model, pairs.b)
    whole = found.swapped[WHOLE]
    assert far(found.own, decoded(model, pairs.a, z_a, z_a)) < 1e-5
    assert far(whole, decoded(model, pairs.a, z_a, z_b)) < 1e-4
    assert far(whole, found.own) > 1e-3
    assert far(whole, decoded(model, pairs.b, z_b, z_b)) > 0.1


def test_one_subset_alone_is_swapped_and_each_matters(model: DiTi):
    pairs = random_pairs()
    found = evaluate_swaps(model, pairs, steps=STEPS)
    z_a, z_b = encode(model, pairs.a), encode(model, pairs.b)
    mixed = torch.cat([z_a[:, :8], z_b[:, 8:16], z_a[:, 16:]], dim=1)
    (middle,) = (images for name, images in found.swapped.items() if name.startswith("z001"))
    assert far(middle, decoded(model, pairs.a, z_a, mixed)) < 1e-4
    changes = [far(images, found.own) for images in found.swapped.values()]
    assert min(changes) > 1e-3
    assert len({round(change, 6) for change in changes}) == 4


def test_the_part_is_chosen_on_even_pairs_and_scored_on_odd_ones(model: DiTi):
    """Where the truth of even pairs is one part's decode and that of odd ones another's."""
    pairs = random_pairs()
    swapped = evaluate_swaps(model, pairs, steps=STEPS).swapped
    first, _, third, _ = swapped
    truth = swapped[first].clone()
    truth[1::2] = swapped[third][1::2]
    z_b = encode(model, pairs.b)

    class GivenFeature(torch.nn.Module):
        """The real encoder, but that the truth has b's feature."""

        def forward(self, images: Tensor) -> Tensor:
            return z_b if torch.equal(images, truth) else encoder(images)

    encoder, model.encoder = model.encoder, GivenFeature()
    try:
        found = evaluate_swaps(model, Pairs("hat", pairs.a, truth), steps=STEPS).scores
    finally:
        model.encoder = encoder
    assert found.best == first
    assert found.parts[third].reached == pytest.approx(1, abs=1e-4)
    assert found.parts[first].reached < 0.99
    assert found.nothing.reached == 0


def test_parts_are_the_subsets_the_named_ranges_and_the_whole_each_once():
    six = parts_of(Partition((10, 20, 30, 40, 50, 60), (1, 3, 4, 6, 8, 9)))
    assert [part.name.split(":")[0] for part in six] == [
        *(f"z{i:03d}" for i in range(6)), "fine", "middle", "coarse", WHOLE,
    ]  # fmt: skip
    assert [part.dims for part in six] == [1, 2, 1, 2, 2, 1, 3, 3, 3, 9]
    three = parts_of(Partition((10, 20, 30), (1, 3, 4)))
    assert [part.name.split(":")[0] for part in three] == [
        "z000, fine", "z001, middle", "z002, coarse", WHOLE,
    ]  # fmt: skip
    assert [part.name for part in parts_of(published_partition(1, 24))] == [WHOLE], "PDAE"


def write_set(
    url: str,
    specs_and_rows: Sequence[tuple[AvatarSpec, int]],
    *,
    rows_per_shard: int = 200,
    more: Mapping[str, object] | None = None,
) -> str:
    """A shard set of these drawings; `more` goes into the json of each."""
    faces = [draw_avatar(*each) for each in specs_and_rows]
    samples = [(face.jpeg, face.metadata | (more or {})) for face in faces]
    starts = range(0, len(samples), rows_per_shard)
    parts = [samples[start : start + rows_per_shard] for start in starts]
    write_index(STORE, url, [write_shard(STORE, url, *numbered) for numbered in enumerate(parts)])
    return url


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that differ in the background and in the beard, and labelled faces."""
    folder = tmp_path_factory.mktemp("counterfactual")
    for name in ("dark_background", "beard"):
        spec = AvatarSpec(split="test", pairs=name)
        write_set(str(folder / name), [(spec, row) for row in range(16)], rows_per_shard=7)
    write_set(str(folder / "labelled"), [(AvatarSpec(split="val"), row) for row in range(200)])
    return folder


def test_pairs_are_read_in_order_across_shards(shards: Path):
    pairs = read_pairs(STORE, str(shards / "beard"), 8, 32)
    assert (pairs.attribute, len(pairs.a), len(pairs.b)) == ("beard", 8, 8)
    assert (pairs.a - pairs.b).abs().mean() < (pairs.a - pairs.b.roll(1, 0)).abs().mean() / 2


def test_rows_that_are_no_pairs_are_refused(shards: Path, tmp_path: Path):
    def written(name: str, rows: Sequence[tuple[AvatarSpec, int]], **more: object) -> str:
        return write_set(str(tmp_path / name), rows, more=more)

    hat, beard, plain = AvatarSpec(pairs="hat"), AvatarSpec(pairs="beard"), AvatarSpec()
    for url, count, words in (
        (str(shards / "labelled"), 4, "belongs to no pair"),
        (str(shards / "beard"), 9, "has 8 pairs, 9 were asked for"),
        (written("shifted", [(hat, row) for row in range(1, 5)]), 2, "rows 0 and 1 .* are no pair"),
        (written("mixed", [(hat, 0), (hat, 1), (beard, 0), (beard, 1)]), 2, "differ in beard, hat"),
        (written("odd", [(plain, 0), (plain, 1)], pair=["hat"]), 1, "belongs to no pair"),
        (written("number", [(hat, 0), (hat, 1)], pair={"attribute": 3}), 1, "KeyError: 'index'"),
        (written("same", [(hat, 0), (hat, 0), (hat, 2), (hat, 2)]), 2, "look the same"),
    ):
        with pytest.raises(ValueError, match=words):
            read_pairs(STORE, url, count, 32)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """On a published checkpoint of 8 px, four subsets; four steps each way."""
    file = write_run(tmp_path_factory.mktemp("published"))
    return ["eval", "counterfactual", "--checkpoint", str(file), "--steps", "4", "--count", "8"]


def test_the_command_scores_every_set_and_draws_a_page_of_its_own(
    shards: Path, command: list[str], tmp_path: Path
):
    sets = [f"--pairs={shards / name}" for name in ("dark_background", "beard")]
    page = tmp_path / "page.html"
    answer = diti(*command, *sets, f"--labelled={shards / 'labelled'}", f"--out={page}", "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert list(found) == ["dark_background", "beard"]
    for scores in found.values():
        assert len(scores["parts"]) == 6, "four subsets, the middle two together, all"
        assert scores["best"] in scores["parts"]
        assert 0 <= scores["parts"][scores["best"]]["others"] <= 23
        assert sum(scores["probmask"]["kept"].values()) == 3
    html = page.read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert html.count('src="data:image/png;base64,') > 20
    for words in ("dark background", "ProbMask", "all subsets, and the noise", "z000"):
        assert words in html

    table = diti(*command, *sets[:1])
    assert table.exit_code == 0, table.output
    assert "all subsets" in table.stdout
    assert "ProbMask" not in table.stdout


def test_the_command_refuses_what_it_cannot_use(shards: Path, command: list[str]):
    beard, labelled = f"--pairs={shards / 'beard'}", f"--labelled={shards / 'labelled'}"
    for arguments, words in (
        ([beard, beard], "two sets of pairs differ in beard"),
        ([beard, f"--labelled={shards / 'beard'}"], "holds the pairs themselves"),
        ([beard, "--out=/nowhere/page.html"], "--out /nowhere/page.html cannot be written"),
        ([beard, "--steps=2000"], "there are 1 to 1000 steps, got 2000"),
        ([f"--pairs={shards / 'labelled'}", labelled], "belongs to no pair"),
    ):
        refusal = diti(*command, *arguments)
        assert refusal.exit_code == 2, refusal.output
        assert words in refusal.stderr


def test_numbers_for_a_table_are_means_over_attributes(model: DiTi):
    first, second = (evaluate_swaps(model, random_pairs(n), steps=STEPS).scores for n in (4, 6))
    found = swap_numbers([first, second])
    mean = (first.parts[WHOLE].reached + second.parts[WHOLE].reached) / 2
    assert found["whole_reached"] == pytest.approx(mean)
    errors = [each.parts[each.best].error for each in (first, second)]
    assert found["best_error"] == pytest.approx(sum(errors) / 2)
    assert "best_flipped" not in found, "there were no classifiers"
