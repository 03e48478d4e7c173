"""Where text enters Flux: inputs of the text projections (for UCE), attention to words (for EraseAnything).

In: a `models.flux.Flux` model. Out: layer inputs by module name, or the attention maps of the last dual-stream block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from fieldsmith.models.parts import whole


def text_inputs(model: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What each prompt feeds to the text projections: {module name: (prompts, in)}; the last word's row of T5."""
    condition = model.encode(prompts)
    last = torch.tensor([max(0, len(words) - 1) for words in word_positions(model, prompts)])
    return {
        "context_embedder": condition.parts["embeds"][torch.arange(len(prompts)), last],
        "time_text_embed.text_embedder.linear_1": condition.parts["pooled"],
    }


def word_positions(model: Any, prompts: Sequence[str]) -> list[list[int]]:
    """T5 token positions of each prompt's own tokens, end mark excluded."""
    tokens = model.pipeline.tokenizer_2(list(prompts), truncation=True, max_length=model.text_length).input_ids
    return [list(range(len(row) - 1)) for row in tokens]


@contextlib.contextmanager
def attention_maps(model: Any) -> Iterator[list[Tensor]]:
    """Collect, per forward inside `with`, the last dual-stream block's attention to text: (b, heads, tokens, words)."""
    attention: Any = model.network.transformer_blocks[-1].attn
    maps: list[Tensor] = []
    rotate: Any = apply_rotary_emb  # its annotation names another call form

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        words = kwargs["encoder_hidden_states"].shape[1]
        image = [attention.to_q(kwargs["hidden_states"]), attention.to_k(kwargs["hidden_states"])]
        text = [
            attention.add_q_proj(kwargs["encoder_hidden_states"]),
            attention.add_k_proj(kwargs["encoder_hidden_states"]),
        ]
        text = [part.unflatten(-1, (attention.heads, -1)) for part in text]
        image = [part.unflatten(-1, (attention.heads, -1)) for part in image]
        query = torch.cat((attention.norm_added_q(text[0]), attention.norm_q(image[0])), dim=1)
        key = torch.cat((attention.norm_added_k(text[1]), attention.norm_k(image[1])), dim=1)
        if kwargs.get("image_rotary_emb") is not None:
            query = rotate(query, kwargs["image_rotary_emb"], sequence_dim=1)
            key = rotate(key, kwargs["image_rotary_emb"], sequence_dim=1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        maps.append(scores.softmax(-1)[..., :words])

    hook = attention.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with whole():  # the hook sees the rows of this process
            yield maps
    finally:
        hook.remove()
