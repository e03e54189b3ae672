"""Checkpoints exist by their manifest, are verified byte by byte, and belong to one run."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from configs.loading import digest_of_json, parse_run
from configs.schema import RunConfig
from data_pipelines.object_store import (
    ObjectInfo,
    ObjectMissingError,
    ObjectStore,
    StoreError,
    join,
)
from data_pipelines.upload_process import MemoryFile
from pretrain import checkpoint
from pretrain import publisher as publisher_module
from pretrain.checkpoint import CheckpointError, Manifest
from pretrain.fence import Fence, SupersededError, claim, enter
from pretrain.publisher import Publisher, collect_orphans, kept_steps
from pretrain.resumable import MAY_CHANGE, changed_settings, check_resumable
from pretrain.world import World, from_first_rank
from tests.tiny_run import RUN

STORE = ObjectStore()
ALONE = World(0, 1, torch.device("cpu"))
WEIGHTS = bytes(range(256)) * 4
ABSENT = object()


pytestmark = pytest.mark.usefixtures("world")


def make_config(*overrides: str) -> RunConfig:
    text = RUN.format(output="out", weights="b.safetensors", sha256="b" * 64, shards="train")
    return parse_run(text, overrides)


def make_manifest(step: int, parent: int | None = None) -> Manifest:
    """As the saver makes it: without parts and files."""
    return Manifest(
        step=step,
        images=32 * step,
        parent=None if parent is None else checkpoint.checkpoint_name(parent),
        parts="",
        config=make_config().model_dump(mode="json"),
        index_digest="i" * 64,
        backbone_sha256="b" * 64,
        world_size=1,
        code_version="0",
        shapes={"w": [2, 2]},
        counters={"updates": float(step)},
        files={},
    )


def newest_turn(url: str) -> Fence:
    """Of a launch and a group that begin now."""
    return enter(STORE, url, claim(STORE, url))


@dataclass(frozen=True)
class Run:
    """A run's folder in a local store, and what publishes below it."""

    url: str

    def publish(
        self,
        step: int,
        parent: int | None = None,
        files: Mapping[str, bytes | MemoryFile] | None = None,
        *,
        store: ObjectStore = STORE,
        keep_last: int | None = None,
    ) -> Manifest:
        """Publish `files`, from a publisher of its own, as a restarted run does."""
        keep = partial(kept_steps, keep_last=keep_last, keep_every_steps=None)
        publisher = Publisher(
            store, self.url, ALONE, newest_turn(self.url), deadline_seconds=5, kept_steps=keep
        )
        contents = files or {"weights/00000.safetensors": WEIGHTS}
        publisher.start(
            make_manifest(step, parent),
            contents.items(),
        )
        outcome = publisher.settle(wait=True)
        publisher.close()
        if not isinstance(outcome, Manifest):
            assert outcome is not None
            raise outcome
        return outcome

    def path(self, manifest: Manifest, name: str) -> Path:
        """Where a published part lies on disk."""
        return Path(self.url, "checkpoints", manifest.name, manifest.parts, name)

    def manifest_path(self, step: int) -> Path:
        return Path(self.url, "checkpoints", checkpoint.checkpoint_name(step), "COMPLETE.json")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "runs" / "tiny"))


# --- publishing and finding -----------------------------------------------------------------------


def test_what_was_published_is_found_again_with_every_byte(run: Run):
    files = {"weights/00000.safetensors": WEIGHTS, "metrics.jsonl": b"", "samples-00000.tsv": b"1"}
    published = run.publish(2, files=files)
    found = checkpoint.find(STORE, run.url, None)
    assert found == published
    assert (found.step, found.images, found.parent, found.name) == (2, 64, None, "step-00000002")
    assert {name: size for name, (size, _) in found.files.items()} == {
        name: len(content) for name, content in files.items()
    }
    for name, content in files.items():
        assert checkpoint.read_file(STORE, run.url, found, name) == content


