"""Emoji on pastel grounds: pictures that anyone names at a glance, with captions that have a grammar.

One to three objects of 48, whole, apart from each other, large, middling or small; six backgrounds. So that a small
network can learn to draw them, objects begin at every eighth pixel, in the order in which they are named. A fifth of
the pairs never meets in training. emoji_captions.py has the grammar, emoji_judge.py reads pictures back.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from fieldsmith.errors import InputError, check_word
from fieldsmith.worlds.emoji_captions import BACKGROUNDS, GROUPS, OBJECTS, RELATIONS, Group, Scene
from fieldsmith.worlds.emoji_glyphs import LARGE, MIDDLE, SIDE, SMALL, USUAL, glyph, ground
from fieldsmith.worlds.emoji_judge import Verdicts, read
from fieldsmith.worlds.judged import place, readable

# GenEval's six kinds of question (Ghosh et al., 2023); both: a place, a size and a background at once; and two more
KINDS = (
    "single object", "two objects", "counting", "background", "position", "both", "counted pairs", "three objects"
)  # fmt: skip
# how often training data show a kind: more often what is harder to learn
WEIGHTS = {"single object": 0.14, "two objects": 0.22, "counting": 0.2, "position": 0.24, "counted pairs": 0.1,
           "three objects": 0.1}  # fmt: skip
HELD_OUT = 0.2  # share of the pairs of objects that no training picture shows together


@dataclass(frozen=True)
class Batch:
    """Pictures (n, 3, 48, 48) in [0, 1], one caption each, and what it says."""

    images: Tensor
    captions: list[str]
    scenes: list[Scene]


# what training shows, and what it never shows


def never_met(a: str, b: str) -> bool:
    """Whether two objects never meet in training data."""
    return place(" and ".join(sorted((a, b)))) < HELD_OUT


def neighbours(name: str) -> list[str]:
    """The other objects of an object's group. Raises InputError at an unknown one."""
    check_word(name, OBJECTS, "the emoji world's objects")
    return [other for group in GROUPS.values() if name in group for other in group if other != name]


def prompts(kind: str, n: int = 48, seed: int = 0, held_out: bool = False) -> list[str]:
    """n different captions that ask one kind of question (KINDS), fewer where there are fewer.

    With held_out=True some two of the objects never met in training. Raises InputError at an unknown kind, and where
    a kind has no pairs to hold out.
    """
    check_word(kind, KINDS, "the emoji world's kinds of prompts")
    if held_out and kind in ("single object", "counting", "background"):
        raise InputError(f"'{kind}' asks for one kind of object, so no pair is held out; choose another kind of prompt")
    draw = random.Random(f"{kind} {seed}")
    found: dict[str, None] = {}
    for _ in range(50 * n):
        if len(found) == n:
            break
        found[str(_scene(kind, draw, held_out))] = None
    return list(found)


def _scene(kind: str, draw: random.Random, apart: bool) -> Scene:
    """A scene that asks this kind of question; apart: two of its objects never meet in training, else none do so."""
    if kind in ("single object", "background"):
        scene = Scene((Group(draw.choice(OBJECTS)),))
    elif kind == "counting":
        scene = Scene((Group(draw.choice(OBJECTS), draw.choice((2, 3))),))
    else:
        names = _names(3 if kind == "three objects" else 2, draw, apart)
        counts = draw.choice(((1, 2), (2, 1))) if kind == "counted pairs" else (1,) * len(names)
        scene = Scene(tuple(Group(name, count) for name, count in zip(names, counts, strict=True)))
    if kind in ("position", "both"):
        scene = replace(scene, relation=draw.choice(RELATIONS))
    if kind == "both":
        small = draw.randrange(2)
        scene = replace(scene, groups=tuple(replace(g, small=i == small) for i, g in enumerate(scene.groups)))
    if kind in ("background", "both"):
        scene = replace(scene, background=draw.choice(tuple(BACKGROUNDS)))
    return scene


def _names(count: int, draw: random.Random, apart: bool) -> list[str]:
    while True:
        names = draw.sample(OBJECTS, count)
        if any(never_met(a, b) for a in names for b in names if a < b) == apart:
            return names


