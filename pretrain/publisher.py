"""The commit protocol: how a checkpoint comes to exist, beside the training that goes on.

Every rank writes its files below a prefix of this attempt, from a thread of its own, and then a
listing of them. Rank 0 waits for all listings, compares them with what the store has, and writes
COMPLETE.json last. Nothing here communicates but through the store, so no collective runs beside
those of training. Only one checkpoint is on its way at a time.

Who publishes is fenced (`pretrain.fence`): rank 0 looks before each manifest whether it is its turn
still. What another attempt has put there by then came late, and is replaced.
"""

import hashlib
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from data_pipelines.object_store import ObjectStore, StoreError, join
from data_pipelines.upload_process import MemoryFile, UploadProcess
from pretrain.checkpoint import (
    HISTORY_NAME,
    MANIFEST_NAME,
    CheckpointError,
    Manifest,
    checkpoints_url,
    complete_steps,
    manifest_at,
    parts_url,
    point_to,
    read_manifest,
    to_json,
)
from pretrain.fence import Fence, SupersededError
from pretrain.pieces import KINDS
from pretrain.world import World, from_first_rank

File = tuple[str, bytes | MemoryFile]
"""Name below the parts, and what is in it."""
_LARGE_BYTES = 16 * 2**20  # worth a process of its own
_POLL_SECONDS = 0.2
_TURN_SECONDS = 5.0  # far below any time limit of a collective
_LINGER_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Publisher:
    """Publishes a run's checkpoints, one at a time. Made on every rank; see each method.

    Args:
        deadline_seconds: after which a checkpoint whose parts have not arrived is given up.
        kept_steps: from the steps of complete checkpoints to those that are kept whole.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_url: str,
        world: World,
        fence: Fence,
        *,
        deadline_seconds: float,
        kept_steps: Callable[[Sequence[int]], set[int]],
    ) -> None:
        self._store, self._run_url, self._world, self._fence = store, run_url, world, fence
        self._deadline_seconds, self._kept_steps = deadline_seconds, kept_steps
        self._uploads = UploadProcess(store)
        self._thread: threading.Thread | None = None
        self._outcome: Manifest | Exception | None = None

    def start(self, manifest: Manifest, files: Iterable[File]) -> None:
        """Begin to publish; returns at once. Call it on every rank, after `settle`.

        Args:
            manifest: without files and parts.
            files: this rank's; each is forgotten once it is in the store.
        """
        assert self._thread is None, "the one before must be settled first"
        parts = f"parts-{self._fence.group[:8]}-{manifest.step}"
        self._outcome = None
        self._thread = threading.Thread(
            target=self._work, args=(replace(manifest, parts=parts), list(files)), name="publish"
        )
        self._thread.daemon = True
        self._thread.start()

    def settle(self, *, wait: bool) -> Manifest | Exception | None:
        """Collective: what became of the checkpoint that was started last.

        Returns:
            Its manifest once it is complete, or why it is not; None while it is on its way (only
            without `wait`), and when there is none. The same on every rank, and only once.
        """
        if self._thread is None:
            return None
        outcome = None
        while outcome is None:
            if wait:  # in turns: a rank that waited in a collective meanwhile would be given up
                self._thread.join(_TURN_SECONDS)
            outcome = from_first_rank(None if self._thread.is_alive() else self._outcome)
            if outcome is None and not wait:
                return None
        self._thread.join()  # other ranks' uploads: they end by the store's deadline
        self._thread = None
        assert isinstance(outcome, Manifest | Exception)
        return outcome

    def close(self) -> None:
        """Wait a moment for this rank's part of what is on its way, and end; not collective."""
        if self._thread is not None:
            self._thread.join(_LINGER_SECONDS)
        self._uploads.close()

    # --- in the thread --------------------------------------------------------------------------

    def _work(self, manifest: Manifest, files: list[File]) -> None:
        try:
            until = time.monotonic() + self._deadline_seconds
            self._upload(manifest, files, until)
            if self._world.is_first:
                manifest = replace(manifest, files=self._everything(manifest, until))
                self._commit(manifest)
                self._outcome = manifest
                self._thin_out()
        except Exception as error:  # noqa: BLE001 (handed to the training thread by `settle`)
            if not self._world.is_first:
                _log.warning("rank %d's part of %s: %s", self._world.rank, manifest.name, error)
            elif self._outcome is None:
                self._outcome = _plain(error)
            else:
                _log.warning("old checkpoints could not be thinned out: %s", error)

    def _upload(self, manifest: Manifest, files: list[File], until: float) -> None:
        where = parts_url(self._run_url, manifest)
        listing = {}
        while files:
            name, content = files.pop(0)  # and with it, what was uploaded before is forgotten
            listing[name] = self._send(content, join(where, name), until)
            if time.monotonic() > until:
                raise self._late(manifest, f"rank {self._world.rank}'s part")
        self._store.write(join(where, _listing_name(self._world.rank)), to_json(listing))

    def _late(self, manifest: Manifest, what: str) -> CheckpointError:
        return CheckpointError(
            f"{manifest.name} is not published: {what} had not arrived below "
            f"{parts_url(self._run_url, manifest)} after {self._deadline_seconds:g} s "
            f"(train.publish_deadline_seconds)"
        )

    def _send(self, content: bytes | MemoryFile, url: str, until: float) -> tuple[int, str]:
        """Size and SHA-256 of what is in the store now."""
        if isinstance(content, MemoryFile):
            if len(content.bytes) > _LARGE_BYTES:
                left = max(0.0, until - time.monotonic())
                digest = self._uploads.upload(content, url, deadline_seconds=left)
                return len(content.bytes), digest
            content = bytes(content.bytes)
        self._store.write(url, content)
        return len(content), hashlib.sha256(content).hexdigest()

    def _everything(self, manifest: Manifest, until: float) -> dict[str, tuple[int, str]]:
        """Every rank's files, once they are in the store as they were sent."""
        where = parts_url(self._run_url, manifest)
        wanted = {join(where, _listing_name(rank)) for rank in range(self._world.size)}
        while wanted - (there := {i.url: i.size_bytes for i in self._store.list(where)}).keys():
            if time.monotonic() > until:
                late = sorted(url.rpartition("/")[2] for url in wanted - there.keys())
                raise self._late(manifest, ", ".join(late))
            time.sleep(_POLL_SECONDS)
        files: dict[str, tuple[int, str]] = {}
        for url in sorted(wanted):
            listing = json.loads(self._store.read(url))
            files |= {name: (int(size), str(digest)) for name, (size, digest) in listing.items()}
        for name, (size, _) in files.items():
            if there.get(join(where, name)) != size:
                raise CheckpointError(
                    f"{manifest.name} is not published: {join(where, name)} has "
                    f"{there.get(join(where, name), 'no')} bytes in the store, {size} were sent"
                )
        return files

    def _commit(self, manifest: Manifest) -> None:
        self._fence.check(self._store, self._run_url)
        where = join(checkpoints_url(self._run_url), manifest.name, MANIFEST_NAME)
        self._store.write(where, to_json(manifest))
        if not self._fence.launch_is_newest(self._store, self._run_url):
            # Claimed between the look and the write: its orphans, these parts, may be gone.
            self._store.delete(where)
            self._fence.check(self._store, self._run_url)
        point_to(self._store, self._run_url, manifest.step)

    # --- what is not kept -----------------------------------------------------------------------

    def _thin_out(self) -> None:
        """Of complete checkpoints that are not kept, leave the lineage only."""
        steps = complete_steps(self._store, self._run_url)
        for step in sorted(set(steps) - self._kept_steps(steps)):
            try:
                manifest = read_manifest(self._store, self._run_url, step)
            except CheckpointError as error:
                _log.warning("%s; it stays as it is", error)
                continue
            folder = join(checkpoints_url(self._run_url), manifest.name)
            self._store.write(join(folder, HISTORY_NAME), to_json(manifest))
            self._store.delete(join(folder, MANIFEST_NAME))
            for kind in KINDS:
                self._store.delete_prefix(join(parts_url(self._run_url, manifest), kind))


