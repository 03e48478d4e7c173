"""AdamW by name: torch's, or one with moments in 8 bits. The state of both is all tensors, for checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fieldsmith.errors import InputError

OPTIMIZERS = ("adamw", "adamw8bit")


def check(kind: str) -> None:
    """Raises InputError at an unknown name, or one whose package is not installed."""
    if kind not in OPTIMIZERS:
        raise InputError(f"optimizer '{kind}' is unknown; known: {', '.join(OPTIMIZERS)}")
    if kind == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("optimizer 'adamw8bit' needs bitsandbytes; pip install fieldsmith[8bit], or use adamw")


def adamw(params: Sequence[Tensor], lr: float, weight_decay: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """AdamW of this kind, one of OPTIMIZERS. Raises InputError as `check`."""
    check(kind)
    if kind == "adamw":
        # in one pass over each parameter; FSDP's parts have no such kernel
        fused = all(p.device.type in ("cpu", "cuda") and not isinstance(p, DTensor) for p in params)
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=fused)
    return _eight_bit(params, lr, weight_decay)


def _eight_bit(params: Sequence[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, with a state that checkpoints can hold: a step count is a tensor, a code map each its own.

    Parameters of fewer than 4,096 numbers keep moments of 32 bits, as bitsandbytes has it.
    """
    base: Any = importlib.import_module("bitsandbytes").optim.AdamW8bit

    class AdamW8bit(base):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            for state in self.state.values():
                if "step" in state:
                    state["step"] = int(state["step"])
            loss = super().step(closure)
            for state in self.state.values():
                state["step"] = torch.tensor(float(state["step"]))
            return loss

        def init_state(self, group: Any, p: Tensor, group_index: int, place: int) -> None:
            super().init_state(group, p, group_index, place)
            for name in ("qmap1", "qmap2"):
                if name in self.state[p]:
                    self.state[p][name] = self.state[p][name].clone()

    return AdamW8bit(params, lr=lr, weight_decay=weight_decay)