def _training_scene(draw: random.Random, apart: bool) -> Scene:
    """A kind by its weight; a quarter of one or two objects small, the background named in three quarters."""
    weights = {k: w for k, w in WEIGHTS.items() if not apart or k not in ("single object", "counting")}
    scene = _scene(draw.choices(list(weights), list(weights.values()))[0], draw, apart)
    if len(scene.objects) < 3:
        scene = replace(scene, groups=tuple(replace(g, small=draw.random() < 0.25) for g in scene.groups))
    background = draw.choice(tuple(BACKGROUNDS)) if draw.random() < 0.75 else None
    return replace(scene, background=background)


# drawing


def _lay_out(scene: Scene, draw: random.Random, anywhere: bool) -> list[tuple[str, int, int, int]]:
    """Name, side, left and top of each object, in pixels."""
    objects = scene.objects
    kinds = [SMALL if one.small else LARGE if len(objects) == 1 else MIDDLE for one in objects]
    sides = [draw.choice(kind) for kind in kinds]
    if len(objects) == 1:
        free = 10 if objects[0].small else 2
        centres = [(24 + draw.randint(-free, free), 24 + draw.randint(-free, free))]
    elif len(objects) == 2:
        aside = scene.relation in ("left of", "right of") if scene.relation else draw.random() < 0.5
        first = scene.relation in ("left of", "above") if scene.relation else draw.random() < 0.5
        drift = draw.randint(-3, 3)
        centres = []
        for along in (12, 36) if first else (36, 12):
            along, across = along + draw.randint(-1, 1), 24 + drift + draw.randint(-1, 1)
            centres.append((along, across) if aside else (across, along))
    else:
        corners = [(12, 12), (36, 12), (24, 36)] if draw.random() < 0.5 else [(24, 12), (12, 36), (36, 36)]
        centres = [(x + draw.randint(-1, 1), y + draw.randint(-1, 1)) for x, y in draw.sample(corners, 3)]
    places = [(x - side // 2, y - side // 2) for side, (x, y) in zip(sides, centres, strict=True)]
    if not anywhere:
        sides = [USUAL[kind] for kind in kinds]
        places = [(on_grid(x), on_grid(y)) for x, y in places]
        if scene.relation is None:  # objects are read in the order in which they are named
            places.sort(key=lambda at: at[0] + 2 * at[1])
    return [(one.name, side, *at) for one, side, at in zip(objects, sides, places, strict=True)]


def on_grid(pixel: int) -> int:
    """The nearest place where an object may begin: 2, 10, 18 or 26."""
    return 8 * min(round((pixel - 2) / 8), 3) + 2


class EmojiWorld:
    """The world, at 48 pixels; anywhere=True: objects not on its grid, and of all sides that the judge knows."""

    name = "emoji"
    channels = 3

    def __init__(self, size: int = SIDE, anywhere: bool = False):
        if size != SIDE:
            raise InputError(f"size={size}: the emoji world is drawn and judged at {SIDE} pixels")
        self.size, self.anywhere = size, anywhere

    def caption(self, scene: Scene) -> str:
        """The prompt that asks for the scene."""
        return str(scene)

    def sample(self, n: int, seed: int, held_out: bool = False) -> Batch:
        """n captioned pictures; held_out=True: each with two objects that never meet in training, else none has."""
        draw = random.Random(2 * seed + held_out)
        scenes = [_training_scene(draw, held_out) for _ in range(n)]
        images = self.render(scenes, torch.Generator().manual_seed(2 * seed + held_out))
        return Batch(images, [str(scene) for scene in scenes], scenes)

    def render(self, chosen: Sequence[Scene], generator: torch.Generator) -> Tensor:
        """Pictures (n, 3, 48, 48) in [0, 1], everything left open drawn at random. Raises InputError at no object."""
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        images = numpy.empty((len(chosen), SIDE, SIDE, 3), numpy.float32)
        for image, scene in zip(images, chosen, strict=True):
            if not scene.groups:
                raise InputError("a scene without objects cannot be drawn; name one, as in 'a cat on blue'")
            image[:] = ground(scene.background or draw.choice(tuple(BACKGROUNDS)))
            for name, side, left, top in _lay_out(scene, draw, self.anywhere):
                ink, cover = glyph(name, side)
                under = image[top : top + side, left : left + side]
                under += cover * (ink - under)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def judge(self, images: Tensor) -> Verdicts:
        """Read pictures (n, 3, 48, 48) in [0, 1]. Raises InputError at another shape; NaN is no picture."""
        return read(*readable(images, self))  # type: ignore[arg-type]
