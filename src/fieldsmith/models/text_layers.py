"""Where words enter a network: inputs of its text layers (for UCE), its attention to words (for EraseAnything).

In: a model that names where the tokens of its text encoders lie (`Prompted.text_parts`). Out: layer inputs by module
name, token places, or the attention maps of the last dual-stream block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.models.core import Model


def check_text_layers(model: Model, method: str, attention: bool = False) -> None:
    """Raises InputError where the family has no `text_parts`, or (`attention`) no dual-stream block reads words."""
    blocks: Any = getattr(model.network, "transformer_blocks", None)
    reads = blocks is not None and hasattr(getattr(blocks[-1], "attn", None), "add_k_proj")
    if not getattr(model, "text_parts", ()) or (attention and not reads):
        layers = "dual-stream attention to words" if attention else "layers where single words enter"
        raise InputError(f"method '{method}' needs {layers}, which family {model.family} lacks; use 'gem' or 'esd'")


def text_inputs(model: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What prompts feed to the layers of the subset 'text-inputs': {module name: (rows, in)}.

    Rows are the prompts' last words as each text encoder writes them, one encoder below the other; where a layer reads
    the pooled prompt, they are whole prompts.
    """
    condition = model.encode(prompts)
    each = torch.arange(len(prompts))
    last = [torch.tensor([ids[-1] for ids in part]) for part in _places(model, prompts, end=True)]
    words = torch.cat([condition.parts["embeds"][each, at] for at in last])
    pooled = condition.parts.get("pooled")
    return {
        name: pooled if pooled is not None and name.startswith("time_text_embed") else words
        for name in model._modules("text-inputs")
    }


def word_positions(model: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Places of each prompt's own tokens among the text tokens, marks of start and end excluded."""
    return [[at for part in places for at in part] for places in zip(*_places(model, prompts), strict=True)]


def _places(model: Any, prompts: Sequence[str], end: bool = False) -> list[list[list[int]]]:
    """By encoder and prompt, where its tokens lie; with `end`, a prompt without words lies at its mark of the end."""
    parts = []
    for tokenizer, start in model.text_parts:
        length = min(model.text_length, tokenizer.model_max_length)
        marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        rows = tokenizer(list(prompts), truncation=True, max_length=length).input_ids
        places = [[start + i for i, token in enumerate(row) if token not in marks] for row in rows]
        if end:
            places = [own or [start + len(row) - 1] for own, row in zip(places, rows, strict=True)]
        parts.append(places)
    return parts


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
        query = torch.cat((_normed(attention.norm_added_q, text[0]), _normed(attention.norm_q, image[0])), dim=1)
        key = torch.cat((_normed(attention.norm_added_k, text[1]), _normed(attention.norm_k, image[1])), dim=1)
        if kwargs.get("image_rotary_emb") is not None:
            query = rotate(query, kwargs["image_rotary_emb"], sequence_dim=1)
            key = rotate(key, kwargs["image_rotary_emb"], sequence_dim=1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        if kwargs.get("attention_mask") is not None:  # numbers that are added, as Chroma's
            scores = scores + kwargs["attention_mask"]
        maps.append(scores.softmax(-1)[..., :words])

    hook = attention.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield maps
    finally:
        hook.remove()


def _normed(norm: Any, x: Tensor) -> Tensor:
    """SD3.0 has no norms there."""
    return x if norm is None else norm(x)
