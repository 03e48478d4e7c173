"""Numbers that releases' own functions gave on random tensors, one JSON a repository: `commit` and `how` say of what.

make.py made the first five. The others were made in the same way, out of a checkout of the commit, by the functions and
lines that their `how` names; nothing of the code is kept.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
from torch import Tensor

from fieldsmith.paths import RectifiedFlow, VariancePreserving

FLOW = RectifiedFlow()
SD15 = VariancePreserving((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0))


def released(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pathlib.Path(__file__).parent / f"{name}.json").read_text())
    assert len(found["commit"]) == 40
    return found


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def tensors(of: dict[str, Any], *names: str) -> tuple[Tensor, ...]:
    return tuple(tensor(of[name]) for name in names)


def same(ours: Tensor, theirs: Any) -> None:
    torch.testing.assert_close(ours, tensor(theirs), rtol=1e-5, atol=1e-5)


def slope(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), of, retain_graph=True)[0]
