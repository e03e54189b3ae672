"""What a run keeps: its state, published to the run's folder. See `restore` for the way back."""

import logging
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Self

from safetensors.torch import save as save_safetensors

from configs.loading import dump_run
from configs.schema import RunConfig
from data_pipelines.bad_samples import DEAD_LETTERS, to_json_lines
from data_pipelines.object_store import ObjectStore, StoreError, join
from data_pipelines.sample_stream import Batch
from data_pipelines.shard_index import ShardIndex
from pretrain import checkpoint
from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.error_budget import ErrorBudget
from pretrain.fence import Fence, SupersededError
from pretrain.frozen import Frozen
from pretrain.journal import Journal
from pretrain.metrics import MetricsLog
from pretrain.pieces import KINDS, pack, tensors_of
from pretrain.preflight import run_url
from pretrain.publisher import File, Publisher, kept_steps
from pretrain.run_plan import RunPlan
from pretrain.sentinels import Fault
from pretrain.world import World

FAULTS = "faults"
_log = logging.getLogger(__name__)


class Saver:
    """Publishes to the run's folder; collective where it says so.

    A checkpoint is published while training goes on. What happened since the newest complete one
    (samples, metrics) goes with the next, until one of them is complete.
    """

    def __init__(
        self,
        config: RunConfig,
        store: ObjectStore,
        world: World,
        plan: RunPlan,
        index: ShardIndex,
        backbone: Frozen | None,
        newest: checkpoint.Manifest | None,
        fence: Fence,
    ) -> None:
        self.config = config
        self.store = store
        self.world = world
        self.index_digest = index.digest
        self.backbone_sha256 = backbone and backbone.sha256
        self.backbone_card_sha256 = backbone and backbone.card_sha256
        self.newest = newest
        self.run_url = run_url(config)
        self._samples = Journal()
        self._failure: Exception | None = None
        self._publisher = Publisher(
            store,
            self.run_url,
            world,
            fence,
            deadline_seconds=config.train.publish_deadline_seconds,
            kept_steps=partial(
                kept_steps,
                keep_last=config.train.keep_last,
                keep_every_steps=plan.keep_every_steps,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """However the run ends: a checkpoint that is nearly there is given a moment."""
        self._publisher.close()

    @property
    def newest_step(self) -> int:
        return self.newest.step if self.newest else 0

    def note(self, batch: Batch) -> None:
        """A batch that is being trained on."""
        self._samples.add(
            f"{position}\t{key}"
            for position, key in zip(batch.positions.tolist(), batch.keys, strict=True)
        )

    def publish(
        self, step: int, engine: Engine, ema: Ema, metrics: MetricsLog, budget: ErrorBudget
    ) -> None:
        """Collective: begin to publish the state after `step` steps; the one before ends first."""
        self.settle(metrics, wait=True)
        engine.average_buffers()
        manifest = checkpoint.Manifest(
            step=step,
            images=step * self.config.train.global_batch,
            parent=self.newest.name if self.newest else None,
            parts="",
            config=self.config.model_dump(mode="json"),
            index_digest=self.index_digest,
            backbone_sha256=self.backbone_sha256,
            backbone_card_sha256=self.backbone_card_sha256,
            world_size=self.world.size,
            code_version=version("diti-pretrain"),
            shapes=engine.shapes,
            counters=engine.counters(),
            files={},
            bad_samples=dict(budget.counts),
        )
        self._publisher.start(manifest, self._files(step, engine, ema, metrics, budget))

    def settle(self, metrics: MetricsLog, *, wait: bool) -> None:
        """Collective: learn what became of the checkpoint that is on its way.

        One that could not be published is said, and the run goes on; but see `finish`.

        Raises:
            SupersededError: another attempt of this run has started.
        """
        match self._publisher.settle(wait=wait):
            case checkpoint.Manifest() as manifest:
                self.newest = manifest
                self._samples.forget_taken()
                metrics.journal.forget_taken()
            case SupersededError() as error:
                raise error
            case Exception() as error:
                if self.world.is_first:
                    _log.warning("%s; the run goes on, the next checkpoint has it all", error)
                self._failure = error
            case None:
                pass

    def finish(self, metrics: MetricsLog) -> checkpoint.Manifest:
        """Collective: wait for the last checkpoint.

        Raises:
            CheckpointError: it could not be published.
        """
        self._failure = None
        self.settle(metrics, wait=True)
        if self._failure is not None or self.newest is None:
            raise checkpoint.CheckpointError(f"the last checkpoint failed: {self._failure}")
        return self.newest

    def _files(
        self, step: int, engine: Engine, ema: Ema, metrics: MetricsLog, budget: ErrorBudget
    ) -> Iterator[File]:
        """This rank's, as they are now: training goes on changing what they are made of."""
        rank = self.world.rank
        saved = engine.saves
        places = [engine.pieces[number].place for number in saved]
        for kind in KINDS:
            live = tensors_of(kind, engine.pieces, ema.tensors)
            packed = pack(places, [live[number] for number in saved])
            yield checkpoint.piece_file(kind, rank), packed
        yield f"samples-{rank:05d}.tsv", self._samples.take().encode()
        if self.world.is_first:
            yield checkpoint.METRICS_NAME, metrics.journal.take().encode()
            yield checkpoint.RUN_NAME, dump_run(self.config).encode()
            if engine.buffers:
                yield checkpoint.BUFFERS_NAME, save_safetensors(dict(engine.buffers))
        self.write_dead_letters(step, budget)

    def write_dead_letters(self, step: int, budget: ErrorBudget) -> None:
        """Object stores cannot append: one object per rank and checkpoint. What cannot be written
        goes with the next."""
        letters = budget.take_unwritten()
        if not letters:
            return
        name = f"step-{step:08d}-rank-{self.world.rank:05d}.jsonl"
        where = join(self.run_url, DEAD_LETTERS, name)
        try:
            self.store.write(where, to_json_lines(letters).encode())
        except StoreError as error:
            _log.warning("%s; the dead letters go with the next checkpoint's", error)
            budget.put_back(letters)

    @property
    def faults_url(self) -> str:
        return join(self.run_url, FAULTS)

    def write_fault(self, fault: Fault) -> None:
        """The samples of a step that came to no finite number."""
        name = f"step-{fault.taken.step:08d}-rank-{fault.rank:05d}.json"
        try:
            self.store.write(join(self.faults_url, name), fault.to_json())
        except StoreError as error:  # what went wrong before it must still be told
            _log.warning("the samples of the fault are not kept: %s", error)
