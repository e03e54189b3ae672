"""Checkpoints exist by their manifest, are verified byte by byte, and belong to one run."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from configs.loading import parse_run
from configs.schema import RunConfig
from data_pipelines.object_store import ObjectInfo, ObjectMissingError, ObjectStore
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, Manifest, check_resumable
from pretrain.world import World
from tests.tiny_run import RUN

STORE = ObjectStore()
ALONE = World(0, 1, torch.device("cpu"))
WEIGHTS = bytes(range(256)) * 4


pytestmark = pytest.mark.usefixtures("world")


def make_config(*overrides: str) -> RunConfig:
    text = RUN.format(output="out", weights="b.safetensors", sha256="b" * 64, shards="train")
    return parse_run(text, overrides)


@dataclass(frozen=True)
class Run:
    """A run's folder in a local store, and what publishes below it."""

    url: str
    scratch: Path

    def publish(
        self,
        step: int,
        parent: int | None = None,
        files: dict[str, bytes] | None = None,
        *,
        store: ObjectStore = STORE,
        check: Callable[[dict[str, tuple[int, str]]], None] = lambda _: None,
    ) -> Manifest:
        """Publish `files`; `check` sees the list of files just before the manifest is written."""
        folder = self.scratch / f"step-{step}"
        for name, content in (files or {"weights.safetensors": WEIGHTS}).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        def manifest(parts: str, files: dict[str, tuple[int, str]]) -> Manifest:
            check(files)
            return Manifest(
                step=step,
                images=32 * step,
                parent=None if parent is None else checkpoint.checkpoint_name(parent),
                parts=parts,
                config=make_config().model_dump(mode="json"),
                index_digest="i" * 64,
                backbone_sha256="b" * 64,
                world_size=1,
                code_version="0",
                files=files,
            )

        return checkpoint.publish(store, self.url, folder, ALONE, manifest)

    def path(self, manifest: Manifest, name: str) -> Path:
        """Where a published part lies on disk."""
        return Path(self.url, "checkpoints", manifest.name, manifest.parts, name)

    def manifest_path(self, step: int) -> Path:
        return Path(self.url, "checkpoints", checkpoint.checkpoint_name(step), "COMPLETE.json")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "runs" / "tiny"), tmp_path / "scratch")


# --- publishing and finding -----------------------------------------------------------------------


def test_what_was_published_is_found_again_with_every_byte(run: Run, tmp_path: Path):
    files = {"weights.safetensors": WEIGHTS, "zero/rank0.pt": b"zero", "zero/sub/rank1.pt": b"one"}
    published = run.publish(2, files=files)
    found = checkpoint.find(STORE, run.url, None)
    assert found == published
    assert (found.step, found.images, found.parent, found.name) == (2, 64, None, "step-00000002")
    assert {name: size for name, (size, _) in found.files.items()} == {
        name: len(content) for name, content in files.items()
    }
    for name, content in files.items():
        assert checkpoint.read_file(STORE, run.url, found, name) == content
    checkpoint.fetch(STORE, run.url, found, tmp_path / "fetched", below="zero/")
    fetched = {path for path in (tmp_path / "fetched").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "fetched").as_posix() for path in fetched} == {
        "zero/rank0.pt",
        "zero/sub/rank1.pt",
    }


def test_the_newest_is_the_last_step_and_any_step_can_be_asked_for(run: Run):
    manifests = {step: run.publish(step) for step in (10, 9, 100)}
    assert checkpoint.complete_steps(STORE, run.url) == [9, 10, 100]
    assert checkpoint.newest(STORE, run.url) == manifests[100]
    assert checkpoint.find(STORE, run.url, None) == manifests[100]
    assert checkpoint.find(STORE, run.url, 9) == manifests[9]
    latest = json.loads(Path(run.url, "checkpoints", "latest.json").read_text())
    assert latest == {"name": "step-00000100"}


