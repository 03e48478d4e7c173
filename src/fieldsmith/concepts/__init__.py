"""Lists of concepts that papers on erasing use, a text file each: whose neighbours a target's are.

In: a list's name (imagenette, i2p, styles, unlearncanvas-objects, unlearncanvas-styles), or a file with one a line.
Out: its concepts. Lines that begin with # say what a list is.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from fieldsmith.errors import InputError
from fieldsmith.read import read_lines

FOLDER = pathlib.Path(__file__).parent
PACKAGED = tuple(sorted(file.stem for file in FOLDER.glob("*.txt")))
ARTICLES = ("a", "an", "the")


def plain(concept: str) -> str:
    """A concept without its article, in small letters: 'a  Cat' and 'cat' are one."""
    words = concept.casefold().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ARTICLES else words)


def stem(concept: str) -> str:
    """The same without a plural's end: 'a cat' and 'cats' are one."""
    return plain(concept).removesuffix("s")


def load(words: Sequence[str]) -> tuple[str, ...]:
    """Concepts as they are, or those of the one list or file (.txt) that is named.

    Raises InputError where a list cannot be read, has none, or has one twice.
    """
    if len(words) == 1 and (words[0] in PACKAGED or words[0].endswith(".txt")):
        file = FOLDER / f"{words[0]}.txt" if words[0] in PACKAGED else pathlib.Path(words[0])
        lines = [(number, line) for number, line in read_lines(file, "concept list") if not line.startswith("#")]
        if not lines:
            copy = f"; copy '{file}', write a name a line and give the copy" if words[0] in PACKAGED else ""
            raise InputError(f"concept list '{words[0]}' names no concept{copy or '; write one a line'}")
        return _without_doubles([line for _, line in lines], f"concept list '{words[0]}'")
    return _without_doubles(words, "neighbours")


def around(target: str) -> tuple[str, ...]:
    """The others of the first packaged list that has the target; () where none has it."""
    for name in PACKAGED:
        listed = () if name == "celebrities" else load([name])
        if stem(target) in map(stem, listed):
            return tuple(concept for concept in listed if stem(concept) != stem(target))
    return ()


def _without_doubles(concepts: Sequence[str], where: str) -> tuple[str, ...]:
    seen: set[str] = set()
    for concept in concepts:
        if plain(concept) in seen:
            raise InputError(f"'{concept}' stands twice in {where}; delete one")
        seen.add(plain(concept))
    return tuple(concepts)
