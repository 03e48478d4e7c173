"""Exact judges of the shapes world, 0 or 1 an image: that world's GenEval (Ghosh et al., 2023), from pixels alone.

All are black box: no gradient flows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from scipy.ndimage import label
from torch import Tensor

from fieldsmith.errors import InputError, check_word
from fieldsmith.rewards.reward import Reward
from fieldsmith.worlds.shapes import PALETTE, Concept, ShapesWorld, parse

HALVES = ("left", "right", "top", "bottom")


def reward(name: str, argument: str | None, world: ShapesWorld | None) -> Reward:
    """right, shape, colour: what the prompt names of both, or of that one, is what the judge sees; valid: a shape.

    count: the ink is one piece; position:left|right|top|bottom: the ink's centroid lies in that half. Open attributes
    are right in any valid image. Raises InputError without a world, or at an unknown half.
    """
    if world is None:
        raise InputError(
            f"reward '{name}' is the shapes world's judge, and this model has no such world; use zoo:shapes-flux"
        )
    if name == "position":
        check_word(argument or "", HALVES, "positions")
    judge_of = world

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = images.float().cpu()
        if name == "count":
            verdicts = pieces(pixels) == 1
        elif name == "position":
            verdicts = in_half(pixels, argument or "")
        else:
            judged = judge_of.judge(pixels)
            wanted = [_part(name, parse(prompt)) if name != "valid" else Concept() for prompt in prompts]
            # shows() reads the whole batch, so it is called once for each concept
            rows = {concept: judged.shows(concept) for concept in set(wanted)}
            verdicts = torch.tensor([bool(rows[concept][i]) for i, concept in enumerate(wanted)])
        return verdicts.to(images.device, torch.float32)

    return Reward(f"{name}:{argument}" if argument else name, False, judge)


def _part(name: str, concept: Concept) -> Concept:
    """What of the concept the named judge asks for."""
    return Concept(
        concept.colour if name in ("right", "colour") else None, concept.shape if name in ("right", "shape") else None
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