def test_an_unknown_step_is_refused_with_those_there_are(run: Run):
    for step in (0, 2, 4):
        run.publish(step)
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint at step 3.*\[0, 2, 4\]"
    ) as e:
        checkpoint.find(STORE, run.url, 3)
    assert run.url in str(e.value)


def test_a_run_without_any_says_so(run: Run):
    assert checkpoint.newest(STORE, run.url) is None
    with pytest.raises(CheckpointError, match=r"no complete checkpoint; check the URL"):
        checkpoint.find(STORE, run.url, None)


# --- half a checkpoint is none --------------------------------------------------------------------


class KilledError(Exception):
    """Stands for the end of the process."""


def kill_before_the_manifest(files: dict[str, tuple[int, str]]) -> None:
    if files:
        raise KilledError


def test_parts_without_a_manifest_are_invisible(run: Run):
    older = run.publish(0)
    with pytest.raises(KilledError):
        run.publish(2, parent=0, check=kill_before_the_manifest)
    below = [info.url for info in STORE.list(run.url) if "step-00000002" in info.url]
    assert len(below) == 1, "the parts are there"
    assert checkpoint.complete_steps(STORE, run.url) == [0]
    assert checkpoint.newest(STORE, run.url) == older
    with pytest.raises(CheckpointError, match=r"at step 2; the last of 1 are the steps \[0\]"):
        checkpoint.find(STORE, run.url, 2)
    with pytest.raises(ObjectMissingError):
        checkpoint.read_manifest(STORE, run.url, 2)


def test_a_second_attempt_at_a_step_shares_nothing_with_the_first(run: Run):
    first = run.publish(2, files={"a": b"first", "b": b"first"})
    (run.scratch / "step-2" / "b").unlink()
    again = run.publish(2, files={"a": b"again"})
    assert checkpoint.find(STORE, run.url, 2) == again
    assert list(again.files) == ["a"]
    assert checkpoint.read_file(STORE, run.url, again, "a") == b"again"
    assert checkpoint.read_file(STORE, run.url, first, "a") == b"first", "a reader was disturbed"


class CuttingStore(ObjectStore):
    """Loses the last byte of what it is given."""

    def upload(self, local_path: Path, url: str) -> ObjectInfo:
        return self.write(url, local_path.read_bytes()[:-1])


def test_a_store_that_loses_a_byte_gets_no_manifest(run: Run):
    with pytest.raises(CheckpointError, match=r"1023 bytes in the store, 1024 were sent") as error:
        run.publish(2, store=CuttingStore())
    assert "weights.safetensors" in str(error.value)
    assert checkpoint.complete_steps(STORE, run.url) == []


# --- damage ---------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "what"),
    [(flip_a_byte, "is damaged"), (cut, "is damaged: 1023 bytes"), (Path.unlink, "is missing")],
)
def test_a_damaged_or_missing_part_is_named_with_the_remedy(
    run: Run, tmp_path: Path, damage: Callable[[Path], None], what: str
):
    manifest = run.publish(2)
    path = run.path(manifest, "weights.safetensors")
    damage(path)
    for read in (
        lambda: checkpoint.read_file(STORE, run.url, manifest, "weights.safetensors"),
        lambda: checkpoint.fetch(STORE, run.url, manifest, tmp_path / "to", below="weights"),
    ):
        with pytest.raises(CheckpointError) as error:
            read()
        assert str(error.value).startswith(f"{path} {what}")
        assert "use an older checkpoint" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1]",
        lambda text: json.dumps(json.loads(text) | {"files": {"a": 3}}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "parts"}),
        lambda text: json.dumps(json.loads(text) | {"invented_later": 1}),
        lambda text: json.dumps(json.loads(text) | {"format_version": 2}),
    ],
    ids=["half", "empty", "list", "files", "without parts", "unknown field", "other format"],
)
def test_a_manifest_that_cannot_be_read_is_named_with_the_remedy(
    run: Run, change: Callable[[str], str]
):
    run.publish(0)
    run.publish(2, parent=0)
    path = run.manifest_path(2)
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError, match="delete it to fall back to an older") as error:
        checkpoint.find(STORE, run.url, None)
    assert str(path) in str(error.value)
    path.unlink()
    assert checkpoint.find(STORE, run.url, None).step == 0


