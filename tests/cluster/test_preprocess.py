"""Raw tars with known faults become a shard set, and nothing is forgotten; on real Ray and S3."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import webdataset as wds
from typer.testing import CliRunner

from cluster.index import verify_set
from cluster.leases import QueueState
from cluster.preprocess import preprocess
from cluster.session import ray_session
from configs.preprocess import DuplicatesConfig, FiltersConfig, PreprocessConfig
from data_pipelines.decoding import decode_whole
from data_pipelines.laion_like import LaionSpec, draw_row
from data_pipelines.object_store import AlreadyExistsError, ObjectStore, join
from data_pipelines.preprocessing import read_verdicts
from data_pipelines.sample_reader import iter_shard
from data_pipelines.shard_index import ShardIndex
from data_pipelines.shard_writer import shard_name
from data_pipelines.verdicts import Audit
from tests.tars import tar_of
from tools.cli import app

SPEC = LaionSpec(faults=0.6, rows_per_shard=16)
TARS = 5
FILTERS = FiltersConfig(
    max_punsafe=0.5, max_pwatermark=0.5, min_side_px=100, max_aspect=4, min_caption_characters=1
)
FATE = {
    "truncated": "failed: undecodable image",
    "no_image": "failed: undecodable image",
    "huge": "failed: too many pixels",
    "broken_json": "failed: unreadable json",
    "tiny": "filtered: min_side_px",
    "extreme_aspect": "filtered: max_aspect",
    "no_caption": "filtered: min_caption_characters",
    "empty_caption": "filtered: min_caption_characters",
    "no_json": "filtered: max_punsafe",  # nothing says that it is safe
    "nsfw": "filtered: max_punsafe",
    "watermark": "filtered: max_pwatermark",
}
"""What becomes of each kind of fault. A PNG under another name is none; copies are found later."""


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with ray_session(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, dict[str, bytes], str]]:
    """Key, members and fault of every raw sample."""
    drawn = [draw_row(SPEC, row) for row in range(TARS * SPEC.rows_per_shard)]
    return [(row.key, row.members, row.columns["fault"]) for row in drawn]


@pytest.fixture
def config(
    store: ObjectStore, s3_url: str, rows: list[tuple[str, dict[str, bytes], str]]
) -> PreprocessConfig:
    """Of a raw set that is there."""
    raw = join(s3_url, "raw")
    for number in range(TARS):
        part = rows[number * SPEC.rows_per_shard :][: SPEC.rows_per_shard]
        members = [(f"{key}.{name}", data) for key, all_of_it, _ in part
                   for name, data in all_of_it.items()]  # fmt: skip
        store.write(join(raw, shard_name(number)), tar_of(members))
        store.write(join(raw, f"{number:05d}_stats.json"), b"{}")
    return PreprocessConfig(
        raw=raw,
        out=join(s3_url, "train"),
        image_size_px=96,
        rows_per_shard=10,
        mix_shards=2,
        filters=FILTERS,
        duplicates=DuplicatesConfig(near_bits=2),
    )


def found_in(store: ObjectStore, index: ShardIndex) -> dict[str, bytes]:
    """Image of every sample in the set, by the key that it had in the raw one."""
    return {
        json.loads(sample["json"])["raw"]["key"]: sample["jpg"]
        for shard in index.shards
        for sample in iter_shard(store, shard)
    }


def test_what_becomes_of_each_sample_is_what_its_fault_asks_for(
    store: ObjectStore, config: PreprocessConfig, rows: list[tuple[str, dict[str, bytes], str]]
) -> None:
    faults = Counter(fault for _, _, fault in rows)
    assert set(FATE) <= set(faults), "a kind of fault is missing: the test proves less"
    index, audit = preprocess(store, config)

    fates = Counter(FATE[fault] for _, _, fault in rows if fault in FATE)
    wanted = {kind: {} for kind in ("filtered", "failed")}
    for fate, count in fates.items():
        kind, _, why = fate.partition(": ")
        wanted[kind][why] = count
    assert (dict(audit.filtered), dict(audit.failed)) == (wanted["filtered"], wanted["failed"])
    assert audit.duplicates["exact"] == faults["duplicate"]
    assert audit.duplicates["near"] == faults["near_duplicate"]
    assert audit.samples == len(rows) == audit.kept + sum(fates.values()) + (
        audit.duplicates.total()
    )  # fmt: skip

    images = found_in(store, index)
    assert set(images) == {key for key, _, fault in rows if fault in ("", "wrong_extension")}
    assert {decode_whole(image).shape for image in images.values()} == {(96, 96, 3)}
    sizes = index.sizes.tolist()
    assert sum(sizes) == audit.kept == index.num_samples
    assert max(sizes) - min(sizes) <= 1
    assert verify_set(store, index, deep=True, num_workers=1) == ([], 0)

    verdicts = read_verdicts(store, config, shard_name(0)).table
    told = dict(zip(verdicts["key"].to_pylist(), verdicts["why"].to_pylist(), strict=True))
    assert told == {
        key: FATE.get(fault, "").partition(": ")[2] for key, _, fault in rows[: SPEC.rows_per_shard]
    }


def test_a_set_on_a_disk_is_read_by_webdataset(
    store: ObjectStore, config: PreprocessConfig, tmp_path: Path
) -> None:
    out = str(tmp_path / "train")
    index, _ = preprocess(store, config.model_copy(update={"out": out}))
    urls = [shard.url for shard in index.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))  # pyright: ignore[reportAttributeAccessIssue]
    assert len(samples) == index.num_samples
    assert all(sample["jpg"].shape == (96, 96, 3) and sample["txt"] for sample in samples)
    assert len({sample["__key__"] for sample in samples}) == len(samples)


class Disturbance:
    """Kills every worker in the middle of the first pass, and stops the driver in the second."""

    def __init__(self) -> None:
        self.killed = 0

    def __call__(self, name: str, state: QueueState) -> None:
        if name == "screen_tar" and state.done and not self.killed:
            for process in psutil.process_iter(["cmdline"]):
                if "ray::_Worker" in " ".join(process.info["cmdline"] or ()):
                    process.kill()
                    self.killed += 1
        if name == "mix_group" and state.done:
            raise InterruptedError("the driver stops here")


def test_workers_that_are_killed_and_a_driver_that_stops_change_nothing(
    store: ObjectStore, config: PreprocessConfig
) -> None:
    calm = config.model_copy(update={"out": f"{config.out}-calm"})
    index, audit = preprocess(store, calm)
    disturbance = Disturbance()
    with pytest.raises(InterruptedError):
        preprocess(store, config, on_progress=disturbance)
    assert disturbance.killed, "nothing was killed: the test proves nothing"
    left: dict[str, int] = {}

    def note(name: str, state: QueueState) -> None:
        left.setdefault(name, state.waiting + state.leased + state.done)

    again, audit_again = preprocess(store, config, on_progress=note)
    assert left["screen_tar"] == 0, "what had been screened is screened no more"
    assert (again.digest, audit_again) == (index.digest, audit)
    names = [info.url.removeprefix(config.work) for info in store.list(config.work)]
    assert not [name for name in names if name.endswith((".tar", ".plan.parquet"))]
    assert preprocess(store, config) == (again, audit), "done: nothing is left to do"


@pytest.mark.faults
def test_a_tar_that_is_cut_is_named_and_left_out(
    store: ObjectStore, config: PreprocessConfig
) -> None:
    broken = join(config.raw, shard_name(1))
    store.write(broken, store.read(broken)[:-5000])
    index, audit = preprocess(store, config)
    assert list(audit.unreadable) == [shard_name(1)]
    assert "cut short" in audit.unreadable[shard_name(1)]
    assert audit.samples == (TARS - 1) * SPEC.rows_per_shard
    assert not [key for key in found_in(store, index) if key.startswith("00001")]


def test_other_work_in_the_same_folders_is_refused(
    store: ObjectStore, config: PreprocessConfig
) -> None:
    preprocess(store, config)
    with pytest.raises(AlreadyExistsError, match=r"of other work: image_size_px was 96, is 32\. C"):
        preprocess(store, config.model_copy(update={"image_size_px": 32}))
    store.delete_prefix(config.out)
    with pytest.raises(ValueError, match=r"no longer what was made, first 00000\.tar is missing"):
        preprocess(store, config)
    store.write(join(config.raw, shard_name(9)), store.read(join(config.raw, shard_name(0))))
    with pytest.raises(AlreadyExistsError, match="the raw tars are others"):
        preprocess(store, config)


def test_what_cannot_become_a_set_is_refused(store: ObjectStore, config: PreprocessConfig) -> None:
    with pytest.raises(ValueError, match=r"no \.tar below"):
        preprocess(store, config.model_copy(update={"raw": f"{config.raw}-none"}))
    store.write(join(config.out, "notes.txt"), b"mine")
    with pytest.raises(ValueError, match="holds 1 objects already"):
        preprocess(store, config)
    elsewhere = config.model_copy(update={"out": f"{config.out}-of"})
    store.write(join(elsewhere.work, "00000.tar"), b"theirs")
    with pytest.raises(ValueError, match="-of-work holds 1 objects already"):
        preprocess(store, elsewhere)
    assert store.exists(join(elsewhere.work, "00000.tar"))
    nothing = config.filters.model_copy(update={"min_similarity": 2.0})
    with pytest.raises(ValueError, match="nothing of the 80 samples"):
        preprocess(store, config.model_copy(update={"filters": nothing, "out": f"{config.out}2"}))


def test_the_command_prints_a_table_that_adds_up(
    store: ObjectStore, config: PreprocessConfig, tmp_path: Path
) -> None:
    file = tmp_path / "shards.yaml"
    file.write_text(f"raw: {config.raw}\nout: {config.out}\nimage_size_px: 32\n")
    told = CliRunner().invoke(app, ["data", "preprocess", str(file), "workers=1"])
    assert told.exit_code == 0, told.output
    assert "samples in 5 tars" in told.stdout
    assert "failed: undecodable image" in told.stdout
    answer = CliRunner().invoke(app, ["data", "preprocess", str(file), "workers=1", "--json"])
    counted = json.loads(answer.stdout)
    digest = counted.pop("index")
    audit = Audit.from_json(counted)
    audit.check(audit.kept)
    assert f"index {digest[:12]}" in told.stdout
    refused = CliRunner().invoke(app, ["data", "preprocess", str(file), "image_size_px=16"])
    assert refused.exit_code == 2
    assert "image_size_px was 32, is 16" in refused.stderr
