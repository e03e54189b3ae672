"""Where attributes are lost: fine details before large areas, and the arithmetic of half."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.object_store import ObjectStore
from pretrain.preflight import run_url
from pretrain.train import run
from pretrain.world import World
from tests.diti_command import diti
from tests.tiny_run import make_run, make_shards
from tools.attribute_loss import AttributeLoss, evaluate_attribute_loss
from tools.evaluation_tables import print_attribute_loss

STORE = ObjectStore()


def loss(*precision: float, base: float = 0.2) -> AttributeLoss:
    """Of one attribute, measured on the image and at t = 0, 100, 200."""
    return AttributeLoss(("hat",), (-1, 0, 100, 200), np.array(precision)[:, None], (base,))


@pytest.mark.parametrize(
    ("precision", "half"),
    [
        ((1.0, 1.0, 0.8, 0.4), 150.0),
        ((1.0, 1.0, 0.6, 0.2), 100.0),
        ((1.0, 0.2, 0.2, 0.2), 0.0),  # between the image and t = 0
        ((1.0, 0.9, 0.9, 0.7), None),
        ((0.2, 0.2, 0.2, 0.2), None),  # never to be read
    ],
)
def test_half_is_lost_where_the_gain_over_the_base_rate_has_halved(
    precision: tuple[float, ...], half: float | None
) -> None:
    assert loss(*precision).half_lost("hat") == (None if half is None else pytest.approx(half))


def test_the_table_has_what_is_lost_at_once_first_and_what_is_never_lost_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    precision = np.array([[1.0, 1.0, 1.0], [0.9, 0.2, 1.0], [0.9, 0.2, 0.2], [0.7, 0.2, 0.2]])
    names = ("never", "at_once", "later")
    print_attribute_loss(AttributeLoss(names, (-1, 0, 100, 200), precision, (0.2, 0.2, 0.2)))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["at_once", "later", "never"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A run against the packaged backbone, and labelled shards of two splits."""
    folder = tmp_path_factory.mktemp("lost")
    config = make_run(
        STORE,
        str(folder),
        "task.backbone.weights=builtin/avatars32.safetensors",
        "task.backbone.sha256=ea5a58fd0868b7f18ab147bbf5688f5bb20df4fd4dd5b8fd2a78830c3bc66668",
        *("train.global_batch=8", "train.total_images=8", "train.checkpoint_every_images=8"),
        "cluster.num_workers=1",
    )
    run(config, local_dir=folder)
    assert run_url(config) == str(folder / "runs" / "tiny")
    for split in ("val", "test"):
        make_shards(STORE, str(folder / split), split=split, shards=1, rows=300)
    return folder


def test_a_large_area_outlasts_a_detail(trained: Path) -> None:
    found = evaluate_attribute_loss(
        STORE,
        run_url=str(trained / "runs" / "tiny"),
        train_url=str(trained / "val"),
        test_url=str(trained / "test"),
        timesteps=(100, 500, 999),
    )
    background = found.attributes.index("dark_background")
    assert found.timesteps == (-1, 100, 500, 999)
    assert found.precision[0, background] > 0.95
    lost = [found.half_lost(name) for name in ("dark_background", "glasses")]
    assert lost[0] is not None
    assert lost[1] is not None
    assert lost[0] > lost[1] + 100
    assert found.precision[-1, background] < 0.8, "nothing is left of an image at the last t"


def test_the_same_shards_twice_are_refused(trained: Path) -> None:
    same = trained / "val"
    answer = diti(
        "eval", "attribute-loss", str(trained / "runs" / "tiny"),
        f"--train-shards={same}", f"--test-shards={same}",
    )  # fmt: skip
    assert answer.exit_code == 2
    assert "give a second split" in answer.stderr
