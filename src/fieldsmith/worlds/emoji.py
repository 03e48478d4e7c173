"""Emoji on pastel grounds: pictures that anyone names at a glance, with captions that have a grammar.

One to three objects of 48, whole, apart from each other, large, middling or small; six backgrounds. A fifth of the
pairs of objects never meets in training. emoji_judge.py reads pictures back from their pixels alone. The pictures are
the Noto colour emoji (SIL Open Font License, emoji-OFL.txt).
"""

from __future__ import annotations

import pathlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy
import torch
from PIL import Image
from torch import Tensor

from fieldsmith.errors import InputError, check_word
from fieldsmith.worlds.judged import place

GROUPS = {
    "animals": ("cat", "dog", "fox", "panda", "frog", "pig", "lion", "chick", "bear", "koala", "rabbit", "monkey",
                "penguin", "mouse"),
    "fruit": ("apple", "banana", "lemon", "orange", "pear", "strawberry", "pineapple", "watermelon"),
    "food": ("pizza", "donut", "cookie", "burger", "carrot", "cake", "mushroom"),
    "vehicles": ("car", "bus", "rocket", "tractor", "truck", "train", "boat", "bicycle"),
    "things": ("ball", "star", "heart", "sun", "tree", "house", "umbrella", "tulip", "moon", "balloon", "crown"),
}  # fmt: skip
OBJECTS = tuple(name for group in GROUPS.values() for name in group)
PLURALS = {
    name: {"fox": "foxes", "mouse": "mice", "strawberry": "strawberries", "bus": "buses"}.get(name, name + "s")
    for name in OBJECTS
}
BACKGROUNDS = {  # RGB in [0, 255]
    "white": (250, 250, 250),
    "blue": (190, 220, 250),
    "pink": (250, 205, 220),
    "green": (205, 240, 205),
    "yellow": (250, 240, 190),
    "grey": (205, 205, 210),
}
NUMBERS = {"two": 2, "three": 3}
RELATIONS = ("left of", "right of", "above", "below")
VOCABULARY = (
    "a", "an", *NUMBERS, "small", "and", "left", "right", "of", "above", "below", "on", *BACKGROUNDS, *OBJECTS,
    *PLURALS.values(),
)  # fmt: skip
LONGEST = 10  # words of a caption: "a small cat left of a small dog on blue", "a cat and a dog and a fox on blue"
# GenEval's six kinds of question (Ghosh et al., 2023); both: a place, a size and a background at once; and two more
KINDS = (
    "single object", "two objects", "counting", "background", "position", "both", "counted pairs", "three objects"
)  # fmt: skip
# how often training data show a kind: more often what is harder to learn
WEIGHTS = {"single object": 0.14, "two objects": 0.22, "counting": 0.2, "position": 0.24, "counted pairs": 0.1,
           "three objects": 0.1}  # fmt: skip
HELD_OUT = 0.2  # share of the pairs of objects that no training picture shows together
SIDE = 48  # pixels
LARGE, MIDDLE, SMALL = (34, 36, 38), (20, 21, 22), (15, 16)  # sides of an object in pixels; LARGE only where alone
ATLAS = pathlib.Path(__file__).parent / "emoji.png"
CELL, COLUMNS = 64, 8  # of the atlas


@dataclass(frozen=True)
class Group:
    """Some objects of one name, as a caption names them."""

    name: str
    count: int = 1
    small: bool = False

    def __str__(self) -> str:
        small = "small " if self.small else ""
        if self.count > 1:
            number = next(word for word, count in NUMBERS.items() if count == self.count)
            return f"{number} {small}{PLURALS[self.name]}"
        return f"{_article(small or self.name)} {small}{self.name}"


@dataclass(frozen=True)
class Scene:
    """What a caption asks for; None where it leaves something open. Without groups it asks for any picture."""

    groups: tuple[Group, ...] = ()
    relation: str | None = None  # of RELATIONS: where the first of two single objects is, seen from the second
    background: str | None = None

    def __str__(self) -> str:
        between = f" {self.relation} " if self.relation else " and "
        words = between.join(str(group) for group in self.groups)
        return f"{words} on {self.background}" if self.background else words

    @property
    def objects(self) -> list[Group]:
        """One group of one for each object."""
        return [replace(group, count=1) for group in self.groups for _ in range(group.count)]


@dataclass(frozen=True)
class Batch:
    """Pictures (n, 3, 48, 48) in [0, 1], one caption each, and what it says."""

    images: Tensor
    captions: list[str]
    scenes: list[Scene]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# captions


