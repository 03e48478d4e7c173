"""Small real pipelines built from nothing: what the zoo's recipes train and what the tests load.

Tokenizers are word lists, text encoders have one layer; every class is the one that full-size pipelines use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fieldsmith.measure.attacks import SPARE

PAD, EOS, BOS, UNKNOWN = "<pad>", "</s>", "<s>", "<unk>"


def word_tokenizer(words: Sequence[str], length: int, bos: bool) -> PreTrainedTokenizerFast:
    """A closed-vocabulary tokenizer of whole lower-case words, padded to `length`."""
    vocabulary = {word: i for i, word in enumerate((PAD, EOS, BOS, UNKNOWN, SPARE, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if bos else f"$A {EOS}", special_tokens=[(w, vocabulary[w]) for w in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNKNOWN,
        additional_special_tokens=[SPARE], model_max_length=length,
    )  # fmt: skip


def small_vae(
    channels: Sequence[int], latent_channels: int, size: int, scaling_factor: float, shift_factor: float | None = None
) -> AutoencoderKL:
    """An autoencoder without attention whose latents are smaller by 2 at each level but the last."""
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=tuple(channels), latent_channels=latent_channels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=scaling_factor, shift_factor=shift_factor, sample_size=size,
    )  # fmt: skip


def clip_config(words: Sequence[str], width: int, text_length: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words) + 5, hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=text_length,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip


def t5_config(words: Sequence[str], width: int) -> T5Config:
    return T5Config(  # type: ignore[call-arg]
        vocab_size=len(words) + 5, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=1, num_heads=4,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip


def flux_pipeline(words: Sequence[str], **shape: Any) -> FluxPipeline:
    """A FluxPipeline with random weights: 32-pixel images, 16 image tokens; `shape` as `flux_parts` takes it."""
    return FluxPipeline(**flux_parts(words, **shape))


def kontext_pipeline(words: Sequence[str], **shape: Any) -> FluxKontextPipeline:
    """A FluxKontextPipeline with random weights, those of `flux_pipeline`, for images of `size` pixels."""
    return FluxKontextPipeline(**flux_parts(words, **shape))


def flux_parts(
    words: Sequence[str],
    *,
    vae_channels: Sequence[int] = (16, 32, 32),
    latent_channels: int = 8,
    layers: int = 2,
    single_layers: int = 2,
    heads: int = 4,
    text_width: int = 64,
    text_length: int = 8,
    guidance_embeds: bool = False,
    seed: int = 0,
    size: int = 32,
) -> dict[str, Any]:
    """What both Flux pipelines are made of, by their arguments' names; images have `size` pixels a side.

    With three `vae_channels` a token is 8 pixels wide: 24-pixel images are 9 tokens. Prompts are `text_length` tokens.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4 * latent_channels, num_layers=layers, num_single_layers=single_layers,
            attention_head_dim=32, num_attention_heads=heads, joint_attention_dim=text_width,
            pooled_projection_dim=text_width, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 14, 14),
        )  # fmt: skip
        parts: dict[str, Any] = {
            "vae": small_vae(vae_channels, latent_channels, size=size, scaling_factor=1.0, shift_factor=0.0),
            "text_encoder": CLIPTextModel(clip_config(words, text_width, text_length, layers=1, heads=4)),
            "text_encoder_2": T5EncoderModel(t5_config(words, text_width)),
            "transformer": transformer,
        }
    for part in parts.values():
        part.eval()
    return parts | {
        # the shift of Flux at 512 pixels (mu = 0.63), whatever the number of tokens
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.63, max_shift=0.63),
        "tokenizer": word_tokenizer(words, text_length, bos=True),
        "tokenizer_2": word_tokenizer(words, text_length, bos=False),
    }


def unet_pipeline(
    *,
    size: int = 16,
    channels: int = 3,
    widths: Sequence[int] = (16, 32),
    layers: int = 1,
    class_rows: int | None = None,
    attention: bool = True,
    prediction_type: str = "epsilon",
    learned_variance: bool = False,
    train_times: int = 1000,
    beta_schedule: str = "linear",
    timestep_spacing: str = "leading",
    clip: bool = False,
    seed: int = 0,
) -> DDPMPipeline:
    """A DDPMPipeline with random weights: a UNet2DModel, with `attention` at its lowest level and always in the middle.

    `clip` holds predicted images inside [-1, 1] while sampling. `class_rows` are embedding rows: the number of classes,
    and one more for a null class. With `learned_variance` the scheduler's variance_type is 'learned_range' and the
    network has twice the output channels.
    """
    levels = len(widths)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        unet: Any = UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels * (2 if learned_variance else 1),
            block_out_channels=tuple(widths), layers_per_block=layers, norm_num_groups=8, attention_head_dim=8,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D" if attention else "DownBlock2D",),
            up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            num_class_embeds=class_rows,
        )  # fmt: skip
    scheduler = DDPMScheduler(
        num_train_timesteps=train_times, beta_schedule=beta_schedule, prediction_type=prediction_type,
        variance_type="learned_range" if learned_variance else "fixed_small", clip_sample=clip,
        timestep_spacing=timestep_spacing,
    )  # fmt: skip
    return DDPMPipeline(unet=unet.eval(), scheduler=scheduler)


def dit_pipeline(
    *,
    classes: int = 1000,
    size: int = 8,
    heads: int = 2,
    head_width: int = 16,
    layers: int = 2,
    latent_channels: int = 4,
    vae_channels: Sequence[int] = (8, 16),
    learned_variance: bool = False,
    train_times: int = 1000,
    clip: bool = False,
    labels: dict[int, str] | None = None,
    seed: int = 0,
) -> DiTPipeline:
    """A DiTPipeline with random weights on latents of `size`, with DDIM's steps.

    Images are larger than latents by 2 for every level of the autoencoder but the last. At 1000 classes, the default,
    the plain pipeline can guide. `labels` are each class's words, separated by commas.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        transformer: Any = DiTTransformer2DModel(
            sample_size=size, in_channels=latent_channels,
            out_channels=latent_channels * (2 if learned_variance else 1), num_embeds_ada_norm=classes,
            num_attention_heads=heads, attention_head_dim=head_width, num_layers=layers, patch_size=2,
        )  # fmt: skip
        vae: Any = small_vae(vae_channels, latent_channels, size * 2 ** (len(vae_channels) - 1), scaling_factor=0.18215)
    scheduler = DDIMScheduler(num_train_timesteps=train_times, clip_sample=clip)
    return DiTPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler, id2label=labels)
