"""What adapters of all kinds do to named layers: LoRA, LoCon, DoRA, LoHa, LoKr, biases, whole differences.

In: `Contents`, which adapters.py reads from a file. Out: a model whose frozen weights have them (`merge`), or an
`Adapter` that can train and is saved without loss (`low_rank`; plain LoRA alone).
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models.export import Adapter, LowRank, Sizes


@dataclass(frozen=True)
class Change:
    """What a file does to one layer, or to layers that it fuses, whose rows then stand in the order of `parts`."""

    key: str
    parts: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    scale: float  # alpha / rank
    swapped: bool = False  # whether the file has the halves of the rows the other way round

    @property
    def kind(self) -> str:
        """The name under which people know it."""
        for name, what in (("hada_w1_a", "LoHa"), ("dora_scale", "DoRA"), ("magnitude", "DoRA")):
            if name in self.tensors:
                return what
        if any(name.startswith("lokr_") for name in self.tensors):
            return "LoKr"
        if "diff" in self.tensors or "diff_b" in self.tensors:
            return "whole difference"
        if "bias" in self.tensors:
            return "LoRA with biases"
        return "LoCon with a middle" if "mid" in self.tensors or "scalar" in self.tensors else "LoRA"


@dataclass(frozen=True)
class Contents:
    """What a file holds: changes of the denoiser, and by the text encoder's name in the pipeline, those of encoders."""

    file: pathlib.Path
    changes: list[Change]
    encoders: dict[str, list[Change]] = field(default_factory=dict)  # `parts` is the layer as the file writes it


def plain(name: str) -> str:
    return name.replace(".", "_")


def misfit(change: Change, shape: tuple[int, ...]) -> str:
    """The shapes of a change that is not of a weight of this shape; '' where it is."""
    shapes = {name: tensor.to("meta") for name, tensor in change.tensors.items()}
    seen = " x ".join(
        str(tuple(one.shape)) for name, one in reversed(shapes.items()) if name not in ("alpha", "scalar")
    )
    try:
        made = _product(Change(change.key, change.parts, shapes, 1.0))
    except (RuntimeError, IndexError):
        return seen
    bias = shapes.get("bias", shapes.get("diff_b"))
    fits = made is None or (len(made) == shape[0] and made.numel() == math.prod(shape))
    return "" if fits and (bias is None or bias.numel() == shape[0]) else seen


def _product(change: Change) -> Tensor | None:
    """The change of the weight but for DoRA's magnitude, in any shape of its size; None where biases alone change."""
    t = {name: tensor.float() for name, tensor in change.tensors.items() if name != "alpha"}
    if "diff" in t:
        return t["diff"]
    if "up" in t:
        up, down = t["up"].flatten(1), t["down"].flatten(1)
        made = torch.einsum("mnkl,om,ni->oikl", t["mid"], up, down) if "mid" in t else up @ down
    elif "hada_w1_a" in t:
        one, other = (
            _tucker(t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]) if f"hada_t{i}" in t
            else t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2)
        )  # fmt: skip
        made = one * other
    elif any(name.startswith("lokr_") for name in t):
        one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        if "lokr_w2" in t:
            other = t["lokr_w2"]
        elif "lokr_t2" in t:
            other = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
        else:
            other = t["lokr_w2_a"] @ t["lokr_w2_b"]
        made = torch.kron(one.reshape(*one.shape, *[1] * (other.ndim - 2)), other.contiguous())
    else:
        return None
    return change.scale * made * t.get("scalar", torch.ones((), device=made.device))


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijkl,ip,jr->prkl", core, a, b)


def difference(change: Change, weight: Tensor) -> Tensor | None:
    """What the change adds to a weight (out, in, ...) whose rows are in the file's order."""
    made = _product(change)
    if made is None:
        return None
    made = made.to(weight.device).reshape(weight.shape)
    size = change.tensors.get("magnitude", change.tensors.get("dora_scale"))
    if size is None:
        return made
    # DoRA (2402.09353 eq. 5): the norm of each output's weights is a parameter of its own; lycoris has inputs' too
    whole, ones = weight + made, [1] * (weight.ndim - 2)
    if "magnitude" in change.tensors or len(size) == len(weight):
        norm, shape = whole.flatten(1).norm(dim=1), (-1, 1, *ones)
    else:
        norm, shape = whole.transpose(0, 1).flatten(1).norm(dim=1), (1, -1, *ones)
    return whole * (size.to(norm).reshape(shape) / norm.reshape(shape)) - weight


