"""The ways in which fieldsmith refuses or stops; `cli` turns them into exit codes.

In: one sentence that names the value and the fix. Out: exit code 2 (bad input) or 3 (a run that failed).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """What the user gave cannot be used; nothing has been written. Exit code 2."""


class RunError(RuntimeError):
    """A run that started cannot go on (NaN, out of memory); its last good checkpoint stays. Exit code 3."""


class NotFiniteError(RunError):
    """A number of a model, a loss or a gradient is NaN or infinite."""


class ShortOfMemoryError(RunError):
    """What a run needs does not fit; `__cause__` is the exception behind it."""


class RewardError(RunError):
    """A reward or judge raised, or returned what cannot be used; `__cause__` is the exception behind it, if any."""


def check_word(word: str, vocabulary: Sequence[str], name: str) -> None:
    """Raise InputError if the word is not in a closed vocabulary, with the nearest word that is."""
    if word not in vocabulary:
        near = difflib.get_close_matches(str(word), vocabulary, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known words: {', '.join(sorted(vocabulary))}"
        raise InputError(f"'{word}' is not in the vocabulary of {name}; {hint}")


def is_short_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is short, of the machine or of an accelerator."""
    words = str(error).lower()
    kinds = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(kind in words for kind in kinds))
