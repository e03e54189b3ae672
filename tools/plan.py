"""What a run will do and hold on a number of workers, before a single one is started."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from configs.schema import EngineConfig, RunConfig
from data_pipelines.object_store import StoreError
from data_pipelines.sample_order import legal_world_sizes
from data_pipelines.shard_index import read_sets
from pretrain.encoded import backbone_of, open_encoded
from pretrain.frozen import untrained_frozen
from pretrain.memory_plan import in_host_memory, plan_data, plan_memory, sizes_of_run
from pretrain.preflight import open_store
from pretrain.run_plan import RunPlan, plan_run

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Outlook:
    """Of one run on one number of workers."""

    plan: RunPlan
    legal_world_sizes: tuple[int, ...]
    trained_parameters: int
    frozen_parameters: int
    checkpoints: int
    """That the run publishes, step 0 included."""
    checkpoint_bytes: int
    """Of each: weights, average and Adam's two moments in float32."""
    zero_stage: int
    """The one that is configured."""
    memory: dict[int, dict[str, int]]
    """Bytes on each rank by ZeRO stage and part, beside the interpreter's and its libraries'."""
    in_host_memory: tuple[str, ...]
    """The parts that do not lie on the GPU; none where the run has no GPU."""
    not_counted: str
    """Why a part is missing; "" where none is."""


def look_ahead(config: RunConfig, world_size: int) -> Outlook:
    """Plan a run.

    Raises:
        ValueError: the global batch cannot be split over so many workers.
        BackboneError: the backbone's card cannot be read. Its weights need not be there.
        EncodedMismatchError: `data.encoded` was made from other images, by another model, or
            otherwise.
    """
    plan, store = plan_run(config.train, world_size), open_store(config)
    sizes, use_gpu = sizes_of_run(config, store, plan), config.cluster.use_gpu
    data, not_counted = {}, ""
    try:
        index = read_sets(store, config.data.folders)
        data = {"data": plan_data(config, index, plan)}
        if config.data.encoded is not None:
            told, size = backbone_of(config), config.data.image_size_px
            open_encoded(store, config, index, untrained_frozen(store, told, size))
    except StoreError as error:
        not_counted = f"the loader is not counted: {error}"
    return Outlook(
        plan=plan,
        legal_world_sizes=tuple(legal_world_sizes(config.train.global_batch)),
        trained_parameters=sizes.trained,
        frozen_parameters=sizes.frozen,
        checkpoints=plan.num_checkpoints,
        checkpoint_bytes=4 * 4 * sizes.trained,
        zero_stage=config.engine.zero_stage,
        memory={
            engine.zero_stage: plan_memory(sizes, engine, plan) | data
            for engine in _at_every_stage(config.engine)
        },
        in_host_memory=tuple(sorted(in_host_memory(config.engine) if use_gpu else ())),
        not_counted=not_counted,
    )


def _at_every_stage(engine: EngineConfig) -> Iterator[EngineConfig]:
    """The same settings at those stages that they go with."""
    for stage in ZERO_STAGES:
        with suppress(ValidationError):
            yield EngineConfig.model_validate(engine.model_dump() | {"zero_stage": stage})
