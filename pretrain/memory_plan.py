"""Bytes that every rank will hold in a step, part by part: arithmetic over a model's sizes.

The interpreter and its libraries come on top.
"""

from dataclasses import dataclass

import torch

from configs.schema import EngineConfig, RunConfig
from configs.task import DenoiserTask, DitiTask
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import ShardIndex
from pretrain.activations import PassMemory, measure_pass
from pretrain.baselines import make_baseline
from pretrain.denoiser import Denoiser
from pretrain.diti import DiTi
from pretrain.engine import BUCKET_NUMBERS, LIVE_NUMBERS
from pretrain.frozen import untrained_frozen
from pretrain.inputs import Model
from pretrain.run_plan import RunPlan
from pretrain.unet import set_recomputing


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a model holds, whatever the engine does with it."""

    trained: int
    """Numbers."""
    frozen: int
    """Numbers of the backbone, and of the VAE before it. Text encoders run once and are let go."""
    passes: PassMemory
    """Of one micro-batch, in float32."""


def sizes_of(model: Model, *, image_size_px: int, micro_batch: int) -> ModelSizes:
    """Found by taking a step without computing it; `model` is of no use afterwards."""
    frozen = model.frozen if isinstance(model, DiTi) else []
    numbers = [sum(p.numel() for p in part.parameters()) for part in (model, *frozen)]
    passes = measure_pass(model, *frozen, image_size_px=image_size_px, micro_batch=micro_batch)
    return ModelSizes(numbers[0], sum(numbers[1:]), passes)


def sizes_of_run(config: RunConfig, store: ObjectStore, plan: RunPlan) -> ModelSizes:
    """Of the model that a run will train. Of its backbone only card or configurations are read.

    Raises:
        ValueError: the backbone has none, or a model without a backbone does not go into this
            machine's memory.
    """
    size = config.data.image_size_px
    try:
        model = _make_model(config, store)
        set_recomputing(model, config.engine.recompute_activations)
        return sizes_of(model, image_size_px=size, micro_batch=plan.micro_batch)
    except RuntimeError as error:  # torch's, of memory that is not there and images that run out
        raise ValueError(
            f"the model cannot be planned on this machine, which makes its weights once: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _make_model(config: RunConfig, store: ObjectStore) -> Model:
    size = config.data.image_size_px
    match config.task:
        case DitiTask() as task:
            frozen = untrained_frozen(store, task.backbone, size)
            with torch.device("meta"):  # no memory for weights that no machine here may have
                return DiTi(task, frozen, image_size_px=size)
        case DenoiserTask() as task:
            return Denoiser(task)
        case task:
            return make_baseline(task, image_size_px=size)


def plan_memory(sizes: ModelSizes, engine: EngineConfig, plan: RunPlan) -> dict[str, int]:
    """Bytes on every rank at the fullest moment of a step, part by part; the data come on top.

    Letters: P trained numbers, N ranks. A number has 4 bytes in fp32, 2 in bf16 and fp16.
    """
    P, N, stage = sizes.trained, plan.world_size, engine.zero_stage
    digits = 4 if engine.precision == "fp32" else 2
    own = P if stage == 0 else -(-P // N)
    masters = 0 if stage == 0 and digits == 4 else own
    frozen = sizes.frozen if engine.backbone == "replicated" else -(-sizes.frozen // N)
    gathered = min(sizes.frozen - frozen, LIVE_NUMBERS)
    always = {
        "weights": digits * (P if stage < 3 else min(P, own + LIVE_NUMBERS)),
        "optimizer": 4 * masters + 8 * own,
        "average": 4 * own,
        "backbone": digits * frozen,
        "backbone, gathered": digits * gathered,
        "checkpoint": 16 * -(-P // N),  # the rank's part of weights, average and moments, copied
    }
    gradients = digits * (P if stage < 2 else own)
    bucket = digits * min(P, BUCKET_NUMBERS)
    there_already = plan.accumulation > 1 or stage == 3  # of earlier micro-batches, or made at once
    in_activations = stage == 0 and not there_already
    activations = sizes.passes.with_gradients if in_activations else sizes.passes.without_gradients
    as_backward_begins = {
        "gradients": gradients if there_already else 0,
        "gradients, copied": 0,
        "activations": activations * digits // 4,
        "communication": bucket if there_already and stage > 0 else 0,
    }
    in_optimizer = {
        "gradients": gradients,
        "gradients, copied": 4 * own if stage in (1, 2) else 0,  # the rank's part, for the masters
        "activations": 0,
        "communication": bucket if stage > 0 else digits * P if N > 1 else 0,
    }
    fullest = max(as_backward_begins, in_optimizer, key=lambda moment: sum(moment.values()))
    return always | fullest


def in_host_memory(engine: EngineConfig) -> set[str]:
    """The parts that do not lie on the GPU, where the run has one."""
    optimizer = {"optimizer", "average", "gradients, copied"} if engine.offload_optimizer else set()
    backbone = {"backbone"} if engine.backbone == "offloaded" else set()
    return {"data", "checkpoint"} | optimizer | backbone


def plan_data(config: RunConfig, index: ShardIndex, plan: RunPlan) -> int:
    """Bytes of the raw windows that a rank reads from, and of its batches."""
    data = config.data
    lanes = -(-(data.lanes or config.train.global_batch) // plan.world_size)
    per_sample = index.size_bytes / index.num_samples
    numbers = plan.micro_batch * 3 * data.image_size_px**2
    batches = numbers * (data.prefetch_batches + 2 * 4)  # images and noise in float32
    return round(lanes * data.window_rows * per_sample) + batches