@pytest.mark.parametrize("size_bytes", [1024, 17 * 2**20], ids=["small", "large"])
def test_packed_state_is_found_again_with_every_byte(run: Run, size_bytes: int):
    packed = MemoryFile(size_bytes)
    packed.bytes[:] = os.urandom(size_bytes)
    manifest = run.publish(2, files={"weights/00000.safetensors": packed})
    found = checkpoint.read_file(STORE, run.url, manifest, "weights/00000.safetensors")
    assert found == bytes(packed.bytes)


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


class DiesBeforeTheManifest(ObjectStore):
    """Stands for the end of the process once all parts are there."""

    def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
        if url.endswith("/" + checkpoint.MANIFEST_NAME):
            raise StoreError("killed")
        return super().write(url, data, only_if_absent=only_if_absent)


def test_parts_without_a_manifest_are_invisible(run: Run):
    older = run.publish(0)
    with pytest.raises(StoreError, match="killed"):
        run.publish(2, parent=0, store=DiesBeforeTheManifest())
    assert [info.url for info in STORE.list(run.url) if "step-00000002" in info.url], "parts"
    assert checkpoint.complete_steps(STORE, run.url) == [0]
    assert checkpoint.newest(STORE, run.url) == older
    with pytest.raises(CheckpointError, match=r"at step 2; the last of 1 are the steps \[0\]"):
        checkpoint.find(STORE, run.url, 2)
    with pytest.raises(ObjectMissingError):
        checkpoint.read_manifest(STORE, run.url, 2)


def test_a_second_attempt_at_a_step_shares_nothing_with_the_first(run: Run):
    first = run.publish(2, files={"a": b"first", "b": b"first"})
    STORE.delete(join(run.url, "checkpoints", "step-00000002", "COMPLETE.json"))  # killed before it
    again = run.publish(2, files={"a": b"again"})
    assert checkpoint.find(STORE, run.url, 2) == again
    assert list(again.files) == ["a"]
    assert checkpoint.read_file(STORE, run.url, again, "a") == b"again"
    assert checkpoint.read_file(STORE, run.url, first, "a") == b"first", "a reader was disturbed"


class CuttingStore(ObjectStore):
    """Loses the last byte of weights."""

    def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
        return super().write(url, data[:-1] if "weights" in url else data)


def test_a_store_that_loses_a_byte_gets_no_manifest(run: Run):
    with pytest.raises(CheckpointError, match=r"1023 bytes in the store, 1024 were sent") as error:
        run.publish(2, store=CuttingStore())
    assert "weights/00000.safetensors" in str(error.value)
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
    run: Run, damage: Callable[[Path], None], what: str
):
    manifest = run.publish(2)
    path = run.path(manifest, "weights/00000.safetensors")
    damage(path)
    with pytest.raises(CheckpointError) as error:
        list(checkpoint.read_pieces(STORE, run.url, manifest, "weights"))
    assert str(error.value).startswith(f"{path} {what}")
    assert "restore it: there is no older complete checkpoint" in str(error.value)
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.read_file(STORE, run.url, manifest, "weights/00000.safetensors")
    if damage is not flip_a_byte:  # which only reading tells
        with pytest.raises(checkpoint.DamagedError, match=f"{path} (is missing|has 1023 bytes), "):
            checkpoint.check_files(STORE, run.url, manifest)


def test_the_next_older_complete_checkpoint_is_offered(run: Run):
    run.publish(0)
    run.publish(2, parent=0)
    manifest = run.publish(4, parent=2)
    checkpoint.check_files(STORE, run.url, manifest)
    run.path(manifest, "weights/00000.safetensors").unlink()
    with pytest.raises(checkpoint.DamagedError, match=r"older complete one: --from-step 2$"):
        checkpoint.check_files(STORE, run.url, manifest)


