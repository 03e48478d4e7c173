"""One turn of an editor: images in, instruction, images out, as inference does it.

In: a model that takes source images, prompts, images (n, 3, h, w) in [0, 1]. Out: edited images, 8-bit levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition, Model, stack
from fieldsmith.models.families import NO_SOURCES
from fieldsmith.samplers import rollout


def check_editor(model: Model) -> None:
    """Raises InputError where the model takes no source images."""
    if not hasattr(model, "with_images"):
        raise InputError(f"{model.name} (family {model.family}) {NO_SOURCES}")


@torch.no_grad()
def encode_unique(model: Model, prompts: Sequence[str]) -> Condition:
    """Prompts encoded, each different one once."""
    different = list(dict.fromkeys(prompts))
    parts = [model.encode(different[i : i + 64]) for i in range(0, len(different), 64)]
    return stack(parts)[torch.tensor([different.index(prompt) for prompt in prompts])]


def states_of(model: Model, images: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [0, 1] as clean states, (n, ...), which `with_latents` takes as sources.

    Raises InputError where they have another size than the model's own images.
    """
    size: int = getattr(model, "resolution", images.shape[-1])
    if tuple(images.shape[2:]) != (size, size):
        raise InputError(
            f"images of {images.shape[2]} x {images.shape[3]} pixels cannot be states of {model.name}, which draws "
            f"{size} x {size}; resize them, or load the model at their resolution"
        )
    return model.encode_images(images.to(model.device))


def quantised(images: Tensor) -> Tensor:
    """Images in [0, 1] at 8-bit levels, as they are saved and read again between two turns."""
    return (images.clamp(0, 1) * 255).round() / 255


@torch.no_grad()
def edit(
    model: Model,
    condition: Condition,
    images: Tensor,
    generator: torch.Generator,
    steps: int,
    guidance: float | None = None,
) -> Tensor:
    """One turn by the ODE from fresh noise: (n, 3, h, w) in [0, 1] at 8-bit levels, on the CPU.

    At most `model.chunk` at once; of several processes each edits its part, and all get all images.
    """
    editor: Any = model
    noise = model.noise(len(images), generator)
    grid = model.grid(steps)
    parts = []
    for at, real in processes.chunks(processes.owned(len(images)), model.chunk):
        seen = editor.with_images(condition[at], images[at])
        x_0 = rollout(lambda x, t: model.predict(x, t, seen, guidance), noise[at], grid).last  # noqa: B023
        if real:
            parts.append(quantised(model.decode(x_0)).cpu())
    return processes.gather(torch.cat(parts) if parts else images[:0].cpu())
