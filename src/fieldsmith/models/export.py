"""An adapter under other tools' names: kohya's scripts, ComfyUI, plain diffusers; and back, every layer's change kept.

kohya and ComfyUI name layers as each model's original checkpoint does. Where that fuses layers that diffusers holds
apart (q, k and v in one), their LoRAs become one of block structure: A's on top of each other, B's along the diagonal,
zeros for parts that train nothing. scale = alpha / rank everywhere.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fieldsmith.errors import InputError, check_word
from fieldsmith.models.families import named
from fieldsmith.models.folders import first_sentence

FORMATS = ("kohya", "comfyui", "diffusers")

Rules = tuple[tuple[str, str], ...]  # diffusers' layer (a regular expression) -> the original checkpoint's
SAME_NAMES: Rules = ((r".*", r"\g<0>"),)  # as kohya's UNet and the original Qwen-Image have them
_ORDER = ("to_q", "add_q_proj", "to_k", "add_k_proj", "to_v", "add_v_proj", "proj_mlp")  # in a fused layer
# LoRA's halves under every name that the formats have: (A, B)
_HALVES = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"))


@dataclass(frozen=True)
class LowRank:
    """A layer's change, scale * up @ down: down (rank, in), up (out, rank)."""

    down: Tensor
    up: Tensor
    scale: float


Adapter = dict[str, LowRank]  # by diffusers' layer name
Sizes = Mapping[str, tuple[int, int]]  # (in, out) of every linear layer of a denoiser, by diffusers' name


def sizes_of(network: nn.Module) -> Sizes:
    """(in, out) of a denoiser's linear layers; a layer under a LoRA counts as itself."""
    return {
        name.removesuffix(".base_layer"): (layer.in_features, layer.out_features)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    }


