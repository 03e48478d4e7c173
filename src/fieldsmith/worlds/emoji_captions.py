"""What can be asked of the emoji world: 48 objects, six backgrounds, and captions with a grammar.

"a cat on blue", "an apple and a dog", "three lemons on grey", "two lemons and a car", "a small star above a bus". One
to three objects; where one is seen from the other only of two, small only of one or two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fieldsmith.errors import InputError, check_word

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


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


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
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise _unknown(caption, f"it names '{twice[0]}' twice; say 'two {PLURALS[twice[0]]}'")
    if len(scene.objects) > 3 or (relation and len(scene.objects) > 2):
        raise _unknown(caption, "it has too many objects; ask for at most three, or for two single ones with a place")
    if len(scene.objects) > 2 and any(group.small for group in groups):
        raise _unknown(caption, "of three objects none is small; leave out 'small'")
    if str(scene) != " ".join(caption.lower().split()):  # an article or a plural is not as it should be
        raise _unknown(caption, f"write '{scene}'")
    return scene


def _take_group(words: list[str], caption: str) -> Group:
    """Take an object with what stands before it off the front of the words."""
    count, small = 1, False
    if words and words[0] in ("a", "an", *NUMBERS):
        count = NUMBERS.get(words.pop(0), 1)
    if words[:1] == ["small"]:
        small = bool(words.pop(0))
    if not words:
        raise _unknown(caption, "it ends where an object should follow")
    names = {word: name for name, plural in PLURALS.items() for word in (name, plural)}
    check_word(words[0], tuple(names), "the emoji world's objects")
    return Group(names[words.pop(0)], count, small)


def _take_background(words: list[str], caption: str) -> str:
    """The background that 'on', the first of the words, announces."""
    if len(words) != 2:
        raise _unknown(caption, f"'on' ends a caption with one background: {', '.join(BACKGROUNDS)}")
    check_word(words[1], tuple(BACKGROUNDS), "the emoji world's backgrounds")
    return words[1]


def _unknown(caption: str, why: str) -> InputError:
    return InputError(f"'{caption}' is no caption of the emoji world: {why}")