def collect_orphans(store: ObjectStore, run_url: str) -> int:
    """Remove what belongs to no checkpoint: parts of attempts that did not get to their manifest,
    and the state in those that only have a history. Returns the number of objects.

    An earlier attempt that still publishes would lose what it is about to commit: `claim` first.
    """
    of_step: dict[str, list[str]] = defaultdict(list)
    base = checkpoints_url(run_url)
    for info in store.list(base):
        name, mark, below = info.url.removeprefix(base + "/").partition("/")
        if mark and name.startswith("step-"):
            of_step[name].append(below)
    removed = 0
    for name, entries in of_step.items():
        manifests = [entry for entry in entries if "/" not in entry and entry.endswith(".json")]
        try:
            parts = {e: manifest_at(store, join(base, name, e)).parts for e in manifests}
        except CheckpointError as error:
            _log.warning("%s; everything below %s stays", error, join(base, name))
            continue  # its parts would be taken for orphans
        for below in _orphans(entries, parts):
            store.delete(join(base, name, below))
            removed += 1
    return removed


def _orphans(entries: Sequence[str], parts_of: Mapping[str, str]) -> list[str]:
    """Of a step's objects those that no manifest needs; `parts_of`: the parts that each names."""
    whole = {parts for entry, parts in parts_of.items() if entry != HISTORY_NAME}
    orphans = []
    for entry in entries:
        parts, mark, below = entry.partition("/")
        is_state = below.partition("/")[0] in KINDS
        if mark and parts not in (whole if is_state else parts_of.values()):
            orphans.append(entry)
    return orphans


def kept_steps(
    steps: Sequence[int], *, keep_last: int | None, keep_every_steps: int | None
) -> set[int]:
    """Which complete checkpoints stay whole: the newest, every so many, and always step 0."""
    if keep_last is None:
        return set(steps)
    kept = set(steps[-keep_last:]) | {0}
    if keep_every_steps is not None:
        kept |= {step for step in steps if step % keep_every_steps == 0}
    return kept & set(steps)


def _listing_name(rank: int) -> str:
    return f"files-{rank:05d}.json"


def _plain(error: Exception) -> Exception:
    """The error as it can be sent to other ranks."""
    if isinstance(error, CheckpointError | StoreError | SupersededError):
        return type(error)(str(error))
    return CheckpointError(f"publishing failed: {type(error).__name__}: {error}")
