"""Which emoji scenes a model is asked for: to train it, to see what else changes, to judge an object's erasure.

In: an object's name, or prompts that name some. Out: scenes and prompts in groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from fieldsmith.errors import InputError
from fieldsmith.worlds.emoji import KINDS, neighbours, prompts
from fieldsmith.worlds.emoji_captions import BACKGROUNDS, OBJECTS, Group, Scene, parse

UNSEEN = "two objects, never together"  # pairs that no training picture shows


def training_captions() -> tuple[str, ...]:
    """24 prompts of each kind."""
    return tuple(prompt for kind in KINDS for prompt in prompts(kind, 24))


def other_captions() -> tuple[str, ...]:
    """Prompts that `training_captions` lacks: pairs that never meet in training, and other scenes of each kind."""
    others = [*prompts("two objects", 24, held_out=True), *(p for kind in KINDS for p in prompts(kind, 6, seed=1))]
    return tuple(prompt for prompt in dict.fromkeys(others) if prompt not in training_captions())


def kinds() -> dict[str, list[Scene]]:
    """Scenes by the kind of question that they ask; pairs that never meet in training apart."""
    asked = {kind: prompts(kind, 24, seed=2) for kind in KINDS}
    asked[UNSEEN] = prompts("two objects", 24, seed=2, held_out=True)
    return {kind: [parse(prompt) for prompt in found] for kind, found in asked.items()}


def scenes() -> list[Scene]:
    """All scenes of `kinds`, each once."""
    return list(dict.fromkeys(scene for found in kinds().values() for scene in found))


def erased_objects(targets: Sequence[str]) -> list[str]:
    """The objects that target prompts name. Raises InputError at a prompt that names none, or more than one."""
    named = []
    for prompt in targets:
        names = {group.name for group in parse(prompt).groups}
        if len(names) != 1:
            raise InputError(f"target '{prompt}' names {len(names)} kinds of objects; name one, as in 'a cat'")
        named.append(names.pop())
    return list(dict.fromkeys(named))


def groups(target: str, others: Sequence[str] = ()) -> dict[str, list[Scene]]:
    """The target alone, twice, three times and beside others; its neighbours and what is unrelated, alone.

    Neighbours are the rest of the target's group. `others` are erased too, so they are left out.
    """
    kept = [name for name in OBJECTS if name not in (target, *others)]
    near = [name for name in kept if name in neighbours(target)]
    target_scenes = [Scene((Group(target, count),)) for count in (1, 2, 3)]
    beside = [Scene((Group(target), Group(name))) for name in kept[:: len(kept) // 5]]
    return {
        "target": [*target_scenes, *beside],
        "neighbours": [Scene((Group(name),)) for name in near],
        "unrelated": [Scene((Group(name),)) for name in kept if name not in near],
    }


def paraphrases(target: str) -> list[str]:
    """Prompts that show the target otherwise: small, on every background, beside the next object of its group."""
    other = Group((neighbours(target))[0])
    small = [Scene((Group(target, small=True),)), Scene((Group(target, 2, small=True),))]
    grounds = [Scene((Group(target),), background=name) for name in BACKGROUNDS]
    placed = [Scene((Group(target), other), "left of"), Scene((other, Group(target)), "above")]
    return [str(scene) for scene in (*small, *grounds, *placed)]