def parse(caption: str) -> Scene:
    """What a caption asks for; '' asks for any picture.

    Raises InputError at an unknown object or background, with the nearest known one, and at what the grammar lacks.
    """
    words = caption.lower().split()
    if not words:
        return Scene()
    groups, relation = [_take_group(words, caption)], None
    while words and words[0] != "on":
        joint = words.pop(0)
        if joint in ("left", "right") and words[:1] == ["of"]:
            joint = f"{joint} {words.pop(0)}"
        if joint != "and" and joint not in RELATIONS:
            raise _unknown(caption, f"'{joint}' joins no objects; use 'and', 'left of', 'right of', 'above' or 'below'")
        if relation or (joint != "and" and len(groups) > 1):
            raise _unknown(caption, f"'{joint}' is one joint too many; places are told of two objects")
        relation = joint if joint in RELATIONS else None
        groups.append(_take_group(words, caption))
    background = _take_background(words, caption) if words else None
    scene = Scene(tuple(groups), relation, background)
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise _unknown(caption, f"it names '{names[-1]}' twice; say 'two {PLURALS[names[-1]]}'")
    if len(scene.objects) > 3 or (relation and len(scene.objects) > 2):
        raise _unknown(caption, "it has too many objects; ask for at most three, or for two single ones with a place")
    if len(scene.objects) > 2 and any(group.small for group in groups):
        raise _unknown(caption, "of three objects none is small; leave out 'small'")
    return scene


def _take_group(words: list[str], caption: str) -> Group:
    """Take an object with its article or number off the front of the words."""
    count = 1
    if words and words[0] in ("a", "an", *NUMBERS):
        count = NUMBERS.get(words.pop(0), 1)
    elif words and words[0] in OBJECTS:
        raise _unknown(caption, f"'{words[0]}' lacks its article; write '{_article(words[0])} {words[0]}'")
    small = words[:1] == ["small"]
    if small:
        words.pop(0)
    if not words:
        raise _unknown(caption, "it ends where an object should follow")
    word = words.pop(0)
    nouns = PLURALS if count > 1 else {name: name for name in OBJECTS}
    others = OBJECTS if count > 1 else tuple(PLURALS.values())
    if word in others:
        number = "more than one is named in the plural" if count > 1 else "one is named in the singular"
        raise _unknown(caption, f"'{word}' does not fit its number; {number}")
    check_word(word, tuple(nouns.values()), "the emoji world's objects")
    name = next(name for name, noun in nouns.items() if noun == word)
    return Group(name, count, small)


def _take_background(words: list[str], caption: str) -> str:
    """The background that 'on', the first of the words, announces."""
    if len(words) != 2:
        raise _unknown(caption, f"'on' ends a caption with one background: {', '.join(BACKGROUNDS)}")
    check_word(words[1], tuple(BACKGROUNDS), "the emoji world's backgrounds")
    return words[1]


def _unknown(caption: str, why: str) -> InputError:
    return InputError(f"'{caption}' is no caption of the emoji world: {why}")


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


@cache
def glyph(name: str, side: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """An object's colours (side, side, 3) and how far they cover what is behind, (side, side, 1); in [0, 1]."""
    row, column = divmod(OBJECTS.index(name), COLUMNS)
    with Image.open(ATLAS) as atlas:
        cell = atlas.crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    drawn = numpy.asarray(cell.resize((side, side), Image.Resampling.LANCZOS), numpy.float32) / 255
    return drawn[..., :3], drawn[..., 3:]


def ground(background: str) -> numpy.ndarray:
    """A background's colour, (3,) in [0, 1]."""
    return numpy.asarray(BACKGROUNDS[background], numpy.float32) / 255


def _lay_out(scene: Scene, draw: random.Random) -> list[tuple[str, int, int, int]]:
    """Name, side, left and top of each object, in pixels."""
    objects = scene.objects
    sides = [draw.choice(SMALL if one.small else LARGE if len(objects) == 1 else MIDDLE) for one in objects]
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
    return [
        (one.name, side, x - side // 2, y - side // 2)
        for one, side, (x, y) in zip(objects, sides, centres, strict=True)
    ]


class EmojiWorld:
    """The world, at 48 pixels."""

    name = "emoji"

    def __init__(self, size: int = SIDE):
        if size != SIDE:
            raise InputError(f"size={size}: the emoji world is drawn and judged at {SIDE} pixels")
        self.size = size

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
            for name, side, left, top in _lay_out(scene, draw):
                ink, cover = glyph(name, side)
                under = image[top : top + side, left : left + side]
                under += cover * (ink - under)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
