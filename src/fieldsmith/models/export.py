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
from fieldsmith.models.core import Model

FORMATS = ("kohya", "comfyui", "diffusers")

Rules = tuple[tuple[str, str], ...]  # diffusers' layer (a regular expression) -> the original checkpoint's
_STREAMS: Rules = (
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"x_embedder", r"img_in"),
    (r"context_embedder", r"txt_in"),
    (r"norm_out\.linear", r"final_layer.adaLN_modulation.1"),
    (r"proj_out", r"final_layer.linear"),
)
_FLUX: Rules = (
    *_STREAMS,
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"single_transformer_blocks\.(\d+)\.(?:attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"time_text_embed\.timestep_embedder\.linear_1", r"time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", r"time_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", r"vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", r"vector_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", r"guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", r"guidance_in.out_layer"),
)
_FLUX2: Rules = (
    *_STREAMS,
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)\.linear", r"\1.lin"),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", r"time_in.in_layer"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", r"time_in.out_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_1", r"guidance_in.in_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_2", r"guidance_in.out_layer"),
)
_SD3: Rules = (
    (r"transformer_blocks\.(\d+)\.(attn|attn2)\.to_[qkv]", r"joint_blocks.\1.x_block.\2.qkv"),
    (r"transformer_blocks\.(\d+)\.(attn|attn2)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"joint_blocks.\1.context_block.attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"context_embedder", r"context_embedder"),
    (r"time_text_embed\.timestep_embedder\.linear_1", r"t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", r"t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", r"y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", r"y_embedder.mlp.2"),
    (r"norm_out\.linear", r"final_layer.adaLN_modulation.1"),
    (r"proj_out", r"final_layer.linear"),
)
_SAME: Rules = ((r".*", r"\g<0>"),)  # kohya's UNet and the original Qwen-Image have diffusers' names
RULES: dict[str, Rules] = {
    "sd15": _SAME,
    "sd3": _SD3,
    "flux": _FLUX,
    "flux-kontext": _FLUX,
    "flux2-klein": _FLUX2,
    "qwen-image": _SAME,
    "qwen-image-edit": _SAME,
}
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


def adapter_of(model: Model) -> Adapter:
    """The adapter that a model carries, at its present scale. Raises InputError where it carries none."""
    if not model.spec:
        raise InputError(f"{model.name} carries no adapter; load one, or train with LoRA")
    scales = {name: float(layer.scaling["default"]) for name, layer in model._tuners().items()}
    return adapter_from(model.adapter_state(), scales)


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
    found: dict[str, Tensor] = {}
    for name, parts in names.items():
        if any(part in adapter for part in parts):
            one = _swapped(_fused([adapter.get(part) for part in parts], [sizes[part][1] for part in parts]), parts)
            key, rank = key_of(family, name, form), len(one.down)
            # kohya reads alpha = 0 as no alpha, which is scale 1
            found[f"{key}.lora_down.weight"] = one.down.contiguous()
            found[f"{key}.lora_up.weight"] = (one.up if one.scale else torch.zeros_like(one.up)).contiguous()
            found[f"{key}.alpha"] = torch.tensor(one.scale * rank if one.scale else float(rank))
    return found


def check_format(family: str, form: str) -> None:
    """Raises InputError at an unknown format, and at a family that other tools read no LoRA of."""
    check_word(form, FORMATS, "fieldsmith's adapter formats")
    if form != "diffusers" and family not in RULES:
        raise InputError(f"no {form} format of LoRA is established for family {family}; use --format diffusers")


def layout(family: str, sizes: Sizes) -> dict[str, tuple[str, ...]]:
    """The original checkpoint's layers, and diffusers' layers that each is made of, in their order."""
    found: dict[str, list[str]] = {}
    for layer in sizes:
        for pattern, name in RULES[family]:
            match = re.fullmatch(pattern, layer)
            if match:
                found.setdefault(match.expand(name), []).append(layer)
                break
    place = {word: i for i, word in enumerate(_ORDER)}
    return {name: tuple(sorted(parts, key=lambda part: place.get(part.rpartition(".")[2], 0)))
            for name, parts in found.items()}  # fmt: skip


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
    """Final modulations say (scale, shift) in diffusers and (shift, scale) in the originals."""
    ends = parts[0] == "norm_out.linear" or parts[0].endswith(".norm1_context.linear")
    if not ends or len(one.up) != 2 * one.down.shape[1]:  # other modulations have more than two outputs
        return one
    return LowRank(one.down, torch.cat(one.up.chunk(2)[::-1]), one.scale)


