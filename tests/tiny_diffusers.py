"""Pipelines of a few hundred kilobytes, random, saved by diffusers as real ones are."""

from pathlib import Path

import torch
from torch import nn

from pretrain.caption_tokenizer import clip_tokenizer

KINDS = ("ddpm", "stable-diffusion", "sdxl", "dit", "sd3")
_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_TEXT_DIM = 16


def save_pipeline(
    kind: str, folder: Path, *, prediction: str = "epsilon", scaling_factor: float = 0.5
) -> None:
    """A pipeline for 16 px images: pixels for `ddpm`, else latents of 8x8."""
    import diffusers

    torch.manual_seed(0)
    noise = {"num_train_timesteps": 1000, "prediction_type": prediction}
    scaled = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    match kind:
        case "ddpm":
            unet = diffusers.UNet2DModel(
                **_UNET | {"sample_size": 16},
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=8,
            )
            made = diffusers.DDPMPipeline(_rough(unet), diffusers.DDPMScheduler(**noise))
        case "dit":
            transformer = diffusers.DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=3,
                sample_size=8,
                norm_num_groups=8,
                num_embeds_ada_norm=10,
            )
            scheduler = diffusers.DDIMScheduler(**noise)
            made = diffusers.DiTPipeline(_rough(transformer), _vae(scaling_factor), scheduler)
        case "stable-diffusion":
            made = diffusers.StableDiffusionPipeline(
                vae=_vae(scaling_factor),
                text_encoder=_text_encoder(),
                tokenizer=_tokenizer(),
                unet=_rough(_conditional_unet()),
                scheduler=diffusers.DDIMScheduler(**noise, **scaled),
                safety_checker=None,
                feature_extractor=None,
            )
        case "sdxl":
            more = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + _TEXT_DIM,
                "cross_attention_dim": 2 * _TEXT_DIM,
            }
            made = diffusers.StableDiffusionXLPipeline(
                vae=_vae(scaling_factor),
                text_encoder=_text_encoder(),
                text_encoder_2=_text_encoder(projected=True),
                tokenizer=_tokenizer(),
                tokenizer_2=_tokenizer(),
                unet=_rough(_conditional_unet(**more)),
                scheduler=diffusers.EulerDiscreteScheduler(**noise, **scaled),
            )
        case _:
            transformer = diffusers.SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=3,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * _TEXT_DIM,
                caption_projection_dim=16,
                pooled_projection_dim=2 * _TEXT_DIM,
                pos_embed_max_size=8,
            )
            made = diffusers.StableDiffusion3Pipeline(
                transformer=_rough(transformer),
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                vae=_vae(scaling_factor, shift_factor=0.1),
                text_encoder=_text_encoder(projected=True),
                tokenizer=_tokenizer(),
                text_encoder_2=_text_encoder(projected=True),
                tokenizer_2=_tokenizer(),
                text_encoder_3=None,
                tokenizer_3=None,
            )
    made.save_pretrained(folder)


def _rough(model: nn.Module) -> nn.Module:
    """Noise on every weight, so that nothing is 0 by its initialisation."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def _vae(scaling_factor: float, **more: float) -> nn.Module:
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=scaling_factor,
        **more,
    )


def _conditional_unet(**more: object) -> nn.Module:
    import diffusers

    shape = _UNET | {"cross_attention_dim": _TEXT_DIM, "attention_head_dim": 4} | more
    return diffusers.UNet2DConditionModel(
        **shape,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _text_encoder(*, projected: bool = False) -> nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=_TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=_TEXT_DIM,
        bos_token_id=512,
        eos_token_id=513,
    )
    if projected:
        return transformers.CLIPTextModelWithProjection(config)
    return transformers.CLIPTextModel(config)


def _tokenizer() -> object:
    """CLIP's, of single bytes."""
    return clip_tokenizer((), length=16)