def edited(**fields: object) -> Callable[[str], str]:
    """A manifest that says something else, and has the digest of what it says."""

    def edit(text: str) -> str:
        plain = {k: v for k, v in (json.loads(text) | fields).items() if v is not ABSENT}
        del plain["sha256"]
        return json.dumps(plain | {"sha256": digest_of_json(plain)})

    return edit


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1]",
        lambda text: json.dumps(json.loads(text) | {"counters": {"updates": 90.0}}),
        lambda text: text.replace('"parts": "parts', '"parts": "qarts'),
        edited(files={"a": 3}),
        edited(parts=ABSENT),
        edited(invented_later=1),
        edited(parent="step-00000002"),
        edited(parent=3),
        edited(step="2"),
        edited(step=7),
        edited(step=-2),
        edited(parts=5),
    ],
    ids=[
        "half",
        "empty",
        "list",
        "another number",
        "one other character",
        "files",
        "without parts",
        "unknown field",
        "its own parent",
        "parent of another kind",
        "step of another kind",
        "step of another folder",
        "no step",
        "parts of another kind",
    ],
)
def test_a_manifest_that_cannot_be_read_is_named_with_the_remedy(
    run: Run, change: Callable[[str], str]
):
    run.publish(0)
    damaged = run.publish(2, parent=0)
    path = run.manifest_path(2)
    path.write_text(change(path.read_text()))
    with pytest.raises(
        CheckpointError, match="the next older complete one: --from-step 0"
    ) as error:
        checkpoint.find(STORE, run.url, None)
    assert str(path) in str(error.value)
    assert checkpoint.go_back(STORE, run.url, 0) == [2]
    assert checkpoint.find(STORE, run.url, None).step == 0
    latest = json.loads(Path(run.url, "checkpoints", "latest.json").read_text())
    assert latest == {"name": "step-00000000"}
    assert collect_orphans(STORE, run.url) == 0, "whose they are, nobody knows"
    assert run.path(damaged, "weights/00000.safetensors").exists()


def test_a_manifest_of_another_version_is_not_taken_for_a_damaged_one(run: Run):
    run.publish(0)
    run.publish(2, parent=0)
    path = run.manifest_path(2)
    path.write_text(edited(format_version=1)(path.read_text()))
    with pytest.raises(CheckpointError, match="has format 1, this code reads 3; use the") as error:
        checkpoint.newest(STORE, run.url)
    assert not isinstance(error.value, checkpoint.DamagedError), "or going back would hide it"


def test_a_manifest_in_the_middle_of_a_run_that_cannot_be_read_stops_nothing_but_history(run: Run):
    run.publish(0)
    run.publish(1, parent=0)
    newest = run.publish(2, parent=1)
    path = run.manifest_path(1)
    path.write_text(path.read_text()[:100])
    assert collect_orphans(STORE, run.url) == 0
    assert checkpoint.find(STORE, run.url, None) == newest
    with pytest.raises(CheckpointError, match=r"step-00000001/COMPLETE\.json .*; restore it: what"):
        checkpoint.lineage(STORE, run.url, newest)


class DyingStore(ObjectStore):
    """Goes away for good after so many changes."""

    changes: int

    def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
        self._change(url)
        return super().write(url, data, only_if_absent=only_if_absent)

    def delete(self, url: str) -> None:
        self._change(url)
        super().delete(url)

    def _change(self, url: str) -> None:
        if not self.changes:
            raise StoreError(f"{url} cannot be changed any more")
        self.changes -= 1


