"""Few-shot probes of exported features: what is compared, and what the command says."""

import json

import numpy as np
import pytest

from data_pipelines.object_store import ObjectStore
from tests.diti_command import diti
from tests.labelled_export import export_labels
from tests.tiny_run import make_shards
from tools.evaluate_few_shot import evaluate_few_shot
from tools.few_shot import Shortcut

STORE = ObjectStore()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Features of two splits whose first dimension tells glasses, and the others nothing."""
    folder = tmp_path_factory.mktemp("halves")
    urls = []
    for split in ("val", "test"):
        make_shards(STORE, str(folder / split), split=split, shards=1, rows=200)
        urls.append(export_labels(str(folder / split), str(folder / f"features-{split}")))
    return urls[0], urls[1]


def test_subsets_compete_on_the_same_attributes(halves: tuple[str, str]) -> None:
    train, test = halves
    results = evaluate_few_shot(
        STORE, train_url=train, test_url=test, shots=(5, 20), draws=2, timesteps=(50, 200)
    )
    names = [
        *("all subsets", "z000: time-steps 0-100", "z001: time-steps 100-1000"),
        *("z000 to z001: time-steps 0-1000", "raw pixels"),
    ]
    assert [(result.name, result.shots) for result in results] == [
        (name, shots) for shots in (5, 20) for name in names
    ]
    assert len({result.attributes for result in results}) == 1
    assert [result.dims for result in results[:5]] == [8, 4, 4, 8, 3072]
    glasses = results[0].attributes.index("glasses")
    first, second = (result.accuracy[:, glasses].mean() for result in results[6:8])
    assert first > 0.9 > 0.7 > second
    np.testing.assert_array_equal(results[0].accuracy, results[3].accuracy)


def test_the_shortcut_is_not_learnt_itself(halves: tuple[str, str]) -> None:
    train, test = halves
    [result, *_] = evaluate_few_shot(
        STORE,
        train_url=train,
        test_url=test,
        shots=(5,),
        draws=1,
        shortcut=Shortcut("glasses", 0.8),
        pixels=False,
    )
    assert "glasses" not in result.attributes


def test_the_command_prints_a_table_and_json(halves: tuple[str, str]) -> None:
    options = ("--shots", "5", "--draws", "2", "--no-pixels")
    table = diti("eval", "fewshot", *halves, *options)
    assert table.exit_code == 0, table.stderr
    assert "5 shots" in table.stdout
    assert "z001: time-steps 100-1000" in table.stdout
    rows = json.loads(diti("eval", "fewshot", *halves, *options, "--json").stdout)
    assert rows[0]["name"] == "all subsets"
    assert len(rows[0]["attributes"]["glasses"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shortcut", "tall"), "there is no attribute tall; there are: "),
        (("--share", "0.9"), "--share belongs to --shortcut"),
        (("--shots", "500"), "no attribute has enough of the 200 training samples for 500 shots"),
        (("--timesteps", "900:1200"), "time-steps [900, 1200) cannot be selected"),
    ],
)
def test_what_cannot_be_is_refused(
    halves: tuple[str, str], options: tuple[str, str], message: str
) -> None:
    done = diti("eval", "fewshot", *halves, "--no-pixels", *options)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")
