"""Matching what is inside the networks: FitNets' hint at the middle, BK-SDM's features after every block.

In: teacher and student networks of one family. Out: pairs of features at the same places, the student's brought to the
teacher's width by a regressor (1 x 1) that trains along and is thrown away.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fieldsmith.errors import InputError

BLOCKS = re.compile(r"(down_blocks|up_blocks|transformer_blocks|single_transformer_blocks)\.(\d+)|(mid_block)")


def blocks(network: nn.Module) -> dict[str, list[str]]:
    """Names of the network's blocks by stage, in order."""
    found: dict[str, list[str]] = {}
    for name, _ in network.named_modules():
        match = BLOCKS.fullmatch(name)
        if match:
            found.setdefault(match.group(1) or match.group(3), []).append(name)
    return found


def places(student: nn.Module, teacher: nn.Module, middle_only: bool) -> list[tuple[str, str]]:
    """(student's, teacher's) block names that are matched: the i-th of n with the one at the same depth of m.

    Raises InputError where the two networks have no stage in common.
    """
    ours, theirs = blocks(student), blocks(teacher)
    pairs = []
    for stage in ours.keys() & theirs.keys():
        n, m = len(ours[stage]), len(theirs[stage])
        pairs += [(ours[stage][i], theirs[stage][max(0, (i + 1) * m // n - 1)]) for i in range(n)]
    if not pairs:
        raise InputError("student and teacher have no kind of block in common; use an objective without features")
    pairs.sort(key=lambda pair: list(dict(student.named_modules())).index(pair[0]))
    if middle_only:
        centre = [pair for pair in pairs if pair[0] == "mid_block"]
        return centre or [pairs[len(pairs) // 2]]
    return pairs


@contextlib.contextmanager
def recorded(network: nn.Module, names: list[str]) -> Iterator[list[Tensor]]:
    """Inside, a forward fills the list with the named modules' outputs, in the order of `names`."""
    kept: dict[str, Tensor] = {}
    listed: list[Tensor] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            # a UNet's down block also returns what it skips over; a dual block its text stream first
            if isinstance(output, tuple):
                output = output[-1] if isinstance(output[-1], Tensor) else output[0]
            kept[name] = output
            if len(kept) == len(set(names)):
                listed[:] = [kept[one] for one in names]

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in set(names)]
    try:
        yield listed
    finally:
        for handle in handles:
            handle.remove()


class Regressors(nn.Module):
    """One map a place from the student's width to the teacher's; maps of places (conv 1 x 1) or of tokens (linear)."""

    def __init__(self, student: list[Tensor], teacher: list[Tensor], seed: int):
        """Built from example features. Raises InputError where the grids of places differ."""
        super().__init__()
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            for ours, theirs in zip(student, teacher, strict=True):
                grid = slice(2, None) if ours.ndim == 4 else slice(1, -1)
                if ours.shape[grid] != theirs.shape[grid]:
                    raise InputError(
                        f"features of {tuple(ours.shape[grid])} places, the teacher's of {tuple(theirs.shape[grid])}; "
                        "use a student with the teacher's number of levels"
                    )
                layers.append(
                    nn.Conv2d(ours.shape[1], theirs.shape[1], 1) if ours.ndim == 4
                    else nn.Linear(ours.shape[-1], theirs.shape[-1])
                )  # fmt: skip
        self.layers = nn.ModuleList(layers)

    def forward(self, student: list[Tensor]) -> list[Tensor]:
        return [layer(ours) for layer, ours in zip(self.layers, student, strict=True)]