@pytest.mark.parametrize("changes", range(7))
def test_whoever_dies_while_going_back_leaves_no_hole(run: Run, changes: int):
    for step in (0, 2, 4, 6):
        run.publish(step, parent=step - 2 if step else None)
    store = DyingStore()
    store.changes = changes
    with suppress(StoreError):
        checkpoint.go_back(store, run.url, 0)
    left = checkpoint.complete_steps(STORE, run.url)
    assert left == [0, 2, 4, 6][: 4 - changes // 2]
    checkpoint.go_back(STORE, run.url, 0)
    assert checkpoint.complete_steps(STORE, run.url) == [0]


@pytest.mark.parametrize("changes", range(12))
def test_whoever_dies_while_publishing_and_thinning_out_leaves_the_lineage(run: Run, changes: int):
    run.publish(0)
    run.publish(2, 0, progress(0, 1))
    run.publish(4, 2, progress(2, 3))
    store = DyingStore()
    store.changes = changes
    with suppress(StoreError, CheckpointError):
        run.publish(6, 4, progress(4, 5), store=store, keep_last=1)
    manifest = checkpoint.find(STORE, run.url, None)
    trained_on = checkpoint.read_samples(STORE, run.url, manifest)
    assert trained_on == [(n, f"key{n}") for n in range(manifest.step)]


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
    run.publish(0, files={"weights/00000.safetensors": WEIGHTS})
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
    "cluster": "cluster.num_workers=4",
    "data.cache": "data.cache={folder: /scratch, limit_gib: 1}",
    "data.shards": "data.shards=s3://copy/train",
    "data.sources.*.shards": "data.shards=s3://copy/train",
    "data.decode_threads": "data.decode_threads=7",
    "data.prefetch_batches": "data.prefetch_batches=7",
    "engine.attention": "engine.attention=sdpa",
    "engine.backbone": "engine.backbone=partitioned",
    "engine.compile": "engine.compile=frozen",
    "engine.offload_optimizer": "engine.offload_optimizer=true",
    "engine.recompute_activations": "engine.recompute_activations=true",
    "engine.zero_stage": "engine.zero_stage=3",
    "optimizer.decay_images": "optimizer.decay_images=32",
    "store": "store.endpoint_url=http://other:9000",
    "task.backbone.weights": "task.backbone.weights=s3://copy/b.safetensors",
    "train.total_images": "train.total_images=640",
    "train.max_micro_batch": "train.max_micro_batch=4",
    "train.checkpoint_every_images": "train.checkpoint_every_images=32",
    "train.keep_every_images": "train.keep_every_images=64 train.keep_last=2",
    "train.keep_last": "train.keep_last=3",
    "train.if_damaged": "train.if_damaged=go_back",
    "train.publish_deadline_seconds": "train.publish_deadline_seconds=5",
    "train.log_every_steps": "train.log_every_steps=5",
    "wandb": "wandb.project=other",
}
DIFFUSERS = f"task.backbone={{kind: diffusers, folder: models/a, sha256: {'b' * 64}}}"
CHANGES_BESIDE_DIFFUSERS = {
    "data.encoded": "data.encoded=s3://copy/encoded",
    "task.backbone.folder": "task.backbone.folder=s3://copy/a",
}


