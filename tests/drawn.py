"""Numbers that tests draw: equal seeds give equal ones, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, of that shape."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