# back


def speaks_original(keys: Collection[str], family: str, sizes: Sizes) -> bool:
    """Whether all keys are those that kohya's scripts or ComfyUI would give to layers of this denoiser."""
    if family not in RULES or not keys:
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
    found: Adapter = {}
    for original, parts in layout(family, sizes).items():
        for key in {key_of(family, original, form) for form in FORMATS[:2]}:
            one = _low_rank(tensors, key, sizes[parts[0]][0], sum(sizes[part][1] for part in parts), name)
            if one:
                found |= _apart(_swapped(one, parts), parts, [sizes[part][1] for part in parts])
    return found


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
    found = {}
    for part, rows in zip(parts, one.up.split(heights), strict=True):
        reached = (rows != 0).any(0) if one.up.any() else torch.ones(len(one.down), dtype=torch.bool)
        if reached.any():
            found[part] = LowRank(one.down[reached], rows[:, reached], one.scale)
    return found


# files


def to_diffusers(adapter: Adapter, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata as diffusers writes and reads them, for the pipeline's component `part`."""
    ranks = {layer: len(one.down) for layer, one in adapter.items()}
    alphas = {layer: one.scale * len(one.down) for layer, one in adapter.items()}
    rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] for numbers in (ranks, alphas))
    metadata: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(adapter)}
    for field, numbers, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        other = {f"^{layer}": number for layer, number in numbers.items() if number != usual}
        if other:  # ^: this layer alone, none whose name ends alike
            metadata[field] = other
    state = {}
    for layer, one in adapter.items():
        state[f"{part}.{layer}.lora_A.weight"] = one.down.contiguous()
        state[f"{part}.{layer}.lora_B.weight"] = one.up.contiguous()
    return state, {f"{part}.{field}": value for field, value in metadata.items()}


def read_file(file: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and header. Raises InputError where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{file}' could not be read as a LoRA ({error}); give a safetensors file") from error


def adapter_in(file: pathlib.Path, family: str, sizes: Sizes, name: str) -> Adapter:
    """The adapter in a file of any of the formats. Raises InputError where it is none, or not of this denoiser."""
    tensors, header = read_file(file)
    if speaks_original(tensors, family, sizes):
        return imported(tensors, family, sizes, name)
    part = f"{part_of(family)}."
    fields = {k.removeprefix(part): v for k, v in json.loads(header.get("lora_adapter_metadata", "{}")).items()}
    found: Adapter = {}
    for key in tensors:
        whole, end = _split(key)
        layer = whole.removeprefix(part)
        if not end or layer not in sizes or layer == whole:
            raise InputError(
                f"the LoRA in '{file}' does not fit {name}: '{key}' {tuple(tensors[key].shape)} is no layer of a "
                f"{family} denoiser; name the model that it was trained on"
            )
        one = _low_rank(tensors, whole, *sizes[layer], name)
        if one and layer not in found:
            found[layer] = LowRank(one.down, one.up, _scale(fields, layer, len(one.down))) if fields else one
    if not found:
        raise InputError(f"'{file}' holds no LoRA; give an adapter folder of a run, or a LoRA's safetensors file")
    return found


def part_of(family: str) -> str:
    """The denoiser's name in the family's pipelines, with which diffusers' own keys start."""
    return "unet" if family in ("sd15", "unet") else "transformer"


def _scale(fields: Mapping[str, Any], layer: str, rank: int) -> float:
    """What peft's settings make of a layer."""
    alphas: dict[str, float] = fields.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), layer), fields["lora_alpha"]))
    return alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank


def write(adapter: Adapter, family: str, sizes: Sizes, form: str, file: pathlib.Path) -> None:
    """One safetensors file, beside and renamed, so that nobody sees half of it. Raises InputError as `exported`."""
    check_format(family, form)
    header = {"format": "pt"}
    if form == "diffusers":
        state, metadata = to_diffusers(adapter, part_of(family))
        header["lora_adapter_metadata"] = json.dumps(metadata, indent=2, sort_keys=True)
    else:
        state = exported(adapter, family, sizes, form)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(state, beside, metadata=header)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