# --- what a checkpoint was trained on -------------------------------------------------------------


def progress(*positions: int) -> dict[str, bytes]:
    """Samples dealt to two ranks and a line of metrics for each position."""
    samples = [f"{position}\tkey{position}\n" for position in positions]
    return {
        "samples-rank0.tsv": "".join(samples[1::2]).encode(),
        "samples-rank1.tsv": "".join(samples[::2]).encode(),
        "metrics.jsonl": "".join(f'{{"at": {p}}}\n' for p in positions).encode(),
    }


@pytest.fixture
def branched(run: Run) -> Run:
    """0 -> 2 -> 4, and 3, which was abandoned: its worker died and the run went on from 2."""
    run.publish(0, files={"weights.safetensors": WEIGHTS})
    run.publish(2, 0, progress(0, 1, 2, 3))
    run.publish(3, 2, progress(4, 5))
    run.publish(4, 2, progress(4, 5, 6, 7))
    return run


def test_the_lineage_leads_from_the_first_checkpoint_and_leaves_side_branches_out(branched: Run):
    for step, steps in ((4, [0, 2, 4]), (3, [0, 2, 3]), (0, [0])):
        line = checkpoint.lineage(STORE, branched.url, checkpoint.find(STORE, branched.url, step))
        assert [manifest.step for manifest in line] == steps


def test_samples_and_metrics_are_those_of_the_lineage_in_order(branched: Run):
    manifest = checkpoint.find(STORE, branched.url, 4)
    samples = checkpoint.read_samples(STORE, branched.url, manifest)
    assert samples == [(position, f"key{position}") for position in range(8)]
    metrics = checkpoint.read_metrics(STORE, branched.url, manifest)
    assert metrics == [{"at": position} for position in range(8)]


def test_a_damaged_ancestor_is_named(branched: Run):
    manifest = checkpoint.find(STORE, branched.url, 4)
    ancestor = checkpoint.find(STORE, branched.url, 2)
    flip_a_byte(branched.path(ancestor, "samples-rank1.tsv"))
    with pytest.raises(CheckpointError, match=r"step-00000002/.*/samples-rank1\.tsv is damaged"):
        checkpoint.read_samples(STORE, branched.url, manifest)


# --- does it belong to this run -------------------------------------------------------------------

CHANGES = {
    "output": "output=elsewhere",
    "cluster.max_failures": "cluster.max_failures=9",
    "cluster.cpus_per_worker": "cluster.cpus_per_worker=4",
    "data.cache": "data.cache={folder: /scratch, limit_gib: 1}",
    "data.shards": "data.shards=s3://copy/train",
    "data.sources.*.shards": "data.shards=s3://copy/train",
    "data.decode_threads": "data.decode_threads=7",
    "data.prefetch_batches": "data.prefetch_batches=7",
    "engine.attention": "engine.attention=sdpa",
    "optimizer.decay_images": "optimizer.decay_images=32",
    "store": "store.endpoint_url=http://other:9000",
    "task.backbone.weights": "task.backbone.weights=s3://copy/b.safetensors",
    "train.total_images": "train.total_images=640",
    "train.checkpoint_every_images": "train.checkpoint_every_images=32",
    "train.log_every_steps": "train.log_every_steps=5",
    "wandb": "wandb.project=other",
}


def resume(
    manifest: Manifest,
    config: RunConfig,
    *,
    index_digest: str = "i" * 64,
    backbone_sha256: str = "b" * 64,
    world_size: int = 1,
) -> None:
    check_resumable(
        manifest,
        config,
        index_digest=index_digest,
        backbone_sha256=backbone_sha256,
        world_size=world_size,
    )


@pytest.fixture
def manifest(run: Run) -> Manifest:
    """As it comes back from storage."""
    run.publish(2)
    return checkpoint.find(STORE, run.url, 2)


