"""Small real pipelines of the Stable Diffusion families and of Chroma, built from nothing: what the tests load.

As in tiny.py: tokenizers are word lists, and every class is the one that full-size pipelines use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from experiments.tiny import clip_config, small_vae, t5_config, word_tokenizer

VAE_CHANNELS = (8, 16)  # two levels: a latent is 2 pixels wide


def sd15_pipeline(
    words: Sequence[str],
    *,
    size: int = 16,
    widths: Sequence[int] = (16, 32),
    text_width: int = 32,
    text_length: int = 8,
    prediction_type: str = "epsilon",
    seed: int = 0,
) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline with random weights for images of `size` pixels, with DDIM's steps.

    Its scheduler has SD 1.5's betas and offset, and ends at clean data. There is no safety checker.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        unet: Any = UNet2DConditionModel(
            sample_size=size // 2, in_channels=4, out_channels=4, block_out_channels=tuple(widths), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
            cross_attention_dim=text_width, attention_head_dim=2, norm_num_groups=8,
        )  # fmt: skip
        vae: Any = small_vae(VAE_CHANNELS, 4, size, scaling_factor=0.18215)
        clip = CLIPTextModel(clip_config(words, text_width, text_length, layers=2, heads=2))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        prediction_type=prediction_type,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=clip.eval(), tokenizer=word_tokenizer(words, text_length, bos=True),
        unet=unet.eval(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # type: ignore[arg-type]  # fmt: skip


def sdxl_pipeline(
    words: Sequence[str],
    *,
    size: int = 16,
    widths: Sequence[int] = (16, 32),
    text_width: int = 32,
    text_length: int = 8,
    seed: int = 0,
) -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline with random weights for images of `size` pixels, with DDIM's steps.

    Its scheduler has SDXL's betas and offset; guidance leads away from zeros, as SDXL's does.
    """
    pooled, numbers = text_width // 2, 8  # of the second encoder; features a number of the size is told in
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        unet: Any = UNet2DConditionModel(
            sample_size=size // 2, in_channels=4, out_channels=4, block_out_channels=tuple(widths), layers_per_block=1,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(widths) - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (len(widths) - 1) + ("UpBlock2D",),
            transformer_layers_per_block=(1,) + (2,) * (len(widths) - 1), use_linear_projection=True,
            cross_attention_dim=text_width + pooled, attention_head_dim=2, norm_num_groups=8,
            addition_embed_type="text_time", addition_time_embed_dim=numbers,
            projection_class_embeddings_input_dim=pooled + 6 * numbers,
        )  # fmt: skip
        vae: Any = small_vae(VAE_CHANNELS, 4, size, scaling_factor=0.13025)
        clip = CLIPTextModel(clip_config(words, text_width, text_length, layers=2, heads=2))
        second = CLIPTextModelWithProjection(clip_config(words, pooled, text_length, layers=2, heads=2))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
    )  # fmt: skip
    tokenizers: list[Any] = [word_tokenizer(words, text_length, bos=True) for _ in range(2)]
    return StableDiffusionXLPipeline(
        vae=vae.eval(), text_encoder=clip.eval(), text_encoder_2=second.eval(), tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=unet.eval(), scheduler=scheduler, add_watermarker=False,
    )  # type: ignore[arg-type]  # fmt: skip


def sd3_pipeline(
    words: Sequence[str],
    *,
    size: int = 16,
    layers: int = 2,
    heads: int = 2,
    head_width: int = 16,
    latent_channels: int = 4,
    text_width: int = 64,
    text_length: int = 8,
    newer: bool = True,
    t5: bool = True,
    seed: int = 0,
) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline with random weights for images of `size` pixels and up to four times as large.

    `newer` as SD3.5-medium: normalised queries and keys, a second attention in the first block. Without `t5` the
    pipeline has no third encoder. The scheduler's shift is SD3's, 3.
    """
    width, clips = heads * head_width, (text_width // 4, text_width // 2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        transformer: Any = SD3Transformer2DModel(
            sample_size=size // 2, patch_size=2, in_channels=latent_channels, out_channels=latent_channels,
            num_layers=layers, attention_head_dim=head_width, num_attention_heads=heads,
            joint_attention_dim=text_width, caption_projection_dim=width, pooled_projection_dim=sum(clips),
            pos_embed_max_size=size, dual_attention_layers=(0,) if newer else (), qk_norm="rms_norm" if newer else None,
        )  # fmt: skip
        vae: Any = small_vae(VAE_CHANNELS, latent_channels, size, scaling_factor=1.5305, shift_factor=0.0609)
        encoders: list[Any] = [
            CLIPTextModelWithProjection(clip_config(words, w, text_length, layers=2, heads=2)) for w in clips
        ]
        encoders.append(T5EncoderModel(t5_config(words, text_width)) if t5 else None)
    tokenizers: list[Any] = [word_tokenizer(words, text_length, bos=bos) for bos in (True, True, False)]
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.eval(),
        text_encoder=encoders[0].eval(), tokenizer=tokenizers[0],
        text_encoder_2=encoders[1].eval(), tokenizer_2=tokenizers[1],
        text_encoder_3=encoders[2].eval() if t5 else None,  # type: ignore[arg-type]
        tokenizer_3=tokenizers[2] if t5 else None,
    )  # fmt: skip


def chroma_pipeline(
    words: Sequence[str],
    *,
    size: int = 32,
    vae_channels: Sequence[int] = (8, 8, 8),
    latent_channels: int = 4,
    text_width: int = 64,
    text_length: int = 8,
    seed: int = 0,
) -> ChromaPipeline:
    """A ChromaPipeline with random weights for images of `size` pixels; a token is 8 pixels wide.

    Its scheduler spaces times as Chroma1-HD's does, by a beta distribution.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        transformer: Any = ChromaTransformer2DModel(
            in_channels=4 * latent_channels, num_layers=2, num_single_layers=2, attention_head_dim=32,
            num_attention_heads=2, joint_attention_dim=text_width, axes_dims_rope=(4, 14, 14),
            approximator_num_channels=32, approximator_hidden_dim=32, approximator_layers=2,
        )  # fmt: skip
        vae: Any = small_vae(vae_channels, latent_channels, size, scaling_factor=0.3611, shift_factor=0.1159)
        t5: Any = T5EncoderModel(t5_config(words, text_width))
    return ChromaPipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        vae=vae.eval(), text_encoder=t5.eval(), tokenizer=word_tokenizer(words, text_length, bos=False),
    )  # type: ignore[arg-type]  # fmt: skip