def resume(
    manifest: Manifest,
    config: RunConfig,
    *,
    index_digest: str = "i" * 64,
    backbone_sha256: str = "b" * 64,
    allow_change: tuple[str, ...] = (),
) -> None:
    check_resumable(
        manifest,
        config,
        index_digest=index_digest,
        backbone_sha256=backbone_sha256,
        allow_change=allow_change,
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
    assert set(MAY_CHANGE) == CHANGES.keys() | CHANGES_BESIDE_DIFFUSERS.keys()


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_that_decides_nothing_about_the_numbers_may_change(manifest: Manifest, key: str):
    overrides = [CHANGES[key]] if "{" in CHANGES[key] else CHANGES[key].split()
    config = make_config(*overrides)
    assert config != make_config()
    resume(manifest, config)
    changed = changed_settings(manifest, config)
    assert any(text.startswith(key.replace("sources.*.", "")) for text in changed)


@pytest.mark.parametrize("key", CHANGES_BESIDE_DIFFUSERS)
def test_where_a_model_of_diffusers_and_its_latents_lie_may_change(manifest: Manifest, key: str):
    before = replace(manifest, config=make_config(DIFFUSERS).model_dump(mode="json"))
    config = make_config(DIFFUSERS, CHANGES_BESIDE_DIFFUSERS[key])
    resume(before, config)
    assert any(text.startswith(key) for text in changed_settings(before, config))


def test_every_setting_that_differs_is_listed_with_both_values(manifest: Manifest):
    config = make_config(
        "seed=3",
        "optimizer.learning_rate=2e-3",
        "task.encoder.channels=[32, 32, 64]",
        "optimizer.clip_norm=null",
        "wandb.mode=offline",
    )
    with pytest.raises(CheckpointError) as error:
        resume(manifest, config, index_digest="j" * 64, backbone_sha256="c" * 64)
    message = str(error.value)
    assert message.startswith("run 'tiny' has a checkpoint at step 2 made with other settings: ")
    assert message.endswith(
        "What is meant can be said (--allow-change optimizer.clip_norm --allow-change "
        "optimizer.learning_rate); restore all others, or give the run another name, or delete its "
        "folder."
    )
    listed = message.split("settings: ")[1].split(". What")[0].split("; ")
    assert listed == [
        f"backbone was '{'b' * 64}', is '{'c' * 64}'",
        "optimizer.clip_norm was 1.0, is null",
        "optimizer.learning_rate was 0.001, is 0.002",
        "seed was 0, is 3",
        "task.encoder.channels was [32, 32, 32], is [32, 32, 64]",
        f"the shard index of {config.data.shards} was '{'i' * 64}', is '{'j' * 64}'",
    ]


def test_a_run_that_lies_in_another_runs_folder_is_told_the_folders_name(manifest: Manifest):
    with pytest.raises(CheckpointError, match="the folder of run 'tiny': give the run its name"):
        resume(manifest, make_config("name=copied", "seed=3"))


def test_a_card_that_says_something_else_is_another_backbone(manifest: Manifest):
    def resume_with(card: str | None) -> None:
        check_resumable(
            replace(manifest, backbone_card_sha256="d" * 64),
            make_config(),
            index_digest="i" * 64,
            backbone_sha256="b" * 64,
            backbone_card_sha256=card,
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
    run.publish(1)
    with pytest.raises(StoreError, match="killed"):
        run.publish(2, store=DiesBeforeTheManifest())
    latest = json.loads(Path(run.url, "checkpoints", "latest.json").read_text())
    assert latest == {"name": checkpoint.checkpoint_name(1)}
    assert checkpoint.find(STORE, run.url, None).step == 1


# --- settings that may differ where the user says so ----------------------------------------------


def test_a_setting_that_changes_what_is_learnt_may_differ_when_it_is_allowed(manifest: Manifest):
    config = make_config("optimizer.learning_rate=2e-3", "task.weight=snr")
    with pytest.raises(CheckpointError, match="say that it is meant") as error:
        resume(manifest, config)
    flags = "(--allow-change optimizer.learning_rate --allow-change task.weight)"
    assert flags in str(error.value)
    resume(manifest, config, allow_change=("optimizer.learning_rate", "task.weight"))
    resume(manifest, config, allow_change=("optimizer", "task.weight"))
    with pytest.raises(CheckpointError, match=r"settings: task\.weight was"):
        resume(manifest, config, allow_change=("optimizer",))


@pytest.mark.parametrize("key", ["seed", "task.encoder", "train.global_batch", "task", "nonsense"])
def test_what_would_make_it_another_run_cannot_be_allowed(manifest: Manifest, key: str):
    with pytest.raises(ValueError, match=rf"--allow-change {key} cannot be .*optimizer"):
        resume(manifest, make_config(), allow_change=(key,))


@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.learning_rate=3"])
def test_what_is_allowed_must_be_a_setting(manifest: Manifest, key: str):
    with pytest.raises(
        ValueError, match=r"no such setting; optimizer has .*optimizer\.learning_rate"
    ):
        resume(manifest, make_config(), allow_change=(key,))


# --- one attempt publishes at a time --------------------------------------------------------------


def test_an_attempt_that_was_replaced_publishes_no_more(run: Run):
    old, new = (
        Publisher(STORE, run.url, ALONE, newest_turn(run.url), deadline_seconds=5, kept_steps=set)
        for _ in range(2)
    )
    old.start(make_manifest(2), [("metrics.jsonl", b"old")])
    assert isinstance(old.settle(wait=True), SupersededError)
    assert checkpoint.complete_steps(STORE, run.url) == []
    new.start(make_manifest(2), [("metrics.jsonl", b"new")])
    manifest = new.settle(wait=True)
    assert isinstance(manifest, Manifest)
    assert checkpoint.read_file(STORE, run.url, manifest, "metrics.jsonl") == b"new"


@pytest.mark.parametrize(
    ("content", "found"), [(None, "missing"), (b"[1]", "damaged"), (b"\xff", "damaged")]
)
def test_whose_turn_it_is_must_be_said(run: Run, content: bytes | None, found: str):
    publisher = Publisher(
        STORE, run.url, ALONE, newest_turn(run.url), deadline_seconds=5, kept_steps=set
    )
    path = Path(run.url, "checkpoints", "attempt.json")
    path.unlink() if content is None else path.write_bytes(content)
    publisher.start(make_manifest(2), [("metrics.jsonl", b"")])
    error = publisher.settle(wait=True)
    assert isinstance(error, SupersededError)
    assert f"attempt.json there is now {found}" in str(error)


def test_an_attempt_whose_orphans_are_collected_publishes_no_more(run: Run):
    old = Publisher(STORE, run.url, ALONE, newest_turn(run.url), deadline_seconds=5, kept_steps=set)
    claim(STORE, run.url)
    old.start(make_manifest(2), [("metrics.jsonl", b"old")])
    assert isinstance(old.settle(wait=True), SupersededError)
    assert collect_orphans(STORE, run.url) == 2
    assert checkpoint.complete_steps(STORE, run.url) == []


def test_a_rank_that_cannot_send_its_own_part_in_time_gives_it_up(run: Run):
    publisher = Publisher(
        STORE, run.url, ALONE, newest_turn(run.url), deadline_seconds=6, kept_steps=set
    )
    large = MemoryFile(17 * 2**20)
    publisher.start(make_manifest(1), [("weights/0", large)])
    assert isinstance(publisher.settle(wait=True), Manifest)
    everyone = psutil.Process().children()
    [child] = [each for each in everyone if "data_pipelines.upload_process" in each.cmdline()]
    child.suspend()
    begun = time.monotonic()
    publisher.start(make_manifest(2), [("weights/0", large)])
    outcome = publisher.settle(wait=True)
    publisher.close()
    assert isinstance(outcome, StoreError)
    assert 5 < time.monotonic() - begun < 12
    assert checkpoint.complete_steps(STORE, run.url) == [1]


class SlowStore(ObjectStore):
    """Takes each object, and its time."""

    def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
        time.sleep(0.2)
        return super().write(url, data, only_if_absent=only_if_absent)


def test_a_rank_whose_many_small_files_take_too_long_gives_its_part_up(run: Run):
    publisher = Publisher(
        SlowStore(), run.url, ALONE, newest_turn(run.url), deadline_seconds=0.5, kept_steps=set
    )
    publisher.start(make_manifest(1), [(f"weights/{n}", b"small") for n in range(30)])
    outcome = publisher.settle(wait=True)
    assert "rank 0's part had not arrived" in str(outcome)
    assert len(list(Path(run.url).rglob("weights/*"))) < 10, "the rest was not even tried"


def test_a_rank_that_waits_for_the_last_checkpoint_meets_the_others_meanwhile(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    """Who stays away from a collective for longer than its time limit ends the group."""
    met: list[object] = []

    def meet(value: object) -> object:
        met.append(value)
        return from_first_rank(value)

    monkeypatch.setattr(publisher_module, "from_first_rank", meet)
    monkeypatch.setattr(publisher_module, "_TURN_SECONDS", 0.2)
    publisher = Publisher(
        SlowStore(), run.url, ALONE, newest_turn(run.url), deadline_seconds=9, kept_steps=set
    )
    publisher.start(make_manifest(1), [(f"weights/{n}", b"small") for n in range(8)])
    assert isinstance(publisher.settle(wait=True), Manifest)
    assert len(met) >= 5
    assert met[:-1] == [None] * (len(met) - 1)


def test_what_an_earlier_attempt_has_published_late_is_replaced(run: Run):
    late = Publisher(
        STORE, run.url, ALONE, newest_turn(run.url), deadline_seconds=5, kept_steps=set
    )
    late.start(make_manifest(2), [("metrics.jsonl", b"late")])
    assert isinstance(late.settle(wait=True), Manifest)
    newest = Publisher(
        STORE, run.url, ALONE, newest_turn(run.url), deadline_seconds=5, kept_steps=set
    )
    newest.start(make_manifest(2), [("metrics.jsonl", b"newest")])
    assert isinstance(newest.settle(wait=True), Manifest)
    kept = checkpoint.read_manifest(STORE, run.url, 2)
    assert checkpoint.read_file(STORE, run.url, kept, "metrics.jsonl") == b"newest"


def test_a_launch_that_was_taken_over_cannot_take_its_turn_back(run: Run):
    older = claim(STORE, run.url)
    enter(STORE, run.url, older)
    newer = newest_turn(run.url)
    with pytest.raises(SupersededError, match="another attempt of the run"):
        enter(STORE, run.url, older)
    newer.check(STORE, run.url)


def test_a_group_of_the_same_launch_ends_the_one_before(run: Run):
    launch = claim(STORE, run.url)
    before, after = (enter(STORE, run.url, launch) for _ in range(2))
    after.check(STORE, run.url)
    with pytest.raises(SupersededError, match=r"attempt-[0-9a-f]{8}\.json there is now"):
        before.check(STORE, run.url)


class TakenOverStore(ObjectStore):
    """A newer launch claims the run, and removes orphans, while a manifest is being written."""

    def write(self, url: str, data: bytes, *, only_if_absent: bool = False) -> ObjectInfo:
        if url.endswith("COMPLETE.json"):
            run_url = url.partition("/checkpoints/")[0]
            claim(STORE, run_url)
            assert collect_orphans(STORE, run_url) == 2
        return super().write(url, data, only_if_absent=only_if_absent)


def test_a_manifest_that_lands_behind_a_newer_launch_is_withdrawn(run: Run):
    publisher = Publisher(
        TakenOverStore(), run.url, ALONE, newest_turn(run.url), deadline_seconds=5, kept_steps=set
    )
    publisher.start(make_manifest(2), [("metrics.jsonl", b"")])
    assert isinstance(publisher.settle(wait=True), SupersededError)
    assert checkpoint.complete_steps(STORE, run.url) == []


def test_an_unreadable_old_checkpoint_keeps_no_other_from_being_thinned_out(run: Run):
    for step in (0, 2, 4):
        run.publish(step)
    run.manifest_path(2).write_bytes(b"{")
    run.publish(6, keep_last=1)
    assert checkpoint.complete_steps(STORE, run.url) == [0, 2, 6]


def test_a_part_that_does_not_arrive_is_named_after_the_deadline(run: Run):
    two = World(0, 2, torch.device("cpu"))
    publisher = Publisher(
        STORE, run.url, two, newest_turn(run.url), deadline_seconds=0.3, kept_steps=set
    )
    publisher.start(make_manifest(2), [])
    assert publisher.settle(wait=False) is None
    outcome = publisher.settle(wait=True)
    assert isinstance(outcome, CheckpointError)
    assert "files-00001.json had not arrived" in str(outcome)
    assert publisher.settle(wait=True) is None, "said once"
    assert checkpoint.complete_steps(STORE, run.url) == []


# --- which checkpoints stay -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "every", "kept"),
    [
        (None, None, {0, 2, 4, 6, 8}),
        (1, None, {0, 8}),
        (2, None, {0, 6, 8}),
        (1, 4, {0, 4, 8}),
        (9, None, {0, 2, 4, 6, 8}),
    ],
)
def test_the_newest_stay_and_every_so_many_and_always_the_untrained_one(keep_last, every, kept):
    steps = [0, 2, 4, 6, 8]
    assert kept_steps(steps, keep_last=keep_last, keep_every_steps=every) == kept


def test_of_a_checkpoint_that_is_not_kept_the_history_stays(run: Run):
    for parent, step in ((None, 0), (0, 2), (2, 4), (4, 6)):
        files = {"weights/00000.safetensors": WEIGHTS, **progress(step, step + 1)}
        run.publish(step, parent, files, keep_last=1)
    assert checkpoint.complete_steps(STORE, run.url) == [0, 6]
    weights = [info.url for info in STORE.list(run.url) if "/weights/" in info.url]
    assert [url.split("/step-")[1][:8] for url in weights] == ["00000000", "00000006"]
    newest = checkpoint.find(STORE, run.url, None)
    assert [manifest.step for manifest in checkpoint.lineage(STORE, run.url, newest)] == [
        0,
        2,
        4,
        6,
    ]
    assert len(checkpoint.read_metrics(STORE, run.url, newest)) == 8
    assert collect_orphans(STORE, run.url) == 0, "nothing of it is an orphan"


def test_orphans_are_what_no_manifest_names(run: Run):
    run.publish(0)
    with pytest.raises(StoreError):
        run.publish(2, parent=0, store=DiesBeforeTheManifest())
    kept = run.publish(2, parent=0)
    with pytest.raises(StoreError):
        run.publish(4, parent=2, store=DiesBeforeTheManifest())
    removed = collect_orphans(STORE, run.url)
    assert removed == 4, "weights and listing of two attempts"
    left = {info.url.removeprefix(run.url) for info in STORE.list(run.url)}
    assert not any("step-00000004" in name for name in left)
    assert sum(kept.parts in name for name in left) == 2
    assert checkpoint.complete_steps(STORE, run.url) == [0, 2]


def test_a_checkpoint_thinned_out_only_in_part_loses_the_rest_of_its_state(run: Run):
    files = {"weights/00000.safetensors": WEIGHTS, "metrics.jsonl": b""}
    manifest = run.publish(2, files=files)
    folder = run.manifest_path(2).parent
    run.manifest_path(2).rename(folder / checkpoint.HISTORY_NAME)  # killed before the weights went
    assert collect_orphans(STORE, run.url) == 1
    assert run.path(manifest, "metrics.jsonl").exists()
    assert not run.path(manifest, "weights/00000.safetensors").exists()


def test_going_back_sets_later_checkpoints_aside_and_keeps_their_files(run: Run):
    for parent, step in ((None, 0), (0, 2), (2, 4), (4, 6)):
        run.publish(step, parent)
    assert checkpoint.go_back(STORE, run.url, 2) == [4, 6]
    assert checkpoint.complete_steps(STORE, run.url) == [0, 2]
    before = len(STORE.list(run.url))
    assert collect_orphans(STORE, run.url) == 0
    again = run.publish(4, parent=2)
    assert checkpoint.find(STORE, run.url, None) == again
    assert len(STORE.list(run.url)) == before + 4, "manifest, weights, listing, turn"
    with pytest.raises(CheckpointError, match="no complete checkpoint at step 6"):
        checkpoint.go_back(STORE, run.url, 6)


def test_a_step_whose_manifest_is_damaged_loses_nothing_to_the_collection(run: Run):
    run.publish(2)
    whole = run.manifest_path(2).read_text()
    there = [info.url for info in STORE.list(run.url)]
    for damaged in ("{", whole.replace('"parts": "parts', '"parts": "qarts')):
        run.manifest_path(2).write_text(damaged)
        assert collect_orphans(STORE, run.url) == 0
        assert [info.url for info in STORE.list(run.url)] == there
