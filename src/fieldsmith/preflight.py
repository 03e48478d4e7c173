"""Checks before the first update, in seconds: each number beside what a healthy one looks like (design, section 6).

In: measured numbers. Out: a printed table; RunError or InputError before anything is trained if one is unhealthy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models.core import Model


@dataclass(frozen=True)
class Check:
    """One number, what it should be, whether it is, and what to do if it is not."""

    name: str
    value: float
    healthy: str
    passed: bool
    fix: str


def require(checks: list[Check], quiet: bool = False) -> None:
    """Print the checks and raise InputError with the first fix that is needed."""
    if not quiet:
        table = Table(title="preflight", title_justify="left")
        for header in ("check", "value", "healthy", ""):
            table.add_column(header, justify="right" if header == "value" else "left")
        for check in checks:
            table.add_row(check.name, f"{check.value:.3g}", check.healthy, "ok" if check.passed else "FAILED")
        Console(stderr=True).print(table)
    for check in checks:
        if not check.passed:
            raise InputError(f"preflight: {check.name} is {check.value:.3g}, healthy is {check.healthy}; {check.fix}")


def check_sampled(model: Model, steps: int) -> None:
    """Raises InputError where the model has no null prompt, in its own words, or cannot be sampled in these steps."""
    model.encode([""])
    try:
        model.grid(steps)
    except ValueError as error:
        raise InputError(f"sampler_steps={steps}: {error}") from error


def separation(anchor: Tensor, target: Tensor, names: str) -> Check:
    """Anchor and target prompts give different velocities: mean ||p - n|| / ||n|| of (batch, ...)."""
    gap = ((anchor - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).mean().item()
    fix = "the model reads the two prompts alike; choose another anchor"
    return Check(f"anchor differs from target ({names})", gap, "above 0.001", gap > 1e-3, fix)


def gradients(model: Model, loss: Tensor) -> list[Check]:
    """Gradient reaches every trainable layer and nothing else; behind a layer of zeros there is none at the start."""
    if loss.requires_grad:  # a process may have no row in it
        loss.backward()
    processes.add_gradients(list(model.trainable().values()))
    trained = {name: p for name, p in model.trainable().items() if model.DORMANT not in name}
    dead = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    strays = [n for n, p in model.network.named_parameters() if not p.requires_grad and p.grad is not None]
    for p in model.network.parameters():
        p.grad = None
    return [
        Check("trainable layers without gradient", len(dead), "0", not dead, f"train another subset than {dead[:1]}"),
        Check("frozen layers with gradient", len(strays), "0", not strays, "this is a defect of fieldsmith"),
    ]


def memory(model: Model, states: int) -> Check:
    """Gradients, moments and a coarse bound on activations against the device's memory that is left, in GB."""
    training = sum(12 * p.numel() for p in model.trainable().values())
    x = model.noise(1, torch.Generator().manual_seed(0))
    precision = model.precision or model.dtype
    activations = states * x.shape[1] * kept_by_token(model.network) * precision.itemsize
    need, free = (training + activations) / 1e9, model.free_memory() / 1e9
    return Check("memory needed, GB", need, f"below {free:.1f}", need < free, "lower `chunk` or `batch`")


def kept_by_token(network: Any) -> int:
    """Numbers that go into linear layers and come out, by token, which bounds what is kept for a backward pass: of all
    blocks, or under checkpointing of the widest one, and what goes into each."""

    def linears(module: torch.nn.Module) -> Iterator[torch.nn.Linear]:
        return (part for part in module.modules() if isinstance(part, torch.nn.Linear))

    def widths(module: torch.nn.Module) -> int:
        return sum(layer.in_features + layer.out_features for layer in linears(module))

    blocks = [block for part in network.children() if isinstance(part, torch.nn.ModuleList) for block in part]
    if not (blocks and getattr(network, "is_gradient_checkpointing", False)):  # of diffusers alone
        return widths(network)
    taken = (min((layer.in_features for layer in linears(block)), default=0) for block in blocks)
    return max(widths(block) for block in blocks) + sum(taken)
