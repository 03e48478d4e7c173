"""Small real pipelines of FLUX.2, Z-Image, Qwen-Image and Qwen-Image-Edit, built from nothing: what the tests load.

Every class is the one that full-size pipelines use; the tokenizers know a list of words and the marks of chats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from experiments.tiny import small_vae
from fieldsmith.models.qwen_image_edit import still_processor

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SEEN, OVER, PICTURE, FILM = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
MARKS = (PAD, START, END, SEEN, OVER, PICTURE, FILM, "<unk>")
CHAT = (  # as Qwen3 puts it without thinking
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
# as Mistral Small's, whose messages are lists of parts; its own marks are words like any others
INSTRUCTION = (
    "{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def chat_tokenizer(words: Sequence[str], length: int, template: str = CHAT) -> PreTrainedTokenizerFast:
    """A closed vocabulary of whole words beside the marks of a chat; every other word of a template is unknown.

    It counts words, punctuation and line breaks as Qwen's does in the pipelines' templates, so that the 34 and 64
    tokens that they drop are the same.
    """
    vocabulary = {word: i for i, word in enumerate((*MARKS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"'s|\w+|[^\w\s]+|\n+|[^\S\n]+"), "isolated"),
        pre_tokenizers.Split(Regex(r"^[^\S\n]+$"), "removed"),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token="<unk>", chat_template=template,
        additional_special_tokens=list(MARKS[1:-1]), model_max_length=length,
    )  # fmt: skip


def _loud(transformer: Any) -> Any:
    """The transformer with weights twice as large: fresh ones hardly listen to words, and a test would not see them."""
    with torch.no_grad():
        for p in transformer.parameters():
            p.mul_(2)
    return transformer.eval()


def flux2_klein_pipeline(
    words: Sequence[str],
    *,
    vae_channels: Sequence[int] = (8, 8, 8),
    latent_channels: int = 4,
    size: int = 32,
    text_length: int = 32,
    distilled: bool = False,
    seed: int = 0,
) -> Flux2KleinPipeline:
    """A Flux2KleinPipeline with random weights and latent statistics, for images of `size` pixels.

    With three `vae_channels` a token is 8 pixels wide. The text encoder has the 27 layers that the pipeline reads.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        text_encoder: Any = Qwen3ForCausalLM(_qwen3(words, 27))
        parts = _flux2_parts(vae_channels, latent_channels, size, guidance_embeds=False)
    return Flux2KleinPipeline(
        text_encoder=text_encoder.eval(), tokenizer=chat_tokenizer(words, text_length), is_distilled=distilled, **parts
    )


def flux2_dev_pipeline(
    words: Sequence[str],
    *,
    vae_channels: Sequence[int] = (8, 8, 8),
    latent_channels: int = 4,
    size: int = 32,
    text_length: int = 64,
    seed: int = 0,
) -> Flux2Pipeline:
    """A Flux2Pipeline as `flux2_klein_pipeline`, whose network takes the guidance scale.

    The text encoder has the 30 layers that the pipeline reads; `text_length` leaves room for its system message. The
    tokenizer stands alone, without the processor of pictures around it, which needs torchvision.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        config = Mistral3Config(
            text_config={
                "model_type": "mistral", "vocab_size": len(MARKS) + len(words), "hidden_size": 16,
                "intermediate_size": 16, "num_hidden_layers": 30, "num_attention_heads": 2, "num_key_value_heads": 1,
                "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            },
            vision_config={
                "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
            },
            image_token_index=MARKS.index(PICTURE),
        )  # fmt: skip
        text_encoder: Any = Mistral3ForConditionalGeneration(config)
        parts = _flux2_parts(vae_channels, latent_channels, size, guidance_embeds=True)
    tokenizer: Any = chat_tokenizer(words, text_length, INSTRUCTION)
    return Flux2Pipeline(text_encoder=text_encoder.eval(), tokenizer=tokenizer, **parts)


def _qwen3(words: Sequence[str], layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(MARKS) + len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=2, bos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip


def _flux2_parts(
    vae_channels: Sequence[int], latent_channels: int, size: int, guidance_embeds: bool
) -> dict[str, Any]:  # fmt: skip
    """What the FLUX.2 pipelines share, by their arguments' names, drawn from the global generator."""
    levels = len(vae_channels)
    vae: Any = AutoencoderKLFlux2(
        block_out_channels=tuple(vae_channels), latent_channels=latent_channels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4, mid_block_add_attention=False, sample_size=size,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer: Any = Flux2Transformer2DModel(
        in_channels=4 * latent_channels, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * 16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return {"vae": vae.eval(), "transformer": _loud(transformer),
            "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)}  # fmt: skip


def z_image_pipeline(
    words: Sequence[str], *, size: int = 16, layers: int = 2, text_length: int = 48, seed: int = 0
) -> ZImagePipeline:
    """A ZImagePipeline with random weights for images of `size` pixels; a token is 4 pixels wide."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        text_encoder: Any = Qwen3Model(_qwen3(words, 2))
        vae: Any = small_vae((8, 16), 4, size, scaling_factor=0.3611, shift_factor=0.1159)
        transformer: Any = ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=layers, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[8, 4, 4], axes_lens=[128, 32, 32],
        )  # fmt: skip
        with torch.no_grad():
            for pad in (transformer.x_pad_token, transformer.cap_pad_token):
                pad.normal_()  # zeros as they are made
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.eval(), text_encoder=text_encoder.eval(),
        tokenizer=chat_tokenizer(words, text_length), transformer=transformer.eval(),
    )  # fmt: skip


def qwen_image_pipeline(words: Sequence[str], *, layers: int = 2, seed: int = 0) -> QwenImagePipeline:
    """A QwenImagePipeline with random weights; a token is 8 pixels wide."""
    return QwenImagePipeline(**_qwen_parts(words, layers, seed))


def qwen_image_edit_pipeline(
    words: Sequence[str], *, layers: int = 2, plus: bool = False, seed: int = 0
) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """A QwenImageEditPipeline (or its successor, with `plus`) with the weights of `qwen_image_pipeline`."""
    parts = _qwen_parts(words, layers, seed)
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    processor: Any = still_processor(images, parts["tokenizer"])
    made_by: Any = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    made: QwenImageEditPipeline | QwenImageEditPlusPipeline = made_by(processor=processor, **parts)
    return made


def _qwen_parts(words: Sequence[str], layers: int, seed: int) -> dict[str, Any]:
    """What the Qwen-Image pipelines share, by their arguments' names."""
    mark = {name: i for i, name in enumerate(MARKS)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # module constructors draw from the global generator
        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(MARKS) + len(words), "hidden_size": 32, "intermediate_size": 32,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                "initializer_range": 0.2,
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
                "spatial_merge_size": 2, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [0],
                "initializer_range": 0.2,
            },
            image_token_id=mark[PICTURE], video_token_id=mark[FILM],
            vision_start_token_id=mark[SEEN], vision_end_token_id=mark[OVER],
        )  # fmt: skip
        text_encoder: Any = Qwen2_5_VLForConditionalGeneration(config)
        vae: Any = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[-0.7, 0.1, 0.9, -0.2], latents_std=[2.8, 1.4, 0.7, 2.0],
        )  # fmt: skip
        transformer: Any = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    return {
        "vae": vae.eval(), "text_encoder": text_encoder.eval(), "transformer": _loud(transformer),
        "tokenizer": chat_tokenizer(words, 1024),
        "scheduler": FlowMatchEulerDiscreteScheduler(  # as Qwen-Image's own
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
        ),
    }  # fmt: skip
