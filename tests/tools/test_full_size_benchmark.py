"""The pass of a full-size model, taken by a tiny one: what it reports is what happened."""

import math
from pathlib import Path

import pytest
import torch

from configs.task import DitiTask
from tests.tiny_diffusers import save_pipeline
from tools.benchmarks import full_size
from tools.benchmarks.full_size import lines, measure


@pytest.fixture
def task(tmp_path: Path) -> DitiTask:
    save_pipeline("stable-diffusion", tmp_path / "model")
    backbone = {"kind": "diffusers", "folder": str(tmp_path / "model"), "sha256": "0" * 64}
    partition = {"stage_ends": (1000,), "stage_dims": (16,), "stage_subsets": (1,)}
    encoder = {"channels": (32, 32), "latent_dim": 16, "attention_after": None}
    told = {"kind": "diti", "backbone": backbone, "encoder": encoder, "partition": partition}
    return DitiTask.model_validate(told)


def test_a_pass_has_gradients_and_leaves_the_frozen_weights_alone(task: DitiTask) -> None:
    found = measure(task, 16, torch.bfloat16)
    assert math.isfinite(found.loss)
    assert found.gradient_norm > 0
    assert found.frozen_before == found.frozen_after
    assert found.planned > 2 * (2 * found.trained + found.frozen), "weights and gradients"
    assert "frozen weights did not move" in lines(found)


def test_a_frozen_weight_that_moves_is_told(task: DitiTask, monkeypatch) -> None:
    forward = full_size.DiTi.forward

    def forward_that_spoils(model, *inputs):
        losses = forward(model, *inputs)
        with torch.no_grad():
            next(model.latents.vae.parameters()).view(-1)[0] += 1
        return losses

    monkeypatch.setattr(full_size.DiTi, "forward", forward_that_spoils)
    assert "frozen weights MOVED" in lines(measure(task, 16, torch.bfloat16))


def test_a_pass_that_does_not_fit_is_refused(task: DitiTask, monkeypatch) -> None:
    monkeypatch.setattr(full_size, "_available", lambda: full_size.SPARE)
    with pytest.raises(MemoryError, match=r"the pass takes 0\.0 GiB, and 0\.0 GiB are left here"):
        measure(task, 16, torch.bfloat16)
