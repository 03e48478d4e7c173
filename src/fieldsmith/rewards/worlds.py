"""Exact judges of the shapes and the emoji world, 0 or 1 an image: GenEval's (Ghosh et al., 2023), from pixels alone.

All are black box: no gradient flows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from scipy.ndimage import label
from torch import Tensor

from fieldsmith.errors import InputError, check_word
from fieldsmith.rewards.reward import Reward
from fieldsmith.worlds.asked import Asked
from fieldsmith.worlds.emoji_captions import Scene
from fieldsmith.worlds.shapes import PALETTE, Concept

HALVES = ("left", "right", "top", "bottom")
EMOJI = ("right", "count", "valid")


def reward(name: str, argument: str | None, world: Asked | None) -> Reward:
    """What a prompt asks for, by the world's judge.

    right: all of it; valid: anything that the world knows. Shapes: shape, colour: that one attribute; count: the ink is
    one piece; position:left|right|top|bottom: the ink's centroid lies in that half; an attribute left open is right in
    any valid image. Emoji: count: the objects and how many of each, wherever they are.
    Raises InputError without a world, at what it does not judge, or at an unknown half.
    """
    if world is None:
        raise InputError(
            f"reward '{name}' is the judge of a world, and this model has none; use a model whose card.json names one, "
            "such as zoo:shapes-flux"
        )
    if world.name == "emoji" and name not in EMOJI:
        raise InputError(f"reward '{name}' is the shapes world's; the emoji world has {', '.join(EMOJI)}")
    if name == "position":
        check_word(argument or "", HALVES, "positions")
    judge_of = world

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = images.float().cpu()
        if name == "count" and judge_of.name == "shapes":
            verdicts = pieces(pixels) == 1
        elif name == "position":
            verdicts = in_half(pixels, argument or "")
        else:
            judged = judge_of.world.judge(pixels)
            wanted = [None if name == "valid" else _part(name, judge_of.parse(prompt)) for prompt in prompts]
            # shows() reads the whole batch, so it is called once for each concept
            rows = {concept: judged.valid if concept is None else judged.shows(concept) for concept in set(wanted)}
            verdicts = torch.tensor([bool(rows[concept][i]) for i, concept in enumerate(wanted)])
        return verdicts.to(images.device, torch.float32)

    return Reward(f"{name}:{argument}" if argument else name, False, judge)


def _part(name: str, asked: Any) -> Any:
    """What of the prompt the named judge asks for."""
    if isinstance(asked, Scene):
        groups = tuple(replace(group, small=False) for group in asked.groups)
        return Scene(groups) if name == "count" else asked
    return Concept(
        asked.colour if name in ("right", "colour") else None, asked.shape if name in ("right", "shape") else None
    )


def ink(images: Tensor) -> Tensor:
    """Whether each pixel is nearer to a palette colour than to any grey, as the judge has it; (n, h, w) bool."""
    pixels = images.clamp(0, 1).permute(0, 2, 3, 1)
    palette = torch.tensor(list(PALETTE.values()))
    to_ink = (pixels[..., None, :] - palette).pow(2).sum(-1).amin(-1)
    to_grey = (pixels - pixels.mean(-1, keepdim=True).clamp(0.62, 1)).pow(2).sum(-1)
    return to_ink < to_grey


def pieces(images: Tensor) -> Tensor:
    """How many connected pieces of ink each image has, corners touching; (n,) int."""
    touching = numpy.ones((3, 3))
    return torch.tensor([label(mask, touching)[1] for mask in ink(images).numpy()], dtype=torch.long)


def in_half(images: Tensor, half: str) -> Tensor:
    """Whether the ink's centroid lies strictly in that half; False without ink. (n,) bool."""
    mask = ink(images).float()
    along = mask.sum(1 if half in ("left", "right") else 2)  # ink by column or by row
    offset = torch.arange(along.shape[1]) - (along.shape[1] - 1) / 2
    moment = (along * offset).sum(1)
    return moment < 0 if half in ("left", "top") else moment > 0
