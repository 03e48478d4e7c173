"""Flags that all five verbs share: how a run is made to fit, whatever it learns.

In: a `Memory`, and what the verb trains. Out: a model loaded accordingly, and the optimizer that moves it. They stand
beside each verb's own settings, and a run's config.toml names those that are not the defaults.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fieldsmith.errors import InputError

if TYPE_CHECKING:
    from fieldsmith.models.core import Model


@dataclass(frozen=True)
class Memory:
    """How a run is made to fit."""

    dtype: Literal["float32", "bf16"] = "float32"
    """Of frozen weights. bf16 halves them; LoRA weights, students, states and losses stay float32."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: equal gradients for a third more work."""
    offload: bool = False
    """Text encoders and autoencoder wait on the CPU while the denoiser works; on a CPU-only machine nothing moves."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's moments in 8 bits; it comes with `pip install fieldsmith[8bit]`."""


DEFAULT = Memory()


def said(memory: Memory) -> dict[str, Any]:
    """The settings that are not the defaults, as config.toml has them."""
    return {name: value for name, value in vars(memory).items() if value != getattr(Memory, name)}


def taken(settings: dict[str, Any]) -> Memory:
    """Out of a file's settings, which keep the rest."""
    return Memory(**{f.name: settings.pop(f.name) for f in dataclasses.fields(Memory) if f.name in settings})


def check(memory: Memory, frozen: bool, what: str) -> None:
    """Raises InputError where the options do not fit each other or the run; `frozen`: some weights stay as they are.

    `what` names the setting that trains every weight.
    """
    from fieldsmith import optimizers

    optimizers.check(memory.optimizer)
    if memory.dtype == "bf16" and not frozen:
        raise InputError(
            f"dtype 'bf16' is for frozen weights, but {what} trains full ones, which need float32; leave out --dtype, "
            "or train a LoRA"
        )


def loaded(memory: Memory, name: str, resolution: int | None = None) -> Model:
    """The model, with its frozen weights in their type and its other parts where they wait."""
    import torch
    from rich.console import Console

    from fieldsmith.models import load

    model = load(name, resolution, torch.bfloat16 if memory.dtype == "bf16" else None)
    if memory.offload:
        from fieldsmith.models.memory import offload

        parts = offload(model)
        where = f"{', '.join(parts)} wait on the CPU" if parts else "nothing to do, the model is on the CPU already"
        Console(stderr=True).print(f"offload: {where}")
    return model


def prepare_training(memory: Memory, model: Model) -> None:
    """Set the model up to be trained as the options say."""
    if memory.checkpointing:
        from fieldsmith.models.memory import checkpoint_activations

        checkpoint_activations(model)
