"""An adapter under other tools' names: kohya's scripts, ComfyUI, plain diffusers; and back, every layer's change kept.

kohya and ComfyUI name layers as each model's original checkpoint does. Where that fuses layers that diffusers holds
apart (q, k and v in one), their LoRAs become one of block structure: A's on top of each other, B's along the diagonal,
zeros for parts that train nothing. scale = alpha / rank everywhere.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fieldsmith.errors import InputError, check_word
from fieldsmith.models.families import named
from fieldsmith.run import make_ordinary

FORMATS = ("kohya", "comfyui", "diffusers")

Rules = tuple[tuple[str, str], ...]  # diffusers' layer (a regular expression) -> the original checkpoint's
SAME_NAMES: Rules = ((r".*", r"\g<0>"),)  # as kohya's UNet and the original Qwen-Image have them
_ORDER = ("to_q", "add_q_proj", "to_k", "add_k_proj", "to_v", "add_v_proj", "proj_mlp")  # in a fused layer


@dataclass(frozen=True)
class LowRank:
    """A layer's change, scale * up @ down: down (rank, in), up (out, rank); a convolution's have its kernel behind."""

    down: Tensor
    up: Tensor
    scale: float


Adapter = dict[str, LowRank]  # by diffusers' layer name
# (in, out) of every linear layer of a denoiser and (in, out, height, width) of convolutions, by diffusers' name
Sizes = Mapping[str, tuple[int, ...]]


def sizes_of(network: nn.Module) -> Sizes:
    """Of a denoiser's linear layers and convolutions; a layer under a LoRA counts as itself."""
    return {
        name.removesuffix(".base_layer"): (layer.weight.shape[1], layer.weight.shape[0], *layer.weight.shape[2:])
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
    }


