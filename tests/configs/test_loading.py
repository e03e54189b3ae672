"""Run files: YAML 1.2, overrides, and one error that lists everything that is wrong."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from configs.loading import ConfigError, digest, dump_run, load_run, parse_run
from configs.schema import RunConfig
from configs.task import DitiTask

ROOT = Path(configs.__file__).parents[1]
BACKBONE = (f"task.backbone={{weights: dpm.safetensors, sha256: '{'0' * 64}'}}",)
RUN_FILES = sorted((ROOT / "configs" / "runs").glob("*.yaml"))
MINIMAL = """
name: a
output: runs
task:
  kind: diti
  backbone: {weights: b.safetensors, sha256: "%s"}
data: {shards: s3://bucket/shards, image_size_px: 64}
train: {total_images: 1000, global_batch: 10, checkpoint_every_images: 100}
""" % ("0" * 64)


def problems_of(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_run(text, overrides)
    return caught.value.problems


# ----------------------------------------------------------------------------------------- YAML 1.2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("2.", 2.0),
        ("010", 10),
        ("-7", -7),
        ("+7", 7),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("y", "y"),
        ("'12:30'", "12:30"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("2001-01-01", "2001-01-01"),
        ("'1e-4'", "1e-4"),
        ("e4", "e4"),
        ("1e", "1e"),
        (".", "."),
        ("'-'", "-"),
        ("=", "="),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text: str, expected: Any):
    (problem,) = problems_of(MINIMAL, f"engine.precision={text}")
    assert problem.startswith(f"engine.precision = {expected!r}: ")


@pytest.mark.parametrize(
    ("text", "expected"), [(".inf", "inf"), ("-.INF", "-inf"), (".NaN", "nan")]
)
def test_infinities_are_numbers_and_refused_as_such(text: str, expected: str):
    (problem,) = problems_of(MINIMAL, f"optimizer.learning_rate={text}")
    assert problem.startswith(f"optimizer.learning_rate = {expected}: ")


def test_a_colon_between_digits_makes_no_number():
    assert parse_run(MINIMAL + "wandb: {project: 12:30}").wandb.project == "12:30"


def test_numbers_arrive_as_numbers():
    run = parse_run(MINIMAL + "optimizer: {learning_rate: 1e-4, eps: 1}\nseed: 010\n")
    assert (run.optimizer.learning_rate, run.optimizer.eps, run.seed) == (0.0001, 1.0, 10)


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "seed: 1\nseed: 1\n",
        MINIMAL + 'seed: 1\n"seed": 2\n',
        MINIMAL + "optimizer: {eps: 1, eps: 2}\n",
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str):
    (problem,) = problems_of(text)
    assert "stands twice" in problem
    assert "'seed'" in problem or "'eps'" in problem
    assert "line 9" in problem or "line 10" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping of sections, got NoneType"),
        ("- a", "must be a mapping of sections, got list"),
        ("a: b: c", "is not YAML"),
        ("a: {", "is not YAML"),
        ("a: \x00", "is not YAML"),
        ("? [a]\n: 1", "unhashable key"),
        ("x: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (MINIMAL + "seed: !!int abc", "is not YAML"),
        (MINIMAL + "seed: " + "9" * 5000, "is not YAML"),
        ("name: &a [*a]", "aliases (*name) are not taken"),
        (MINIMAL + "wandb: {project: !!binary aGk=}", "cannot: Object of type bytes"),
    ],
)
def test_what_is_no_run_file_is_one_clear_problem(text: str, message: str):
    (problem,) = problems_of(text)
    assert message in problem
    assert "\n" not in problem


# ----------------------------------------------------------------------------------------- problems


def test_all_problems_come_at_once_with_path_and_value():
    text = MINIMAL.replace("image_size_px: 64", "image_size_px: 6.5, window_row: 3")
    found = problems_of(
        text.replace("total_images: 1000, ", ""),
        "engine.zero_stage=7",
        "nonsense",
        "task.encoder.channels=[64, wide]",
        "optimizer.learning_rate=fast",
    )
    assert sorted(found) == [
        "data.image_size_px = 6.5: Input should be a valid integer",
        "data.window_row: unknown key; did you mean 'window_rows'?",
        "engine.zero_stage = 7: Input should be 0, 1, 2 or 3",
        "optimizer.learning_rate = 'fast': Input should be a valid number",
        "override 'nonsense' must look like key.path=value",
        "task.encoder.channels.1 = 'wide': Input should be a valid integer",
        "train.total_images: is required but missing; give train.total_images=...",
    ]


def test_the_message_names_the_source_and_counts(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text(MINIMAL + "sed: 1\nenjine: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "bad.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/bad.yaml is not a valid run: 2 problems\n"
        f"  sed: unknown key; did you mean 'seed'?\n"
        f"  enjine: unknown key; did you mean 'engine'?"
    )
    assert isinstance(caught.value, ValueError)


def test_rules_between_fields_name_their_section():
    found = problems_of(MINIMAL, "task.partition.stage_dims=[1, 2]", "task.encoder.num_heads=5")
    assert [problem.partition(": ")[0] for problem in found] == ["task.encoder", "task.partition"]
    (problem,) = problems_of(MINIMAL, "task.encoder.latent_dim=4")
    assert problem.startswith("task: partition.stage_dims add up to 512")
    (problem,) = problems_of(MINIMAL, "train.global_batch=1001")
    assert problem.startswith("run: train.total_images (1000) must be at least")


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("sead", "did you mean 'seed'?"),
        ("train.global_bach", "did you mean 'global_batch'?"),
        ("task.encodr", "did you mean 'encoder'?"),
        ("task.encoder.latentdim", "did you mean 'latent_dim'?"),
        ("task.encoder.chanels", "did you mean 'channels'?"),
        ("task.backbone.sha", "did you mean 'sha256'?"),
        ("task.backbone.folder", "valid keys are ['kind', 'sha256', 'weights']"),  # of the other
        ("task.schedul", "valid keys are ['backbone', 'encoder', "),  # of the other kind of task
        ("wandb.zzz", "valid keys are ['mode', 'project']"),
        ("denoiser", "valid keys are ['cluster', 'data', "),
        ("task.diti", "valid keys are ['backbone', 'encoder', "),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one_of_its_section(path: str, advice: str):
    (problem,) = problems_of(MINIMAL, f"{path}=1")
    assert problem.startswith(f"{path}: unknown key; {advice}")


def test_the_same_inside_the_other_task():
    denoiser = 'task={kind: denoiser, unet: {base_chanels: 64}, encoder: {}, "schedul": {}}'
    assert [problem.partition(": ")[0] for problem in problems_of(MINIMAL, denoiser)] == [
        "task.unet.base_chanels",
        "task.encoder",
        "task.schedul",
    ]
    assert "did you mean 'base_channels'?" in problems_of(MINIMAL, denoiser)[0]
    assert "did you mean 'schedule'?" in problems_of(MINIMAL, denoiser)[2]


def test_an_unknown_kind_of_task_is_answered_with_the_known_ones_and_hides_nothing_else():
    found = problems_of(MINIMAL, "task.kind=dity", "seed=x")
    known = "'diti', 'denoiser', 'labels', 'vae', 'masked', 'simclr', 'simsiam', 'diffae'"
    assert f"task.kind = 'dity': must be one of {known}" in found
    assert len(found) == 2
    (problem,) = problems_of(MINIMAL, "task.encoder.kind=resnet18")
    assert problem == "task.encoder.kind = 'resnet18': must be one of 'conv', 'resnet10', 'vit'"
    (problem,) = problems_of(MINIMAL, "task.encoder={kind: resnet10, channels: [32]}")
    assert problem == "task.encoder.channels: unknown key; valid keys are ['kind', 'latent_dim']"
    assert problems_of(MINIMAL, "task={}") == ("task.kind: is required but missing",)


# ---------------------------------------------------------------------------------------- overrides


def test_overrides_are_yaml_and_applied_in_order():
    run = parse_run(
        MINIMAL,
        [
            "seed=1",
            "seed=2",
            "name=b-c.d",
            "wandb.project=a=b",
            "optimizer.betas=[0.5, 0.9]",
            "optimizer={eps: 1e-6}",
            "optimizer.clip_norm=null",
            "optimizer.learning_rate=3e-4",
            "engine.precision='bf16'",
            "cluster.use_gpu=true",
            "task.encoder.attention_after=",
        ],
    )
    assert (run.seed, run.name, run.wandb.project) == (2, "b-c.d", "a=b")
    assert run.optimizer.betas == (0.9, 0.999), "a later override of the section replaced it"
    assert (run.optimizer.eps, run.optimizer.learning_rate) == (1e-6, 3e-4)
    assert (run.engine.precision, run.cluster.use_gpu) == ("bf16", True)
    assert isinstance(run.task, DitiTask)
    assert run.task.encoder.attention_after is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "override 'seed' must look like key.path=value"),
        ("=1", "override '=1' must look like key.path=value"),
        ("a..b=1", "override 'a..b=1' must look like key.path=value"),
        ("seed={", "override 'seed={' has a value that is not YAML"),
        ("seed=!!int x", "override 'seed=!!int x' has a value that is not YAML"),
        ("seed={a: 1, a: 2}", "stands twice"),
        ("name.first=1", "override 'name.first=1': name is a value, not a section"),
        ("train.total_images.x=1", "train.total_images is a value, not a section"),
        ("train.log_every_steps='10'", "train.log_every_steps = '10': Input should be a valid int"),
        ("train.log_every_steps=2.0", "train.log_every_steps = 2.0: Input should be a valid int"),
        ("train.log_every_steps=-3", "train.log_every_steps = -3: Input should be greater than 0"),
        ("cluster.use_gpu=yes", "cluster.use_gpu = 'yes': Input should be a valid boolean"),
    ],
)
def test_a_bad_override_is_a_problem_like_any_other(override: str, problem: str):
    found = problems_of(MINIMAL, override, "engine.zero_stage=9")
    assert any(problem in line for line in found), found
    assert any("engine.zero_stage = 9" in line for line in found), "the other one is still reported"


# ----------------------------------------------------------------------------- files and round trip


def test_a_list_that_is_too_short_and_a_false_truth_value_are_problems_like_any_other():
    found = problems_of(MINIMAL, "optimizer.betas=[0.9]", "seed=!!bool maybe")
    assert any("optimizer.betas.1: is required" in problem for problem in found)
    assert any("'seed=!!bool maybe' has a value" in problem for problem in found)
    assert "is not YAML" in problems_of("seed: !!bool maybe")[0]


def test_a_source_may_not_be_named_like_a_path_of_settings():
    found = problems_of(MINIMAL, "data.shards=null", "data.sources={my.shards: {shards: a}}")
    assert any("letters, digits, dashes and underscores" in problem for problem in found), found


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_every_run_file_loads_and_states_no_key_twice(path: Path):
    run = load_run(path, BACKBONE if path.stem.endswith(("_diti", "_pdae")) else ())
    assert parse_run(dump_run(run)) == run
    assert run.name.replace("-", "_") == path.stem


def test_there_are_run_files():
    assert RUN_FILES


def test_a_missing_or_unreadable_file_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml is not a valid run.*\n.*cannot be read"):
        load_run(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8'"):
        load_run(tmp_path / "latin.yaml")


@pytest.mark.parametrize("name", ["plain", "1e5", "08", "1", "1.5", "true", "null", "on", "0x1F"])
def test_a_dumped_run_is_read_back_equal_whatever_its_strings_look_like(name: str):
    run = parse_run(MINIMAL, [f'name="{name}"', f'wandb.project="{name}"', "optimizer.eps=1e-9"])
    dumped = dump_run(run)
    assert parse_run(dumped) == run
    assert yaml.safe_load(dumped)["name"] == name, "readers of YAML 1.1 see the same string"


def test_a_dump_spells_out_every_default():
    dumped = yaml.safe_load(dump_run(parse_run(MINIMAL)))
    assert dumped["optimizer"]["betas"] == [0.9, 0.999]
    assert list(dumped) == list(RunConfig.model_fields)


def test_equal_runs_have_equal_digests_however_they_were_written():
    run = parse_run(MINIMAL)
    reordered = yaml.safe_dump(yaml.safe_load(MINIMAL), sort_keys=True)
    assert digest(parse_run(reordered)) == digest(run)
    assert digest(parse_run(dump_run(run))) == digest(run)
    assert digest(parse_run(MINIMAL, ["optimizer.learning_rate=0.0001", "seed=0"])) == digest(run)
    assert len(digest(run)) == 64


def test_any_change_changes_the_digest():
    runs = [
        [],
        ["seed=1"],
        ["store.endpoint_url='http://h'"],
        ["task.weight=constant"],
        ["task.partition.stage_ends=[50, 100, 300, 501, 1000]"],
    ]
    assert len({digest(parse_run(MINIMAL, run)) for run in runs}) == len(runs)


def test_another_process_computes_the_same_digest(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(MINIMAL)
    code = (
        "import sys; from pathlib import Path; from configs.loading import *;"
        "print(digest(load_run(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.yaml"],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest(parse_run(MINIMAL))


@pytest.mark.parametrize(
    "data", ["{image_size_px: 64}", "{image_size_px: 64, shards: a, sources: {b: {shards: c}}}"]
)
def test_shards_come_from_one_folder_or_from_sources(data: str):
    with pytest.raises(ConfigError, match=r"data: give either shards \(one folder\) or sources"):
        parse_run(f"data: {data}")


def test_aliases_are_refused_because_a_few_lines_can_multiply():
    with pytest.raises(ConfigError, match=r"aliases \(\*name\) are not taken"):
        parse_run("a: &a [1, 2]\nb: [*a, *a]\n")