def adapter_from(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> Adapter:
    """`Model.adapter_state`'s weights, under peft's names, with each layer's alpha / rank."""
    down, up = _HALVES[1]
    return {name: LowRank(state[name + down], state[name + up], scale) for name, scale in scales.items()}


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
            one = _swapped(_fused([adapter.get(part) for part in parts], [sizes[part][1] for part in parts]), parts)
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


def _swapped(one: LowRank, parts: tuple[str, ...]) -> LowRank:
    """Final modulations give (scale, shift) in diffusers and (shift, scale) in the originals."""
    ends = parts[0] == "norm_out.linear" or parts[0].endswith(".norm1_context.linear")
    if not ends or len(one.up) != 2 * one.down.shape[1]:  # other modulations have more than two outputs
        return one
    return LowRank(one.down, torch.cat(one.up.chunk(2)[::-1]), one.scale)


# back


def speaks_original(keys: Collection[str], family: str, sizes: Sizes) -> bool:
    """Whether all keys are those that kohya's scripts or ComfyUI would give to layers of this denoiser."""
    if not named(family).exports or not keys:
        return False
    known = {key_of(family, name, form) for name in layout(family, sizes) for form in FORMATS[:2]}
    return all(_split(key)[0] in known for key in keys)


def _split(key: str) -> tuple[str, str]:
    """A key's layer, and which of its tensors it is."""
    for end in (*(half for pair in _HALVES for half in pair), ".alpha"):
        if key.endswith(end):
            return key.removesuffix(end), end
    return key, ""


def imported(tensors: Mapping[str, Tensor], family: str, sizes: Sizes, name: str) -> Adapter:
    """What `exported` gives, or another tool's file of that kind, as an adapter for diffusers' layers.

    A fused LoRA comes apart: each layer keeps the columns of `up` that reach it. No alpha is alpha = rank. Raises
    InputError at a key or size that is not of this denoiser, which `name` names.
    """
    adapter: Adapter = {}
    for original, parts in layout(family, sizes).items():
        for key in {key_of(family, original, form) for form in FORMATS[:2]}:
            one = _low_rank(tensors, key, sizes[parts[0]][0], sum(sizes[part][1] for part in parts), name)
            if one:
                adapter |= _apart(_swapped(one, parts), parts, [sizes[part][1] for part in parts])
    return adapter


def _low_rank(tensors: Mapping[str, Tensor], key: str, wide: int, tall: int, name: str) -> LowRank | None:
    for down, up in _HALVES:
        A, B = tensors.get(key + down), tensors.get(key + up)
        if A is None and B is None:
            continue
        if A is None or B is None:
            raise InputError(f"the LoRA for {name} is not whole: '{key}' has one of its two weights; export it again")
        if A.ndim != 2 or B.ndim != 2 or A.shape[1] != wide or B.shape[0] != tall or len(A) != B.shape[1]:
            raise InputError(
                f"the LoRA does not fit {name}: '{key}' is {tuple(B.shape)} x {tuple(A.shape)}, its layer {tall} x "
                f"{wide}; use the model that it was trained on"
            )
        alpha = tensors.get(f"{key}.alpha")
        return LowRank(A, B, 1.0 if alpha is None or not alpha.item() else float(alpha.item()) / len(A))
    return None


def _apart(one: LowRank, parts: tuple[str, ...], heights: list[int]) -> Adapter:
    if len(parts) == 1:
        return {parts[0]: one}
    apart = {}
    for part, rows in zip(parts, one.up.split(heights), strict=True):
        reached = (rows != 0).any(0) if one.up.any() else torch.ones(len(one.down), dtype=torch.bool)
        if reached.any():
            apart[part] = LowRank(one.down[reached], rows[:, reached], one.scale)
    return apart


# files


def to_diffusers(adapter: Adapter, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata as diffusers writes and reads them, for the pipeline's component `part`."""
    ranks = {layer: len(one.down) for layer, one in adapter.items()}
    alphas = {layer: one.scale * len(one.down) for layer, one in adapter.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    metadata: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(adapter)}
    for field, values, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        other = {f"^{layer}": value for layer, value in values.items() if value != usual}
        if other:  # ^: this layer alone, none whose name ends alike
            metadata[field] = other
    state = {}
    for layer, one in adapter.items():
        state[f"{part}.{layer}.lora_A.weight"] = one.down.contiguous()
        state[f"{part}.{layer}.lora_B.weight"] = one.up.contiguous()
    return state, {f"{part}.{field}": value for field, value in metadata.items()}


def read_file(file: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and header. Raises InputError where it is none, and at NaN or infinity."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"'{file}' could not be read as a LoRA ({first_sentence(error)}); give a safetensors file"
        ) from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"'{key}' of the LoRA in '{file}' holds NaN or infinity; take an earlier or another one")
    return tensors, header


def adapter_in(file: pathlib.Path, family: str, sizes: Sizes, name: str) -> Adapter:
    """The adapter in a file of any of the formats. Raises InputError where it is none, or not of this denoiser."""
    tensors, header = read_file(file)
    if speaks_original(tensors, family, sizes):
        return imported(tensors, family, sizes, name)
    part = f"{part_of(family)}."
    fields = {k.removeprefix(part): v for k, v in json.loads(header.get("lora_adapter_metadata", "{}")).items()}
    adapter: Adapter = {}
    for key in tensors:
        whole, end = _split(key)
        layer = whole.removeprefix(part)
        if not end or layer not in sizes or layer == whole:
            raise InputError(
                f"the LoRA in '{file}' does not fit {name}: '{key}' {tuple(tensors[key].shape)} is no layer of a "
                f"{family} denoiser; name the model that it was trained on"
            )
        one = _low_rank(tensors, whole, *sizes[layer], name)
        if one and layer not in adapter:
            adapter[layer] = LowRank(one.down, one.up, _scale(fields, layer, len(one.down))) if fields else one
    if not adapter:
        raise InputError(f"'{file}' holds no LoRA; give an adapter folder of a run, or a LoRA's safetensors file")
    return adapter


def part_of(family: str) -> str:
    """The denoiser's name in the family's pipelines, with which diffusers' own keys start."""
    part: str = named(family).model_class().PART
    return part


def _scale(fields: Mapping[str, Any], layer: str, rank: int) -> float:
    """What peft's settings make of a layer."""
    alphas: dict[str, float] = fields.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), layer), fields["lora_alpha"]))
    return alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank


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
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
