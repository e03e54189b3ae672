"""Checkpoint files in the authors' layout, made of this project's modules with random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from configs.task import EncoderConfig, UNetConfig
from pretrain.encoder import Encoder
from pretrain.shift_decoder import ShiftDecoder
from pretrain.unet import UNet

SIZE_PX = 8
UNET = UNetConfig(
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    num_heads=4,
    dropout=0.1,
)
ENCODER = EncoderConfig(latent_dim=24, channels=(32, 64), attention_after=2)

DENOISER_CONFIG: dict[str, Any] = {
    "denoise_fn_config": {
        "input_channel": 3,
        "base_channel": 32,
        "channel_multiplier": [1, 2],
        "num_residual_blocks_of_a_block": 1,
        "attention_resolutions": [2],
        "num_heads": 4,
        "head_channel": -1,
        "use_new_attention_order": False,
        "dropout": 0.1,
    }
}
RUN_CONFIG: dict[str, Any] = {
    "train_dataset_config": {"image_size": SIZE_PX, "latent_dim": 24},
    "diffusion_config": {
        "timesteps": 1000,
        "betas_type": "linear",
        "linear_beta_start": 0.0001,
        "linear_beta_end": 0.02,
    },
    "trained_ddpm_config": "../pre-trained-dpms/faces/config.yml",
    "encoder_config": {"model": "FACES", "latent_dim": 24},
    "decoder_config": {"model": "FACES", "latent_dim": 24},
    "ssl_config": {"k": 4, "stages": "300,1000", "dims_per_stage": "9,15"},
}


def random_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """State dict of a module, nothing in it zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in module.state_dict().items()
    }


def denoiser_state(seed: int = 1, config: UNetConfig = UNET) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return random_state(UNet(config), seed)


def run_content(
    seed: int = 2, *, encoder: EncoderConfig = ENCODER, is_diti: bool = True
) -> dict[str, Any]:
    """What a run's latest.pt holds; the online weights differ from the averaged ones."""
    torch.manual_seed(seed)
    shift = ShiftDecoder(UNet(UNET), latent_dim=encoder.latent_dim)
    content: dict[str, Any] = {"step": 7000, "optimizer": {"state": {}}, "scaler": {}}
    for prefix, number in (("", seed + 10), ("ema_", seed)):
        content[f"{prefix}encoder"] = random_state(Encoder(encoder, image_size_px=SIZE_PX), number)
        content[f"{prefix}decoder"] = random_state(shift, number) | denoiser_state()
    if is_diti:
        content["ssl_model"] = {"module.projector.weight": torch.zeros(2)}
    return content


def write_run(
    folder: Path,
    content: Mapping[str, Any] | None = None,
    *,
    config: Mapping[str, Any] | None = RUN_CONFIG,
) -> Path:
    """runs/faces/diti/{config.yml, checkpoints/latest.pt}, and the denoiser's config."""
    run = folder / "runs" / "faces" / "diti"
    (run / "checkpoints").mkdir(parents=True)
    path = run / "checkpoints" / "latest.pt"
    torch.save(dict(content or run_content()), path)
    if config is not None:
        (run / "config.yml").write_text(yaml.safe_dump(dict(config)))
        denoiser = folder / "pre-trained-dpms" / "faces"
        denoiser.mkdir(parents=True)
        (denoiser / "config.yml").write_text(yaml.safe_dump(DENOISER_CONFIG))
    return path


def write_denoiser(folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """{config.yml, checkpoint.pt} of a pre-trained denoiser."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    torch.save({"step": 300, "ema_denoise_fn": dict(state or denoiser_state())}, path)
    (folder / "config.yml").write_text(yaml.safe_dump(DENOISER_CONFIG))
    return path


def changed(config: Mapping[str, Any], section: str, **values: Any) -> dict[str, Any]:
    """A config with some values of one section replaced."""
    return {**config, section: {**config[section], **values}}
