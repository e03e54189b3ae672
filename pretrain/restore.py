"""A checkpoint's state back into engine and average."""

from collections.abc import Sequence

from safetensors import SafetensorError

from configs.schema import RunConfig
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import ShardIndex
from pretrain import checkpoint
from pretrain.backbone import state_problems
from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.frozen import Frozen
from pretrain.pieces import KINDS, PiecesError, fill_pieces, tensors_of
from pretrain.preflight import run_url
from pretrain.resumable import check_resumable


def restore(
    manifest: checkpoint.Manifest,
    store: ObjectStore,
    config: RunConfig,
    index: ShardIndex,
    backbone: Frozen | None,
    engine: Engine,
    ema: Ema,
    *,
    rank: int,
    allow_change: Sequence[str] = (),
) -> None:
    """Load it, whatever the world size and ZeRO stage it was written at; collective.

    Raises:
        CheckpointError: it is damaged, or of another run.
    """
    check_resumable(
        manifest,
        config,
        index_digest=index.digest,
        backbone_sha256=backbone and backbone.sha256,
        backbone_card_sha256=backbone and backbone.card_sha256,
        allow_change=allow_change,
    )
    where = run_url(config)
    if problems := state_problems(manifest.shapes, engine.shapes):
        raise checkpoint.CheckpointError(
            f"checkpoint {manifest.name} of {where} holds other tensors than this model: {problems}"
        )
    try:
        for kind in KINDS:
            files = checkpoint.read_pieces(store, where, manifest, kind, first=rank)
            fill_pieces(engine.pieces, tensors_of(kind, engine.pieces, ema.tensors), files)
    except (PiecesError, SafetensorError) as error:
        raise checkpoint.DamagedError(
            f"checkpoint {manifest.name} of {where} cannot be used: {error}; "
            f"{checkpoint.instead(store, where, manifest.step)}"
        ) from error
    for name, buffer in checkpoint.read_buffers(store, where, manifest).items():
        engine.buffers[name].copy_(buffer)
    engine.restore(manifest.counters)
