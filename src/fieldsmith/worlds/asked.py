"""Worlds whose pictures are asked for with prompts: what align, erase, rewards and diagnoses need to know of each.

In: the name of a world. Out: an `Asked`, whose judge reads from pixels alone whether a prompt was followed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fieldsmith.worlds import emoji_captions, emoji_groups, shapes, shapes_groups
from fieldsmith.worlds.emoji import EmojiWorld
from fieldsmith.worlds.shapes import ShapesWorld

Concept = Hashable  # what a prompt asks for, or what is erased; str() is its name


@dataclass(frozen=True)
class Asked:
    """A world of prompts; every function is a plain one of its modules."""

    name: str
    world: Any  # draws pictures, captions and judges them: `measure.detection.World`
    parse: Callable[[str], Concept]  # of a prompt; raises InputError at one that the world does not know
    training_captions: Callable[[], tuple[str, ...]]  # what align trains on where no prompts are given
    other_captions: Callable[[], tuple[str, ...]]  # on which side effects are seen
    concepts: Callable[[], list[Any]]  # what `diagnose concepts` asks for, in the groups of `kinds`
    kinds: Callable[[], Mapping[str, Sequence[Any]]]
    erased: Callable[[Sequence[str]], list[Any]]  # what target prompts name
    groups: Callable[[Any, Sequence[Any]], Mapping[str, Sequence[Any]]]  # target, neighbours, unrelated
    paraphrases: Callable[[Any], Sequence[str]]  # prompts for a target in other words
    phrasings: Callable[[str, str], Sequence[tuple[str, str]]]  # ways to ask for a target, each with its anchor's words
    anchor: Callable[[Any], str]  # the words of what is nearest to a target, for an erasure
    kept: Callable[[Sequence[str]], Sequence[str]]  # prompts that an erasure of these targets should leave alone


def load(name: str, size: int) -> Asked | None:
    """The world of this name at a size in pixels; None where no world of this name is asked with prompts."""
    if name == "shapes":
        return Asked(
            name, ShapesWorld(size), shapes.parse, shapes.training_captions, shapes.open_captions, shapes.concepts,
            shapes_groups.attributes, shapes_groups.erased_concepts, shapes_groups.groups, shapes_groups.paraphrases,
            shapes_groups.phrasings, shapes_groups.anchor, shapes_groups.kept_captions,
        )  # fmt: skip
    if name == "emoji":
        return Asked(
            name, EmojiWorld(size), emoji_captions.parse, emoji_groups.training_captions, emoji_groups.other_captions,
            emoji_groups.scenes, emoji_groups.kinds, emoji_groups.erased_objects, emoji_groups.groups,
            emoji_groups.paraphrases, emoji_groups.phrasings, emoji_groups.anchor, emoji_groups.kept_captions,
        )  # fmt: skip
    return None
