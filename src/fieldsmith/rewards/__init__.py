"""Judgements of images: below methods, which climb them; beside worlds and metrics.

A reward is a function of images (n, 3, h, w) in [0, 1] and n prompts that returns n numbers, as a tensor, an array or
a list. `load` takes one, or words such as 'right', 'colour:red', 'mine.py:score' or '0.7*right-0.3*clip:FOLDER'.
Importing this costs no torch, so that `parse` can refuse a bad name at once; each kind of judge is a file here.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fieldsmith.errors import InputError, check_word
from fieldsmith.functions import check_signature, load_function, name_of

if TYPE_CHECKING:
    from fieldsmith.rewards.reward import Reward as Reward
    from fieldsmith.rewards.reward import check_images as check_images
    from fieldsmith.rewards.reward import score_batches as score_batches
    from fieldsmith.worlds.asked import Asked

OF_WORLD = ("right", "shape", "colour", "valid", "count", "position")
OF_PIXELS = ("brightness", "darkness", "saturation", "jpeg-size", "compressibility", "incompressibility")
LEARNED = ("classifier", "classifier-heldout")
PRETRAINED = ("clip", "pickscore", "hpsv2", "imagereward", "aesthetic")
NAMES = (*OF_WORLD, *OF_PIXELS, *LEARNED, *PRETRAINED, "ocr", "remote")
ARGUMENTS = {  # what must follow the name
    "position": "left|right|top|bottom",
    **dict.fromkeys(PRETRAINED, "FOLDER"),
    "remote": "http://HOST:PORT/v1?model=MODEL",
}
FREE = (*PRETRAINED, "remote")  # their arguments are paths and addresses, which may hold + and -

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
FUNCTION = r"(?:[^:*]+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*"
# what a '+' in a path or address must be followed by to end it: a reward, with its weight if it has one
TERM = re.compile(
    rf"\s*(?P<weight>{NUMBER}\s*\*\s*)?"
    rf"(?:(?:{'|'.join(map(re.escape, sorted(NAMES, key=len, reverse=True)))})\s*(?:[:+-]|$)|[^:*\s]+\.py:[A-Za-z_])"
)


def __getattr__(name: str) -> Any:
    if name not in ("Reward", "check_images", "score_batches"):
        raise AttributeError(f"module 'fieldsmith.rewards' has no attribute '{name}'")
    return getattr(importlib.import_module("fieldsmith.rewards.reward"), name)  # late, because it brings torch


def load(reward: str | Callable[..., Any], world: Asked | None = None) -> Reward:
    """A reward, whose results are checked: from a function of (images, prompts), or from words as `parse` reads them.

    `world` judges the model's pictures; right, shape, colour, valid, count and position need it. Raises InputError at
    words that name no reward, in one sentence with the fix, RewardError at a function that takes other arguments.
    """
    from fieldsmith.rewards.reward import Reward, weighted  # late, because it brings torch

    if isinstance(reward, Reward):
        return reward
    if not isinstance(reward, str):
        return _of_function(reward, name_of(reward))
    terms = [(weight, _built(name, argument, world)) for weight, name, argument in parse(reward)]
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else weighted(terms)


def parse(words: str) -> list[tuple[float, str, str | None]]:
    """(weight, name, argument) of each term of a sum such as '0.7*right-0.3*clip:FOLDER+mine.py:score'.

    A user's function is named by file.py:name or package.module:name. In a path or address '+' is read as part of it
    unless a reward follows, and '-' unless a weight (or, after a space, a reward) follows. Costs no torch. Raises
    InputError at a name that is none, an argument that is missing or means nothing, a file that is not there.
    """
    return [_term(term, words) for term in _terms(words)]


def _terms(words: str) -> list[str]:
    """The sum cut into its terms, each with its sign in front."""
    terms, begin = [], 0
    for sign in re.finditer(r"(?<![\d.]e)[+-]", words):  # a sign after 1e is of the number
        if _ends_term(words[begin : sign.start()], sign[0], words[sign.end() :]):
            terms.append(words[begin : sign.start()])
            begin = sign.start()
    return [*terms, words[begin:]]


def _ends_term(before: str, sign: str, after: str) -> bool:
    """Whether the sign between two pieces of a sum ends a term there."""
    body = re.sub(rf"^[\s+-]*(?:{NUMBER}\s*\*)?\s*", "", before)
    if not body or any(name.startswith(body + sign) and f"{body}{sign}{after}".startswith(name) for name in NAMES):
        return False  # a sign of the term itself, or a name such as jpeg-size
    name, argument, _ = body.strip().partition(":")
    if not argument and name in NAMES:
        return True
    if re.fullmatch(FUNCTION, body.strip()) and name not in FREE:
        return True
    follows = TERM.match(after)
    if sign == "+":
        return not argument or follows is not None
    return follows is not None and (follows["weight"] is not None or before.endswith(" "))


def _term(term: str, words: str) -> tuple[float, str, str | None]:
    match = re.fullmatch(rf"([\s+-]*)(?:({NUMBER})\s*\*\s*)?([^*:]+?)\s*(?::(.*))?", term.strip())
    if match is None:
        raise InputError(f"'{term.strip()}' in reward '{words}' is not NAME, NAME:ARGUMENT or WEIGHT*NAME: 0.7*right")
    signs, weight, name, argument = match.groups()
    if name not in NAMES and argument is not None and re.fullmatch(FUNCTION, f"{name}:{argument}"):
        if name.endswith(".py") and not pathlib.Path(name).is_file():
            raise InputError(f"reward '{name}:{argument}': file '{name}' does not exist; fix its path")
        if difflib.get_close_matches(name, NAMES, n=1, cutoff=0.75) and not _is_module(name):
            check_word(name, NAMES, "rewards")
    else:
        check_word(name, NAMES, "rewards")
    if argument is None and name in ARGUMENTS:
        raise InputError(f"reward '{name}' needs an argument; write {name}:{ARGUMENTS[name]}")
    if argument is not None and name in NAMES and name not in (*ARGUMENTS, "colour"):
        raise InputError(f"reward '{name}' takes no argument, so ':{argument}' means nothing; write {name}")
    size = 1.0 if weight is None else float(weight)
    return (-size if signs.count("-") % 2 else size), name, argument


def _is_module(name: str) -> bool:
    return name.isidentifier() and importlib.util.find_spec(name) is not None


def _built(name: str, argument: str | None, world: Asked | None) -> Reward:
    """The reward of one term; each kind is imported when it is asked for, because all bring torch."""
    if name in OF_PIXELS or (name == "colour" and argument is not None):
        from fieldsmith.rewards import pixels

        return pixels.reward(name, argument)
    if name in OF_WORLD:
        from fieldsmith.rewards import worlds

        return worlds.reward(name, argument, world)
    if name in LEARNED:
        from fieldsmith.rewards import learned

        return learned.classifier(heldout=name == "classifier-heldout")
    if name == "ocr":
        from fieldsmith.rewards import ocr

        return ocr.reward()
    assert argument is not None
    if name in PRETRAINED:
        from fieldsmith.rewards import pretrained

        return pretrained.reward(name, argument)
    if name == "remote":
        from fieldsmith.rewards import remote

        return remote.reward(argument)
    return _of_function(load_function(f"{name}:{argument}", "reward"), f"{name}:{argument}")


def _of_function(function: Callable[..., Any], name: str) -> Reward:
    from fieldsmith.rewards.reward import Reward  # late, because it brings torch

    if not callable(function):
        raise InputError(f"reward {function!r} is a {type(function).__name__}, not a function of (images, prompts)")
    check_signature(function, f"reward '{name}'", "images", "prompts")
    return Reward(name, bool(getattr(function, "differentiable", False)), function)