def test_the_same_configuration_may_resume(manifest: Manifest):
    resume(manifest, make_config())
    assert checkpoint.run_of(manifest) == make_config()


def test_nothing_else_may_change():
    assert set(checkpoint.MAY_CHANGE) == CHANGES.keys()


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_that_decides_nothing_about_the_numbers_may_change(manifest: Manifest, key: str):
    config = make_config(CHANGES[key])
    assert config != make_config()
    resume(manifest, config)
    changed = checkpoint.changed_settings(manifest, config)
    assert changed
    assert all(text.startswith(key.replace("sources.*.", "")) for text in changed)


def test_every_setting_that_differs_is_listed_with_both_values(manifest: Manifest):
    config = make_config(
        "seed=3",
        "optimizer.learning_rate=2e-3",
        "task.encoder.channels=[32, 32, 64]",
        "optimizer.clip_norm=null",
        "wandb.mode=offline",
    )
    with pytest.raises(CheckpointError) as error:
        resume(manifest, config, index_digest="j" * 64, backbone_sha256="c" * 64, world_size=4)
    assert checkpoint.changed_settings(manifest, config) == [
        "wandb.mode was 'disabled', is 'offline'"
    ]
    message = str(error.value)
    assert message.startswith("run 'tiny' has a checkpoint at step 2 made with other settings: ")
    assert message.endswith("Restore them, give the run another name, or delete its folder.")
    listed = message.split("settings: ")[1].split(". Restore")[0].split("; ")
    assert listed == [
        f"backbone was '{'b' * 64}', is '{'c' * 64}'",
        "number of workers was 1, is 4",
        "optimizer.clip_norm was 1.0, is None",
        "optimizer.learning_rate was 0.001, is 0.002",
        "seed was 0, is 3",
        f"shard index was '{'i' * 64}', is '{'j' * 64}'",
        "task.encoder.channels was [32, 32, 32], is [32, 32, 64]",
    ]


def test_a_card_that_says_something_else_is_another_backbone(manifest: Manifest):
    def resume_with(card: str | None) -> None:
        check_resumable(
            replace(manifest, backbone_card_sha256="d" * 64),
            make_config(),
            index_digest="i" * 64,
            backbone_sha256="b" * 64,
            backbone_card_sha256=card,
            world_size=1,
        )

    resume_with("d" * 64)
    with pytest.raises(CheckpointError, match=r"backbone's card was 'dddd"):
        resume_with("e" * 64)


def test_a_setting_that_only_the_checkpoint_has_is_listed_too(manifest: Manifest):
    older = replace(manifest, config=manifest.config | {"dropped": {"later": 5}})
    with pytest.raises(
        CheckpointError, match=r"step-00000002 cannot be used: dropped: unknown key"
    ):
        resume(older, make_config())


def test_a_setting_that_the_checkpoint_has_not_yet_had_its_default(manifest: Manifest):
    encoder = dict(manifest.config["task"]["encoder"])
    assert encoder.pop("kind") == "conv"
    task = manifest.config["task"] | {"encoder": encoder}
    resume(replace(manifest, config=manifest.config | {"task": task}), make_config())


def test_a_configuration_that_this_version_cannot_read_is_named(manifest: Manifest):
    older = replace(manifest, config=manifest.config | {"dropped": 5})
    with pytest.raises(CheckpointError, match=r"checkpoint step-00000002.*dropped"):
        checkpoint.run_of(older)


def test_the_pointer_to_the_newest_one_never_runs_ahead_of_its_manifest(run: Run):
    class FullAtTheEnd(ObjectStore):
        def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
            if url.endswith(checkpoint.MANIFEST_NAME):
                raise OSError("no space left")
            return super().write(url, data, only_if_absent=only_if_absent)

    run.publish(1)
    with pytest.raises(OSError, match="no space left"):
        run.publish(2, store=FullAtTheEnd())
    latest = json.loads(Path(run.url, "checkpoints", "latest.json").read_text())
    assert latest == {"name": checkpoint.checkpoint_name(1)}
    assert checkpoint.find(STORE, run.url, None).step == 1
