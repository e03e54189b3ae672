"""The schema: every rule refuses what it names and passes at its edge, defaults are valid, and no
field is there for show."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from configs import schema, task
from configs.schema import OptimizerConfig, RunConfig, TrainConfig
from configs.task import (
    DenoiserTask,
    DitiTask,
    EncoderConfig,
    ScheduleConfig,
    StagedPartition,
    UNetConfig,
)
from configs.values import Section

ROOT = Path(schema.__file__).parents[1]
SHA256 = "0" * 64
MINIMAL: dict[str, dict[str, Any]] = {
    "DataConfig": {"shards": "s3://bucket/shards", "image_size_px": 64},
    "CacheConfig": {"folder": "/scratch", "limit_gib": 1.0},
    "SourceConfig": {"shards": "s3://bucket/shards"},
    "BackboneConfig": {"weights": "builtin/avatars32", "sha256": SHA256},
    "DiffusersConfig": {"kind": "diffusers", "folder": "s3://bucket/model", "sha256": SHA256},
    "DitiTask": {"kind": "diti", "backbone": {"weights": "x.safetensors", "sha256": SHA256}},
    "DenoiserTask": {"kind": "denoiser", "unet": {}},
    "LabelsTask": {"kind": "labels", "attributes": ["hat"]},
    "VaeTask": {"kind": "vae"},
    "MaskedTask": {"kind": "masked"},
    "SimClrTask": {"kind": "simclr"},
    "SimSiamTask": {"kind": "simsiam"},
    "DiffAeTask": {"kind": "diffae", "unet": {}},
    "PublishedPartition": {"kind": "published"},
    "ResNet10Config": {"kind": "resnet10"},
    "VitConfig": {"kind": "vit"},
    "TrainConfig": {"total_images": 1000, "global_batch": 10, "checkpoint_every_images": 100},
}
MINIMAL["RunConfig"] = {
    "name": "a",
    "output": "runs",
    "task": MINIMAL["DitiTask"],
    "data": MINIMAL["DataConfig"],
    "train": MINIMAL["TrainConfig"],
}
SECTIONS = {
    name: section
    for name, section in (vars(task) | vars(schema)).items()
    if isinstance(section, type) and issubclass(section, Section) and section is not Section
}


def make(section: str, **changes: Any) -> Any:
    """A section from its least input with `changes`, through JSON as the loader does it."""
    return SECTIONS[section].model_validate_json(
        json.dumps(MINIMAL.get(section, {}) | changes, allow_nan=True)
    )


def changed_run(**sections: dict[str, Any]) -> Any:
    """A run with some keys of some sections changed; a task is replaced as a whole."""
    base = MINIMAL["RunConfig"] | {"task": {}}
    changes = {name: base.get(name, {}) | value for name, value in sections.items()}
    return make("RunConfig", **changes)


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", SECTIONS)
def test_the_least_input_is_valid_and_so_are_the_defaults_when_they_are_spelled_out(name: str):
    section = make(name)
    again = SECTIONS[name].model_validate_json(section.model_dump_json())
    assert again == section


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_frozen_and_refuses_unknown_keys(name: str):
    section = make(name)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, next(iter(type(section).model_fields)), 1)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        make(name, no_such_key=1)


@pytest.mark.parametrize(
    ("section", "field", "values"),
    [
        ("DataConfig", "image_size_px", [0, -1, 64.0, "64", True, None]),
        ("DataConfig", "shards", ["", "s3://bucket", "http://host/x", "pipe:cat x"]),
        ("DataConfig", "lanes", [0, 2**20 + 1, 10**20]),
        ("DataConfig", "window_rows", [0, 10**20]),
        ("CacheConfig", "folder", [""]),
        ("CacheConfig", "limit_gib", [0, 1e300]),
        ("TrainConfig", "total_images", [0, 10**24]),
        ("StoreConfig", "endpoint_url", ["", "host:9000", "u:secret@h:1", "https://h/?token=x"]),
        ("StoreConfig", "deadline_seconds", [0, -1.0, float("nan"), float("inf"), "60"]),
        ("BackboneConfig", "sha256", ["", "0" * 63, "G" * 64, "A" * 64]),
        ("UNetConfig", "dropout", [-0.1, 1.0, float("nan")]),
        ("UNetConfig", "channel_multipliers", [[], [0], [1.5], 1]),
        ("UNetConfig", "attention_order", ["newest"]),
        ("EncoderConfig", "channels", [[]]),
        ("StagedPartition", "stage_ends", [[], [0, 50, 100, 300, 1000]]),
        ("OptimizerConfig", "betas", [[0.9], [1.0, 0.9], [0.9, -0.1], [float("nan"), 0.9]]),
        ("OptimizerConfig", "weight_decay", [-0.1, float("nan"), float("inf")]),
        ("OptimizerConfig", "learning_rate", [0, -1e-4, "1e-4", float("inf")]),
        ("OptimizerConfig", "clip_norm", [0]),
        ("TrainConfig", "ema_decay", [-0.1, 1, float("nan")]),
        ("TrainConfig", "global_batch", [0, 2.5]),
        ("EngineConfig", "zero_stage", [4, "2"]),
        ("EngineConfig", "precision", ["fp64", 16]),
        ("EngineConfig", "backbone", ["sharded", True]),
        ("EngineConfig", "compile", ["all", True]),
        ("ClusterConfig", "use_gpu", ["yes", 1]),
        ("ClusterConfig", "num_workers", [0, "2", 2.5]),
        ("WandbConfig", "mode", ["on", True]),
        ("RunConfig", "name", ["", "a/b", "..", "-a", "a b", 1]),
        ("RunConfig", "seed", [-1, 2**63]),
        ("TimestepsConfig", "edges", [[0], [float("nan"), 9]]),
        ("TimestepsConfig", "shares", [[-1.0]]),
        ("DitiTask", "mode", ["both"]),
        ("PublishedPartition", "num_subsets", [0]),
        ("DitiTask", "kind", ["denoiser"]),
        ("DiffAeTask", "unet", [None, "builtin/avatars32"]),
    ],
)
def test_values_of_the_wrong_kind_or_range_are_refused(section: str, field: str, values: list[Any]):
    for value in values:
        with pytest.raises(ValidationError) as caught:
            make(section, **{field: value})
        assert caught.value.errors()[0]["loc"][0] == field, value


@pytest.mark.parametrize("value", [0, 2**63 - 1])
def test_a_seed_may_have_63_bits(value: int):
    assert make("RunConfig", seed=value).seed == value


# ----------------------------------------------------------------------------- rules between fields

UNET = {"kind": "denoiser", "unet": {}}
RESNET10 = MINIMAL["DitiTask"] | {"encoder": {"kind": "resnet10"}}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("UNetConfig", base_channels=48), "base_channels must be a multiple of 32"),
        (
            lambda: make("UNetConfig", attention_factors=[16]),
            r"factors, not pixels: this U-Net has \[1, 2, 4, 8\], got \[16\]",
        ),
        (
            lambda: make("UNetConfig", num_heads=3),
            "must divide the 256 channels of the attention at factor 4, got 3",
        ),
        (
            lambda: make("UNetConfig", attention_factors=[], num_heads=3),
            "must divide the 512 channels of the attention at factor 8, got 3",
        ),
        (lambda: make("UNetConfig", head_channels=96), "256 channels .* got 96"),
        (
            lambda: make("ScheduleConfig", beta_start=0.03),
            "beta_start <= beta_end < 1 must hold, got 0.03 and 0.02",
        ),
        (lambda: make("ScheduleConfig", beta_end=1.0), "beta_end < 1 .* got 0.0001 and 1.0"),
        (lambda: make("ScheduleConfig", beta_start=1e-8), "raise beta_start above 1e-7"),
        (lambda: make("ScheduleConfig", beta_end=0.9), r"to exp\(-\d+\).* lower beta_end 0\.9"),
        (
            lambda: make("EncoderConfig", channels=[64, 100, 128, 30]),
            r"multiples of 32 \(GroupNorm\), got \[100, 30\]",
        ),
        (
            lambda: make("EncoderConfig", attention_after=5),
            "attention_after must be between 1 and 4, .* got 5",
        ),
        (lambda: make("EncoderConfig", attention_after=0), "between 1 and 4, .* got 0"),
        (
            lambda: make("ResNet10Config", latent_dim=256),
            "latent_dim of a resnet10 is 512, the channels of its last block, got 256",
        ),
        (
            lambda: changed_run(task=RESNET10, engine={"precision": "bf16"}),
            "kind resnet10 needs engine.precision fp32, got bf16",
        ),
        (
            lambda: make("EngineConfig", compile="both", backbone="partitioned"),
            "compile 'both' needs backbone 'replicated', got 'partitioned'",
        ),
        (
            lambda: make("EngineConfig", offload_optimizer=True, zero_stage=0),
            "offload_optimizer needs zero_stage 1, 2 or 3, got 0",
        ),
        (
            lambda: make("EngineConfig", compile="trained", zero_stage=3),
            "compile 'trained' needs zero_stage 0, 1 or 2, got 3",
        ),
        (lambda: make("EncoderConfig", num_heads=5), "must divide the 128 channels .* got 5"),
        (
            lambda: make("StagedPartition", stage_dims=[10, 502]),
            "one entry per stage, got 5, 2 and 5",
        ),
        (
            lambda: make(
                "StagedPartition", stage_ends=[50, 50], stage_dims=[9, 9], stage_subsets=[1, 1]
            ),
            "stage_ends must rise, got 50 after 50",
        ),
        (
            lambda: make("StagedPartition", stage_ends=[9], stage_dims=[3], stage_subsets=[4]),
            r"stage \[0, 9\) has 4 subsets but only 3 dimensions and 9 time-steps",
        ),
        (
            lambda: make("StagedPartition", stage_ends=[3], stage_dims=[9], stage_subsets=[4]),
            "4 subsets but only 9 dimensions and 3 time-steps",
        ),
        (
            lambda: make("DitiTask", encoder={"latent_dim": 256}),
            "stage_dims add up to 512, but encoder.latent_dim is 256",
        ),
        (
            lambda: make("DitiTask", encoder={"latent_dim": 1024}),
            "stage_dims add up to 512, but encoder.latent_dim is 1024",
        ),
        (
            lambda: make("DitiTask", timesteps={"edges": [0, 1001]}),
            r"edges must lie inside \[0, 1000\], got 1001",
        ),
        (lambda: make("TimestepsConfig", edges=[-1, 10]), "whole and not negative"),
        (lambda: make("TimestepsConfig", edges=[0.5, 10]), "whole and not negative"),
        (lambda: make("TimestepsConfig", edges=[0, 10, 20]), "make 2 pieces, .* 1 shares"),
        (lambda: make("TimestepsConfig", shares=[0.5]), "add up to 1, got 0.5"),
        (lambda: make("PublishedPartition", num_subsets=1001), r"\(1001\) must not exceed"),
        (lambda: make("TimestepsConfig", edges=[7, 7]), "edges must rise, got 7 after 7"),
        (
            lambda: make("TimestepsConfig", unit="log_snr", edges=[-5, 5]),
            "negated, must rise, got -5 after 5",
        ),
        (
            lambda: make("PublishedPartition", stage_ends=[50, 900], stage_dims=[1, 2]),
            r"must end at num_timesteps \(1000\), got 900",
        ),
        (lambda: make("PublishedPartition", stage_ends=[1000]), "both be given, or neither"),
        (
            lambda: make("DenoiserTask", schedule={"num_timesteps": 100}),
            r"inside \[0, 100\], got 1000",
        ),
        (
            lambda: make("DiffAeTask", schedule={"num_timesteps": 100}),
            r"edges must lie inside \[0, 100\], got 1000",
        ),
        (
            lambda: changed_run(train={"total_images": 9}),
            r"total_images \(9\) must be at least train.global_batch \(10\)",
        ),
        (
            lambda: changed_run(optimizer={"warmup_images": 600, "decay_images": 401}),
            r"optimizer.decay_images \(1001\) must not exceed train.total_images \(1000\); lower",
        ),
        (
            lambda: changed_run(
                task={"kind": "masked", "patch_size_px": 7}, data={"image_size_px": 64}
            ),
            r"image_size_px must be divisible by task.patch_size_px \(7\), got 64",
        ),
        (
            lambda: changed_run(task={"kind": "simsiam"}, engine={"precision": "bf16"}),
            "task.kind simsiam needs engine.precision fp32, got bf16",
        ),
        (
            lambda: changed_run(task={"kind": "labels", "attributes": ["hat", "hat"]}),
            "attributes must differ, got hat, hat",
        ),
        (
            lambda: changed_run(task=UNET, data={"image_size_px": 36}),
            "image_size_px must be divisible by 8 .* got 36",
        ),
        (
            lambda: changed_run(
                task={"kind": "denoiser", "unet": {"patch_size_px": 4}}, data={"image_size_px": 40}
            ),
            "image_size_px must be divisible by 32 .* got 40",
        ),
        (
            lambda: changed_run(task=MINIMAL["DiffAeTask"], data={"image_size_px": 36}),
            "image_size_px must be divisible by 8 .* got 36",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_values(build: Any, message: str):
    with pytest.raises(ValidationError, match=message):
        build()


def test_every_rule_passes_at_its_edge():
    make("UNetConfig", base_channels=32, head_channels=64)
    make("UNetConfig", channel_multipliers=[1], attention_factors=[1])
    make("ScheduleConfig", beta_start=0.02)
    make("EncoderConfig", channels=[32], attention_after=1)
    make("EncoderConfig", attention_after=None, num_heads=5)
    make("StagedPartition", stage_ends=[4], stage_dims=[4], stage_subsets=[4])
    make("DitiTask", timesteps={"edges": [999, 1000]})
    make("DenoiserTask", schedule={"num_timesteps": 1}, timesteps={"edges": [0, 1]})
    make("TimestepsConfig", unit="log_snr", edges=[9, 0, -9.5], shares=[0.25, 0.75])
    make("PublishedPartition", num_subsets=1000)
    changed_run(train={"total_images": 10})
    changed_run(optimizer={"warmup_images": 600, "decay_images": 400})
    changed_run(task=UNET, data={"image_size_px": 8})
    changed_run(task=MINIMAL["DiffAeTask"], data={"image_size_px": 8})
    make("DiffAeTask", schedule={"num_timesteps": 1}, timesteps={"edges": [0, 1]})
    changed_run(task=RESNET10)
    changed_run(engine={"precision": "bf16"})
    changed_run(task={"kind": "masked", "patch_size_px": 8}, data={"image_size_px": 64})
    changed_run(task={"kind": "vae"}, engine={"precision": "bf16"})


def test_the_defaults_are_the_papers():
    partition, schedule = StagedPartition(), ScheduleConfig()
    assert partition.stage_ends == (50, 100, 300, 500, 1000)
    assert partition.stage_dims == (10, 25, 327, 100, 50)
    assert partition.stage_subsets == (4, 3, 13, 12, 32)
    assert sum(partition.stage_dims) == EncoderConfig().latent_dim == 512
    assert (schedule.num_timesteps, schedule.beta_start, schedule.beta_end) == (1000, 1e-4, 0.02)
    optimizer, train = OptimizerConfig(), TrainConfig(**MINIMAL["TrainConfig"])
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert (optimizer.learning_rate, train.ema_decay) == (1e-4, 0.9999)
    assert EncoderConfig().channels == (64, 128, 128, 128)


# ------------------------------------------------------------------------------------- no dead keys


def owners(section: type[BaseModel], names: tuple[str, ...] = ("config",)) -> dict[str, set[str]]:
    """`Section.field` -> the names it may be read through, such as {"config", "train"}."""
    found: dict[str, set[str]] = {}
    for field, info in section.model_fields.items():
        found[f"{section.__name__}.{field}"] = set(names)
        for part in sections_in(info.annotation):
            found |= owners(part, ("config", field))
    return found


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def unread_fields(model: type[BaseModel], code: str) -> list[str]:
    def is_read(field: str, through: set[str]) -> bool:
        return bool(re.search(rf"\b(?:{'|'.join(through)})\.{field}\b", code))

    return [
        name
        for name, through in owners(model).items()
        if not is_read(name.partition(".")[2], through)
        and not name.endswith(".kind")  # read by pydantic, which picks the task by it
    ]


def test_every_section_hangs_somewhere():
    assert {name.partition(".")[0] for name in owners(RunConfig)} == set(SECTIONS)


def test_every_field_is_read_by_the_product():
    folders = ("configs", "pretrain", "data_pipelines", "cluster", "tools")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert unread_fields(RunConfig, code) == []


def test_a_field_counts_as_read_only_through_its_own_section():
    class Paint(BaseModel):
        colour: str
        layers: int

    class Shed(BaseModel):
        paint: Paint

    assert unread_fields(Shed, "config.paint.colour; brush.layers") == ["Paint.layers"]
    assert unread_fields(Shed, "config.painting; config.colour; paint.layers") == ["Shed.paint"]


def test_both_tasks_can_be_told_apart_by_type():
    assert isinstance(make("RunConfig").task, DitiTask)
    assert isinstance(changed_run(task=UNET).task, DenoiserTask)
    assert isinstance(changed_run(task=UNET).task.unet, UNetConfig)


def test_reading_a_configuration_starts_neither_torch_nor_ray_nor_any_other_layer():
    heavy = ["torch", "ray", "deepspeed", "webdataset", "s3fs", "pyarrow", "numpy"]
    heavy += ["data_pipelines", "pretrain", "cluster", "tools"]
    code = f"import sys, configs.loading; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
