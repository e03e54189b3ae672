"""Bytes that every rank will hold in a step, part by part: arithmetic over a model's sizes.

The interpreter and its libraries come on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from configs.schema import DitiTask, EngineConfig, RunConfig
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import ShardIndex
from pretrain.activations import PassMemory, measure_pass
from pretrain.backbone import untrained_backbone
from pretrain.denoiser import Denoiser
from pretrain.diti import DiTi
from pretrain.engine import BUCKET_NUMBERS, LIVE_NUMBERS
from pretrain.run_plan import RunPlan
from pretrain.unet import set_recomputing

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "average",
    "backbone",
    "activations",
    "communication",
    "data",
)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a model holds, whatever the engine does with it."""

    trained: int
    """Numbers."""
    frozen: int
    """Numbers of the backbone."""
    passes: PassMemory
    """Of one micro-batch, in float32."""


def sizes_of(model: DiTi | Denoiser, *, image_size_px: int, micro_batch: int) -> ModelSizes:
    """Found by taking a step without computing it; `model` is of no use afterwards."""
    frozen = [model.decoder.trunk] if isinstance(model, DiTi) else []
    numbers = [sum(p.numel() for p in part.parameters()) for part in (model, *frozen)]
    passes = measure_pass(model, *frozen, image_size_px=image_size_px, micro_batch=micro_batch)
    return ModelSizes(numbers[0], sum(numbers[1:]), passes)


def sizes_of_run(config: RunConfig, store: ObjectStore, plan: RunPlan) -> ModelSizes:
    """Of the model that a run will train. Of its backbone only the card is read.

    Raises:
        BackboneError: there is no card.
    """
    size = config.data.image_size_px
    if isinstance(config.task, DitiTask):
        model = DiTi(
            config.task, untrained_backbone(store, config.task.backbone), image_size_px=size
        )
    else:
        model = Denoiser(config.task)
    model.tables_to(torch.device("cpu"))
    set_recomputing(model, config.engine.recompute_activations)
    return sizes_of(model, image_size_px=size, micro_batch=plan.micro_batch)


def plan_memory(sizes: ModelSizes, engine: EngineConfig, plan: RunPlan) -> dict[str, int]:
    """Bytes on every rank, by `PARTS` but `data`.

    Letters: P trained numbers, N ranks. A number has 4 bytes in fp32, 2 in bf16 and fp16.
    """
    P, N = sizes.trained, plan.world_size
    digits = 4 if engine.precision == "fp32" else 2
    own = -(-P // N)
    split = engine.zero_stage > 0
    masters = own if split else 0 if digits == 4 else P
    adam = 8 * (own if split else P)
    weights = P if engine.zero_stage < 3 else own + min(P, LIVE_NUMBERS)
    gradients = P if engine.zero_stage < 2 else own
    frozen = sizes.frozen
    if engine.backbone != "replicated":
        frozen = -(-frozen // N) + min(frozen, LIVE_NUMBERS)
    return {
        "weights": digits * weights,
        "gradients": digits * gradients,
        "optimizer": 4 * masters + adam,
        "average": 4 * (own if split else P),
        "backbone": digits * frozen,
        "activations": sizes.passes.without_gradients * digits // 4,
        "communication": digits * min(P, BUCKET_NUMBERS) if split else 0,
    }


def plan_data(config: RunConfig, index: ShardIndex, plan: RunPlan) -> int:
    """Bytes of the raw windows that a rank reads from, and of its batches."""
    data = config.data
    lanes = -(-(data.lanes or config.train.global_batch) // plan.world_size)
    per_sample = index.size_bytes / index.num_samples
    numbers = plan.micro_batch * 3 * data.image_size_px**2
    batches = numbers * (data.prefetch_batches + 2 * 4)  # images and noise in float32
    return round(lanes * data.window_rows * per_sample) + batches
