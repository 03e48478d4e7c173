"""Preference pairs as `align` learns from them: latents of both images, their prompt, and which pairs are held out.

In: the user's `Preferences`. Out: `Pairs`, whose images are encoded when an update asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.models.core import Model
from fieldsmith.pictures import Encoded, Frame, encoded
from fieldsmith.preferences import Preferences

APART = 10  # of so many prompts (or pairs, where prompts are fewer) one is held out


@dataclass(frozen=True)
class Pairs:
    """n pairs."""

    chosen: Tensor | Encoded  # latents (n, ...)
    rejected: Tensor | Encoded
    prompt: Tensor  # (n,), a place in config.prompts
    held_out: Tensor  # (n,) bool

    @staticmethod
    def of(model: Model, config: AlignConfig, given: Preferences) -> Pairs:
        shape = model.decode(model.noise(1, torch.Generator().manual_seed(0))).shape
        both = given.images(Frame(shape[-1], shape[1], config.fit, config.background))
        chosen, rejected = (encoded(images, model.encode_images) for images in both)
        places = {prompt: i for i, prompt in enumerate(config.prompts)}
        prompt = torch.tensor([places[words] for words in given.prompts])
        return Pairs(chosen, rejected, prompt, held_out(given.prompts))


def held_out(prompts: Sequence[str]) -> Tensor:
    """Which pairs (n,) are not trained on: all of every tenth prompt, so that no image of them is seen in training
    either; every tenth pair where there are fewer prompts than that."""
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    numbers = [places[prompt] for prompt in prompts] if len(places) >= APART else range(len(prompts))
    return torch.tensor([number % APART == APART - 1 for number in numbers])