def adapter_from(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> Adapter:
    """`Model.adapter_state`'s weights, under peft's names, with each layer's alpha / rank."""
    return {
        name: LowRank(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"], scale)
        for name, scale in scales.items()
    }


# to another tool's names


def exported(adapter: Adapter, family: str, sizes: Sizes, form: str) -> dict[str, Tensor]:
    """The adapter under kohya's or ComfyUI's keys: lora_down, lora_up and a scalar alpha a layer.

    Raises InputError where the family has no such format, or one of the adapter's layers no name in it.
    """
    check_format(family, form)
    names = layout(family, sizes)
    odd = sorted(adapter.keys() - {part for parts in names.values() for part in parts})
    if odd:
        raise InputError(f"layer '{odd[0]}' has no name in the {form} format of family {family}; train another subset")
    tensors: dict[str, Tensor] = {}
    for name, parts in names.items():
        if any(part in adapter for part in parts):
            one = _fused([adapter.get(part) for part in parts], [sizes[part][1] for part in parts])
            if swaps(name, parts, sizes):
                one = LowRank(one.down, torch.cat(one.up.chunk(2)[::-1]), one.scale)
            key, rank = key_of(family, name, form), len(one.down)
            # kohya reads alpha = 0 as no alpha, which is scale 1
            tensors[f"{key}.lora_down.weight"] = one.down.contiguous()
            tensors[f"{key}.lora_up.weight"] = (one.up if one.scale else torch.zeros_like(one.up)).contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(one.scale * rank if one.scale else float(rank))
    return tensors


def check_format(family: str, form: str) -> None:
    """Raises InputError at an unknown format, and at a family that other tools read no LoRA of."""
    check_word(form, FORMATS, "fieldsmith's adapter formats")
    if form != "diffusers" and form not in named(family).exports:
        raise InputError(f"no {form} format of LoRA is established for family {family}; use --format diffusers")


def layout(family: str, sizes: Sizes) -> dict[str, tuple[str, ...]]:
    """The original checkpoint's layers, and diffusers' layers that each is made of, in their order."""
    layers: dict[str, list[str]] = {}
    names: Rules = named(family).model_class().ORIGINAL_NAMES
    for layer in sizes:
        for pattern, name in names:
            match = re.fullmatch(pattern, layer)
            if match:
                layers.setdefault(match.expand(name), []).append(layer)
                break
    place = {word: i for i, word in enumerate(_ORDER)}
    return {name: tuple(sorted(parts, key=lambda part: place.get(part.rpartition(".")[2], 0)))
            for name, parts in layers.items()}  # fmt: skip


def key_of(family: str, name: str, form: str) -> str:
    """What a key starts with. ComfyUI names Stable Diffusion 1's layers in a way of its own, but reads kohya's."""
    if form == "comfyui" and family != "sd15":
        return f"diffusion_model.{name}"
    return "lora_unet_" + name.replace(".", "_")


def _fused(parts: list[LowRank | None], heights: list[int]) -> LowRank:
    """One LoRA for layers on top of each other, those of `heights` outputs that train nothing (None) included."""
    trained = [part for part in parts if part is not None]
    if len(parts) == 1:
        return trained[0]
    scale = trained[0].scale
    even = all(part.scale == scale for part in trained)
    up = trained[0].up.new_zeros(sum(heights), sum(len(part.down) for part in trained))
    row = column = 0
    for part, height in zip(parts, heights, strict=True):
        if part is not None:
            rank = len(part.down)
            up[row : row + height, column : column + rank] = part.up if even else part.up * part.scale
            column += rank
        row += height
    return LowRank(torch.cat([part.down for part in trained]), up, scale if even else 1.0)


def swaps(name: str, parts: tuple[str, ...], sizes: Sizes) -> bool:
    """Whether a layer's halves change places: final modulations give (scale, shift) in diffusers and (shift, scale)
    under names of the originals' own."""
    ends = parts[0] == "norm_out.linear" or parts[0].endswith(".norm1_context.linear")
    return ends and name != parts[0] and sizes[parts[0]][1] == 2 * sizes[parts[0]][0]  # others have more outputs


# files


def peft_settings(adapter: Adapter) -> dict[str, Any]:
    """peft's settings of an adapter: r, lora_alpha, target_modules and what differs from them in some layers."""
    ranks = {layer: len(one.down) for layer, one in adapter.items()}
    alphas = {layer: one.scale * len(one.down) for layer, one in adapter.items()}
    rank, alpha = (_usual(values.values()) for values in (ranks, alphas))
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(adapter)}
    for field, values, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        other = {f"^{layer}": value for layer, value in values.items() if value != usual}
        if other:  # ^: this layer alone, none whose name ends alike
            settings[field] = other
    return settings


def _usual(values: Iterable[Any]) -> Any:
    """The commonest value, of equally common ones the largest, whatever their order."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def to_diffusers(adapter: Adapter, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata as diffusers writes and reads them, for the pipeline's component `part`."""
    state = {}
    for layer, one in adapter.items():
        state[f"{part}.{layer}.lora_A.weight"] = one.down.contiguous()
        state[f"{part}.{layer}.lora_B.weight"] = one.up.contiguous()
    return state, {f"{part}.{field}": value for field, value in peft_settings(adapter).items()}


def part_of(family: str) -> str:
    """The denoiser's name in the family's pipelines, with which diffusers' own keys start."""
    part: str = named(family).model_class().PART
    return part


def write(adapter: Adapter, family: str, sizes: Sizes, form: str, file: pathlib.Path) -> None:
    """One safetensors file, beside and renamed, so that nobody sees half of it. Raises InputError as `exported`."""
    check_format(family, form)
    if form == "diffusers":
        write_diffusers(adapter, part_of(family), file)
    else:
        _write(exported(adapter, family, sizes, form), {"format": "pt"}, file)


def write_diffusers(adapter: Adapter, part: str, file: pathlib.Path) -> None:
    """As `write`, under diffusers' own keys, for the pipeline's component `part`."""
    state, metadata = to_diffusers(adapter, part)
    _write(state, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)}, file)


def _write(state: dict[str, Tensor], header: dict[str, str], file: pathlib.Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(state, beside, metadata=header)
        _in_order(beside)
        make_ordinary(beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _in_order(file: pathlib.Path) -> None:
    """The entries of a file's metadata sorted, in place: safetensors writes them as they fall, anew each time."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:  # spelt otherwise, so that it does not fit in its place
            return
        opened.seek(8)
        opened.write(text.ljust(length))