@torch.no_grad()
def merge(model: Any, contents: Contents, scale: float) -> str:
    """Add a file's changes, `scale` times, to a model's frozen weights, its text encoders' too; says what was taken.

    Raises InputError at layers that a text encoder of the model does not have.
    """
    for change in contents.changes:
        _add(model.network, change, scale)
    taken, passed = [f"{len(contents.changes)} layers of the {model.PART}"], []
    for name, changes in contents.encoders.items():
        # a second T5 is the third encoder of SD3, and trainers name that of FLUX.1 alike
        part = name if name in model.pipeline.components else name.replace("_3", "_2")
        encoder = model.pipeline.components.get(part)
        if encoder is None:
            passed.append(f"{len(changes)} of {name}, which this model does not have")
            continue
        layers = {plain(layer): layer for layer, module in encoder.named_modules() if hasattr(module, "weight")}
        layers |= {f"text_model_{short}": layer for short, layer in layers.items()}  # as transformers had them before 5
        for change in changes:
            layer = layers.get(plain(change.parts[0]))
            fault = layer is not None and misfit(change, tuple(encoder.get_submodule(layer).weight.shape))
            if layer is None or fault:
                raise InputError(
                    f"'{change.key}' in '{contents.file}' {f'is {fault} and ' if fault else ''}fits no layer of the "
                    f"{part} of {model.name}; use the model that it was trained on"
                )
            _add(encoder, Change(change.key, (layer,), change.tensors, change.scale), scale)
        taken.append(f"{len(changes)} of the {part}")
    left = f"; passed over: {', '.join(passed)}" if passed else ""
    return f"{contents.file} at {scale:g}: {', '.join(taken)}{left}"


def _add(network: nn.Module, change: Change, scale: float) -> None:
    if not scale:
        return
    layers: list[Any] = [network.get_submodule(part) for part in change.parts]
    weight = torch.cat([processes.full(layer.weight).float() for layer in layers])
    made = difference(change, _halves(weight, change.swapped))
    if made is not None:
        rows = _halves(scale * made, change.swapped).split([len(layer.weight) for layer in layers])
        for layer, part in zip(layers, rows, strict=True):
            _raise_by(layer.weight, part)
    bias = change.tensors.get("bias", change.tensors.get("diff_b"))
    if bias is not None:
        if any(layer.bias is None for layer in layers):
            raise InputError(f"'{change.key}' changes the bias of a layer that has none; give the LoRA without biases")
        by = scale * (change.scale if "bias" in change.tensors else 1.0) * bias.float()
        for layer, part in zip(layers, _halves(by, change.swapped).split([len(la.bias) for la in layers]), strict=True):
            _raise_by(layer.bias, part)


def _halves(rows: Tensor, swapped: bool) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1]) if swapped else rows


def _raise_by(weight: Tensor, by: Tensor) -> None:
    if isinstance(weight, DTensor):  # each process adds to the part that it holds
        by = distribute_tensor(by.to(weight.device), weight.device_mesh, weight.placements)
    weight.copy_((weight.float() + by.to(weight.device)).to(weight.dtype))


# what can train


def low_rank(contents: Contents, sizes: Sizes, use: str = "") -> Adapter:
    """The file's LoRA as one that trains and is saved without loss; fused layers come apart.

    Raises InputError, by the kind's name, at all that is more than plain LoRA of the denoiser; `use` is what else may
    be done with it.
    """
    adapter: Adapter = {}
    for change in contents.changes:
        if change.kind != "LoRA":
            raise InputError(
                f"'{contents.file}' is an adapter of kind {change.kind} ('{change.key}'), of which a LoRA alone would "
                f"lose a part; give a plain LoRA{use}"
            )
        heights = [sizes[part][1] for part in change.parts]
        size = sizes[change.parts[0]]
        down = change.tensors["down"].flatten(1)
        up = change.tensors["up"].flatten(1)
        one = LowRank(down.reshape(len(down), size[0], *size[2:]), _halves(up, change.swapped), change.scale)
        for part, each in _apart(one, change.parts, heights).items():
            tall = each.up.reshape(*each.up.shape, *[1] * len(size[2:]))
            adapter[part] = LowRank(each.down, tall, each.scale)
    if not adapter:
        raise InputError(f"'{contents.file}' changes no layer of the denoiser; give a LoRA that does{use}")
    return adapter


def _apart(one: LowRank, parts: Sequence[str], heights: list[int]) -> Adapter:
    if len(parts) == 1:
        return {parts[0]: one}
    apart = {}
    for part, rows in zip(parts, one.up.split(heights), strict=True):
        reached = (rows != 0).any(0) if one.up.any() else torch.ones(len(one.down), dtype=torch.bool)
        if reached.any():
            apart[part] = LowRank(one.down[reached], rows[:, reached], one.scale)
    return apart
