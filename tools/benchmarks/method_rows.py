"""The rows of the table of methods: each a change to `configs/runs/avatars32_diti.yaml`."""

import json
from importlib import resources
from pathlib import Path

from configs.loading import digest_of_json, parse_run
from configs.schema import RunConfig
from data_pipelines.avatars import attribute_granularity

RECIPE = "avatars32_diti.yaml"

_ONE_SUBSET = "task.partition={kind: published, num_subsets: 1}"
_FAST = ("task.weight=constant", "optimizer.learning_rate=1e-3", "optimizer.warmup_images=2048")
_EARLY = (
    *_FAST,
    "task.timesteps.edges=[0, 200]",
    "task.partition={kind: stages, stage_ends: [160, 1000], stage_dims: [112, 16], "
    "stage_subsets: [16, 1]}",
)
_MATCHED = (*_FAST, "task.timesteps={edges: [50, 330, 700], shares: [0.6, 0.4]}")
_MATCHED_STAGES = (
    "task.partition={{kind: stages, stage_ends: [150, 330, 480, 600, 1000], "
    "stage_dims: [32, 40, 24, 20, 12], stage_subsets: [{subsets}]}}"
)


def _instead(kind: str, **settings: object) -> tuple[str, ...]:
    """Another task for the same encoder, at the faster rate."""
    encoder = {"latent_dim": 128, "channels": [64, 128], "attention_after": 2}
    return f"task={json.dumps({'kind': kind, 'encoder': encoder, **settings})}", *_FAST[1:]


def _unet_of_backbone() -> dict[str, object]:
    """The shape of the frozen U-Net that the recipe's DiTi leans on."""
    card = resources.files("pretrain") / "weights" / "avatars32.json"
    return json.loads(card.read_text())["unet"]


ROWS: dict[str, tuple[str, ...]] = {
    "authors": (),
    "authors-pdae": (_ONE_SUBSET,),
    "authors-fast": ("optimizer.learning_rate=1e-3", "optimizer.warmup_images=2048"),
    "constant": _FAST,
    "early": _EARLY,
    "early-pdae": (*_FAST, "task.timesteps.edges=[0, 200]", _ONE_SUBSET),
    "early-stop-grad": (*_EARLY, "task.mode=stop_grad"),
    "matched": (*_MATCHED, _MATCHED_STAGES.format(subsets="4, 4, 2, 2, 1")),
    "matched-pdae": (*_MATCHED, _ONE_SUBSET),
    "matched-5-subsets": (*_MATCHED, _MATCHED_STAGES.format(subsets="1, 1, 1, 1, 1")),
    "matched-even": (*_MATCHED, "task.partition={kind: published, num_subsets: 16}"),
    "matched-stop-grad": (
        *_MATCHED,
        _MATCHED_STAGES.format(subsets="4, 4, 2, 2, 1"),
        "task.mode=stop_grad",
    ),
    "matched-dual": (
        *_MATCHED,
        _MATCHED_STAGES.format(subsets="4, 4, 2, 2, 1"),
        "task.mode=dual",
    ),
    "diffae": _instead("diffae", unet=_unet_of_backbone()),
    "simclr": _instead("simclr"),
    "simsiam": _instead("simsiam"),
    "masked": _instead("masked"),
    "vae": _instead("vae"),
    "labels": _instead("labels", attributes=list(attribute_granularity())),
}
"""Changes to the recipe. `early` trains on the time-steps below 200 only, where an image has lost
least, and cuts these finely. `matched` has stages and time-steps where the attributes of this world
are lost (`diti eval attribute-loss`); beside it are fewer subsets, even ones, and the paper's other
modes. `diffae` trains a U-Net of the backbone's shape along with the encoder. From `simclr` on no
diffusion model is asked; `labels` is the ceiling: the same encoder, told the attributes."""


def config_of(folder: Path, row: str, seed: int, *, use_gpu: bool = False) -> RunConfig:
    """The run of a row. Raises ConfigError."""
    text = (resources.files("configs") / "runs" / RECIPE).read_text()
    places = (f"output={folder / 'runs'}", f"data.shards={folder / 'avatars' / 'train'}")
    gpu = ("cluster.use_gpu=true", "cluster.num_workers=1") if use_gpu else ()
    own = (f"name={row}-{seed}", f"seed={seed}", *ROWS[row])
    return parse_run(text, (*places, *gpu, *own), source=RECIPE)


def digest_of_config(config: RunConfig) -> str:
    """Of all that decides what is learnt; not of where things lie, or how often they are saved."""
    train = {"total_images", "global_batch", "ema_decay"}
    parts = {"seed": True, "task": True, "optimizer": True, "train": train}
    found = config.model_dump(mode="json", include=parts)
    return digest_of_json(found)[:12]
