"""A student's first weights out of its teacher's: 'weight selection' (Xu et al. 2024).

In: two networks of one class that differ in width and depth. Out: the smaller one with evenly spaced blocks of the
larger, and in each weight evenly spaced rows and columns. The same sizes always give the same places, so a channel of
the student is one channel of the teacher wherever it appears.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

INSIDE = re.compile(r".*\.(to_q|to_k|to_v)\.(weight|bias)")  # rows are attention's own width: heads times head width
OUTSIDE = re.compile(r".*\.to_out\.0\.weight")  # here the columns are
JOINED = re.compile(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|conv1|conv_shortcut)\.(weight|bias)")
CLASSES = re.compile(r"(.*\.)?(class_embedding|embedding_table)\.weight")


@torch.no_grad()
def select_weights(student: nn.Module, teacher: nn.Module, rows: Sequence[int] | None = None) -> list[str]:
    """Copy into the student what fits of the teacher; returns the names of parameters that stay as they are.

    `rows` are the teacher's class rows for each of the student's, where they are not the same.
    """
    fresh = []
    for name, parameter in student.named_parameters():
        source = _origin(name, student, teacher)
        places = None if source is None else _places(name, parameter, source, student, teacher)
        if source is None or places is None:
            fresh.append(name)
            continue
        chosen = source.detach()
        for dim, index in enumerate(places):
            if rows is not None and dim == 0 and CLASSES.fullmatch(name):
                index = torch.tensor(rows)
            chosen = chosen.index_select(dim, index.to(chosen.device))
        parameter.copy_(chosen)
    return fresh


def evenly(of: int, n: int, unit: int = 1) -> Tensor:
    """n of `of` places, evenly spaced and in order, in whole runs of `unit` where both are multiples of it; (n,)."""
    if of % unit or n % unit:
        unit = 1
    runs = torch.arange(n // unit) * (of // unit) // max(1, n // unit)
    return (runs[:, None] * unit + torch.arange(unit)).flatten()


def place_of(block: int, n: int, of: int) -> int:
    """The teacher's block, of `of`, that a student's block of n comes from."""
    return round(block * (of - 1) / max(1, n - 1))


def _origin(name: str, student: nn.Module, teacher: nn.Module) -> Tensor | None:
    """The teacher's parameter of this name, in lists of blocks that at the same share of depth; None without one."""
    here: Any = student
    there: Any = teacher
    for part in name.split("."):
        if isinstance(here, nn.ModuleList) and isinstance(there, nn.ModuleList) and len(there):
            place = place_of(int(part), len(here), len(there))
            here, there = getattr(here, part), there[place]
        else:
            here, there = getattr(here, part), getattr(there, part, None)
    return there if isinstance(there, Tensor) else None


def _places(
    name: str, parameter: Tensor, source: Tensor, student: nn.Module, teacher: nn.Module
) -> list[Tensor] | None:
    """The source's places in each dimension; None where the student's parameter is no smaller version of it."""
    if parameter.ndim != source.ndim:
        return None
    if any(n > of for n, of in zip(parameter.shape[1:], source.shape[1:], strict=True)):
        return None
    if len(parameter) > len(source) and not CLASSES.fullmatch(name):
        return None
    unit = _head(student, teacher)
    sizes = zip(source.shape, parameter.shape, strict=True)
    if hasattr(student, "transformer_blocks"):  # the whole width is made of heads
        return [evenly(of, n, unit) for of, n in sizes]
    places = [evenly(of, n) for of, n in sizes]
    joined = JOINED.fullmatch(name)
    if joined and not name.endswith(("conv1.bias", "conv_shortcut.bias")):
        dim = 0 if joined.group(3) == "norm1" else 1
        places[dim] = _joined(int(joined.group(1)), int(joined.group(2)), student, teacher, parameter, source, dim)
        return places
    inner = 0 if INSIDE.fullmatch(name) else 1 if OUTSIDE.fullmatch(name) else None
    if inner is not None:
        places[inner] = evenly(source.shape[inner], parameter.shape[inner], unit)
    return places


def _joined(block: int, layer: int, student: Any, teacher: Any, parameter: Tensor, source: Tensor, dim: int) -> Tensor:
    """Places among the inputs of a UNet's up block: what comes from below, then what was skipped over, each evenly."""
    depth = [len(network.up_blocks[0].resnets) for network in (student, teacher)]
    theirs = round(layer * (depth[1] - 1) / max(1, depth[0] - 1))
    below, above = _below(student, block, layer), _below(teacher, block, theirs)
    skipped = evenly(source.shape[dim] - above, parameter.shape[dim] - below)
    return torch.cat((evenly(above, below), above + skipped))


def _below(network: Any, block: int, layer: int) -> int:
    """Channels that a layer of an up block gets from the layer before it."""
    widths = list(reversed(network.config.block_out_channels))
    return int(widths[block] if layer else widths[max(0, block - 1)])


def _head(student: Any, teacher: Any) -> int:
    """The width of a head, kept whole; 1 where the two differ or attention has one head of any width."""
    sizes = []
    for config in (student.config, teacher.config):
        heads = config.attention_head_dim
        if "cross_attention_dim" in config and "block_out_channels" in config:  # here it is how many heads there are
            # one number for all levels: every head is narrower, and even places stay in their heads
            heads = None if isinstance(heads, int) else config.block_out_channels[0] // heads[0]
        sizes.append(heads)
    return int(sizes[0]) if sizes[0] and sizes[0] == sizes[1] else 1
