"""What a run keeps: its state restored from, and published to, the run's folder."""

import shutil
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from configs.loading import dump_run
from configs.schema import RunConfig
from data_pipelines.bad_samples import DEAD_LETTERS, DeadLetter, to_json_lines
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.sample_stream import Batch
from data_pipelines.shard_index import ShardIndex
from pretrain import checkpoint
from pretrain.backbone import Backbone
from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.error_budget import ErrorBudget
from pretrain.metrics import MetricsLog
from pretrain.preflight import run_url
from pretrain.world import World


class Saver:
    """Restores from and publishes to the run's folder."""

    def __init__(
        self,
        config: RunConfig,
        store: ObjectStore,
        world: World,
        index: ShardIndex,
        backbone: Backbone | None,
        local_dir: Path,
        newest: checkpoint.Manifest | None,
    ) -> None:
        self.config = config
        self.store = store
        self.world = world
        self.index_digest = index.digest
        self.backbone_sha256 = backbone and backbone.sha256
        self.backbone_card_sha256 = backbone and backbone.card_sha256
        self.scratch = local_dir / "scratch" / f"rank-{world.rank:05d}"
        self.newest = newest

    @property
    def newest_step(self) -> int:
        return self.newest.step if self.newest else 0

    def restore(self, engine: Engine, ema: Ema) -> int:
        """Load the newest complete checkpoint; returns its step, 0 where there is none."""
        url, manifest = run_url(self.config), self.newest
        if manifest is None:
            return 0
        checkpoint.check_resumable(
            manifest,
            self.config,
            index_digest=self.index_digest,
            backbone_sha256=self.backbone_sha256,
            backbone_card_sha256=self.backbone_card_sha256,
            world_size=self.world.size,
        )
        folder = self._empty_scratch()
        checkpoint.fetch(self.store, url, manifest, folder, below="zero/")
        engine.load(folder)
        average = load_safetensors(
            checkpoint.read_file(self.store, url, manifest, checkpoint.EMA_NAME)
        )
        expected = engine.trainable.keys() | engine.buffers.keys()
        if average.keys() != expected:
            raise checkpoint.CheckpointError(
                f"checkpoint {manifest.name} of {url} holds other tensors than this model: "
                f"{sorted(average.keys() ^ expected)[:5]}"
            )
        for name, piece in zip(engine.trainable, ema.shards, strict=True):
            piece.copy_(engine.shard_of(average[name], like=piece))
        return manifest.step

    def publish(
        self,
        step: int,
        engine: Engine,
        ema: Ema,
        metrics: MetricsLog,
        budget: ErrorBudget,
        seen: list[Batch],
    ) -> None:
        """Collective: write the state after `step` steps as a complete checkpoint."""
        folder = self._empty_scratch()
        engine.average_buffers()
        self._save_engine(engine, folder)
        weights = engine.whole_state()
        ema.swap(engine.local_shards())
        average = engine.whole_state()
        ema.swap(engine.local_shards())
        (folder / f"samples-{self.world.rank:05d}.tsv").write_text(_sample_lines(seen))
        if self.world.is_first:
            save_file(weights, folder / checkpoint.WEIGHTS_NAME)
            save_file(average, folder / checkpoint.EMA_NAME)
            metrics.write_to(folder)
            (folder / "run.yaml").write_text(dump_run(self.config))
        self.write_dead_letters(step, budget.take_unwritten())
        parent = self.newest.name if self.newest else None

        def manifest(parts: str, files: dict[str, tuple[int, str]]) -> checkpoint.Manifest:
            return checkpoint.Manifest(
                step=step,
                images=step * self.config.train.global_batch,
                parent=parent,
                parts=parts,
                config=self.config.model_dump(mode="json"),
                index_digest=self.index_digest,
                backbone_sha256=self.backbone_sha256,
                backbone_card_sha256=self.backbone_card_sha256,
                world_size=self.world.size,
                code_version=version("diti-pretrain"),
                files=files,
                bad_samples=dict(budget.counts),
            )

        self.newest = checkpoint.publish(
            self.store, run_url(self.config), folder, self.world, manifest
        )
        shutil.rmtree(folder)

    def _save_engine(self, engine: Engine, folder: Path) -> None:
        try:
            engine.save(folder)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # how torch says that a file was not written
                raise
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(
                f"the checkpoint could not be written to the scratch folder {folder}, whose disk "
                f"has {free:.0f} MiB left; free space there or give another --local-dir"
            ) from error

    def write_dead_letters(self, step: int, letters: list[DeadLetter]) -> None:
        """Object stores cannot append: one object per rank and checkpoint."""
        if letters:
            name = f"step-{step:08d}-rank-{self.world.rank:05d}.jsonl"
            where = join(run_url(self.config), DEAD_LETTERS, name)
            self.store.write(where, to_json_lines(letters).encode())

    def _empty_scratch(self) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        return self.scratch


def _sample_lines(seen: list[Batch]) -> str:
    """`position<TAB>key` of every sample trained on since the last checkpoint."""
    return "".join(
        f"{position}\t{key}\n"
        for batch in seen
        for position, key in zip(batch.positions.tolist(), batch.keys, strict=True)
    )
