"""Whether a run may go on from a checkpoint: which settings may differ, and which must not."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from configs.schema import RunConfig
from pretrain.checkpoint import CheckpointError, Manifest, run_of

MAY_CHANGE = (
    "output",
    "cluster",
    "data.cache",
    "data.decode_threads",
    "data.encoded",
    "data.prefetch_batches",
    "data.shards",
    "data.sources.*.shards",
    "engine.attention",
    "engine.backbone",
    "engine.compile",
    "engine.offload_optimizer",
    "engine.recompute_activations",
    "engine.zero_stage",
    "optimizer.decay_images",
    "store",
    "task.backbone.folder",
    "task.backbone.weights",
    "train.total_images",
    "train.max_micro_batch",
    "train.checkpoint_every_images",
    "train.if_damaged",
    "train.keep_every_images",
    "train.keep_last",
    "train.log_every_steps",
    "train.publish_deadline_seconds",
    "wandb",
)
"""Settings that may differ on resume; what they point to is compared by digest where it matters."""
MAY_BE_ALLOWED = (
    "data.crop",
    "data.error_budget",
    "data.horizontal_flip",
    "engine.precision",
    "optimizer",
    "task.mode",
    "task.min_snr_cap",
    "task.snr_gamma",
    "task.start_from",
    "task.timesteps",
    "task.weight",
    "train.ema_decay",
)
"""Settings that change what is learnt, but neither tensors nor the order of samples: they may
differ where the user says so, one by one. All others make it another run."""


def check_resumable(
    manifest: Manifest,
    config: RunConfig,
    *,
    index_digest: str,
    backbone_sha256: str | None,
    backbone_card_sha256: str | None = None,
    allow_change: Sequence[str] = (),
) -> None:
    """Refuse to go on from a checkpoint of another run.

    Args:
        allow_change: settings out of MAY_BE_ALLOWED that are meant to differ.

    Raises:
        CheckpointError: listing every setting that differs and both its values, or those that the
            checkpoint has and this version does not know.
        ValueError: `allow_change` names what may not be allowed.
    """
    check_allowed(allow_change)
    _refuse_unknown(allow_change, config)
    card_then = manifest.backbone_card_sha256 or backbone_card_sha256
    settings = {
        key: text
        for key, text in _differences(manifest, config).items()
        if not _is_one_of(key, (*MAY_CHANGE, *allow_change))
    }
    different = [
        *settings.values(),
        *_different(
            f"the shard index of {' and '.join(config.data.folders)}",
            manifest.index_digest,
            index_digest,
        ),
        *_different("backbone", manifest.backbone_sha256, backbone_sha256),
        *_different("backbone's card", card_then, backbone_card_sha256),
    ]
    if different:
        raise CheckpointError(
            f"run {config.name!r} has a checkpoint at step {manifest.step} made with other "
            f"settings: {'; '.join(sorted(different))}. "
            f"{_remedy(manifest, list(settings), len(different))}"
        )


def _remedy(manifest: Manifest, settings: Sequence[str], num_different: int) -> str:
    """What to do about settings that differ, and about other things than settings."""
    if "name" in settings:
        return f"This is the folder of run {manifest.config['name']!r}: give the run its name back."
    allowed = [key for key in settings if _is_one_of(key, MAY_BE_ALLOWED)]
    otherwise = "give the run another name, or delete its folder"
    if manifest.step == 0:
        otherwise += " (it is not trained yet)"
    if not allowed:
        return f"Restore them, {otherwise}."
    if len(allowed) == num_different:
        return f"Restore them, say that it is meant ({_flags(allowed)}), {otherwise}."
    return f"What is meant can be said ({_flags(allowed)}); restore all others, or {otherwise}."


def check_allowed(allow_change: Sequence[str]) -> None:
    """Raises ValueError for a setting that `--allow-change` cannot allow."""
    for key in allow_change:
        if not _is_one_of(key, MAY_BE_ALLOWED):
            raise ValueError(
                f"--allow-change {key} cannot be allowed: {_why_not(key)}. What can be allowed, "
                f"with all below it: {', '.join(MAY_BE_ALLOWED)}"
            )


def _refuse_unknown(allow_change: Sequence[str], config: RunConfig) -> None:
    """Raises ValueError for a key below an allowed section that names nothing there."""
    names = list(_flat(config.model_dump(mode="json")))
    for key in allow_change:
        if not any(_is_one_of(name, (key,)) for name in names):
            section = key.partition(".")[0]
            beside = [name for name in names if name.partition(".")[0] == section]
            raise ValueError(
                f"--allow-change {key}: there is no such setting; {section} has {', '.join(beside)}"
            )


def _why_not(key: str) -> str:
    if _is_one_of(key, MAY_CHANGE):
        return "it may change without being allowed to"
    if close := get_close_matches(key, MAY_BE_ALLOWED, 1):
        return f"did you mean {close[0]}"
    return "there is no such setting, or with another value it is another run"


def changed_settings(manifest: Manifest, config: RunConfig) -> list[str]:
    """Settings that are no longer what they were, each with both its values."""
    return list(_differences(manifest, config).values())


def _flags(keys: Sequence[str]) -> str:
    return " ".join(f"--allow-change {key}" for key in keys)


def _differences(manifest: Manifest, config: RunConfig) -> dict[str, str]:
    """By setting, what it was and what it is."""
    before = _flat(run_of(manifest).model_dump(mode="json"))  # with defaults of newer settings
    now = _flat(config.model_dump(mode="json"))
    return {
        key: text
        for key in sorted(before.keys() | now.keys())
        for text in _different(key, before.get(key), now.get(key))
    }


def _different(what: str, before: Any, now: Any) -> list[str]:
    """Values as they are written in a run file."""
    return [] if before == now else [f"{what} was {_written(before)}, is {_written(now)}"]


def _written(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)


def _is_one_of(key: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(key, name) or fnmatchcase(key, f"{name}.*") for name in names)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= (
            _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {prefix + key: inner}
        )
    return flat
