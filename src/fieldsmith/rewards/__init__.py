"""Judgements of images: below methods, which climb them; beside worlds and metrics.

In: the command line's `--reward`, such as 'right', 'colour:red' or '0.7*right+0.3*clip:FOLDER'. Out: a `Reward`, images
(n, 3, h, w) in [0, 1] and their prompts -> (n,). Importing this costs no torch; each judge is a file here.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fieldsmith.errors import InputError, RunError, check_word

if TYPE_CHECKING:
    from torch import Tensor

    from fieldsmith.worlds.shapes import ShapesWorld

OF_WORLD = ("right", "shape", "colour", "valid", "count", "position")
OF_PIXELS = ("brightness", "darkness", "saturation", "jpeg-size", "compressibility", "incompressibility")
LEARNED = ("classifier", "classifier-heldout")
PRETRAINED = ("clip", "pickscore", "hpsv2", "imagereward", "aesthetic")
NAMES = (*OF_WORLD, *OF_PIXELS, *LEARNED, *PRETRAINED, "remote", "python")
ARGUMENTS = {  # what must follow the name
    "position": "left|right|top|bottom",
    **dict.fromkeys(PRETRAINED, "FOLDER"),
    "remote": "http://HOST:PORT/v1?model=MODEL",
    "python": "package.module:function",
}
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"


class Reward(Protocol):
    """A judge. It never changes the images; calling it with n prompts for n images gives n numbers."""

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow from the result to the images."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (n, 3, h, w) in [0, 1] -> (n,) float."""
        ...


@dataclass(frozen=True)
class Named:
    """A function of images and prompts, with what a run must know of it."""

    name: str
    differentiable: bool
    function: Callable[[Tensor, Sequence[str]], Tensor]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


def load(spec: str, world: ShapesWorld | None = None) -> Reward:
    """The reward that `spec` names: NAME, NAME:ARGUMENT, or a sum of such with weights: '0.7*right+0.3*brightness'.

    `world` is what judged the model's data; right, shape, colour, valid, count and position need it. Raises InputError
    at anything that is no reward, in one sentence with the fix. A '+' in a path or address is read as part of it,
    unless a reward's name follows.
    """
    terms = []
    for term in _terms(spec):
        match = re.fullmatch(rf"(?:({NUMBER})\s*\*\s*)?([^*:]+)(?::(.*))?", term)
        if match is None:
            raise InputError(f"'{term}' in reward '{spec}' is not NAME, NAME:ARGUMENT or WEIGHT*NAME, e.g. 0.7*right")
        weight, name, argument = match.groups()
        terms.append((1.0 if weight is None else float(weight), _one(name.strip(), argument, world)))
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    from fieldsmith.rewards.combined import weighted

    return weighted(terms)


def _terms(spec: str) -> list[str]:
    known = "|".join(map(re.escape, sorted(NAMES, key=len, reverse=True)))
    terms: list[str] = []
    for part in re.split(rf"\+(?=\s*(?:{NUMBER}\s*\*\s*)?(?:{known})\s*(?:[:+]|$))", spec):
        name, colon, argument = part.partition(":")  # a '+' before the first colon is no part of an address
        *plain, last = name.split("+")
        terms += [*plain, last + colon + argument]
    return [term.strip() for term in terms]


def _one(name: str, argument: str | None, world: ShapesWorld | None) -> Reward:
    check_word(name, NAMES, "rewards")
    if argument is None and name in ARGUMENTS:
        raise InputError(f"reward '{name}' needs an argument; write {name}:{ARGUMENTS[name]}")
    if argument is not None and name not in (*ARGUMENTS, "colour"):
        raise InputError(f"reward '{name}' takes no argument, so ':{argument}' means nothing; write {name}")
    if name in OF_PIXELS or (name == "colour" and argument is not None):
        from fieldsmith.rewards import pixels

        return pixels.reward(name, argument)
    if name in OF_WORLD:
        from fieldsmith.rewards import worlds

        return worlds.reward(name, argument, world)
    if name in LEARNED:
        from fieldsmith.rewards import learned

        return learned.classifier(heldout=name == "classifier-heldout")
    assert argument is not None
    if name in PRETRAINED:
        from fieldsmith.rewards import pretrained

        return pretrained.reward(name, argument)
    if name == "remote":
        from fieldsmith.rewards import remote

        return remote.judge(argument)
    return _imported(argument)


def _imported(path: str) -> Reward:
    """A function of the user's own, at 'package.module:function'."""
    module, _, attribute = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute or "")
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(
            f"reward 'python:{path}' could not be imported ({error}); write python:package.module:function, with its "
            "folder on PYTHONPATH"
        ) from error
    if not callable(found) or isinstance(found, type):
        raise InputError(
            f"reward 'python:{path}' is no function of (images, prompts); name one that gives (n,) numbers"
        )
    return Named(f"python:{path}", bool(getattr(found, "differentiable", False)), found)


def checked(reward: Reward) -> Reward:
    """The same judge, its result verified: (n,) and finite, and given as float32 on the images' device.

    Calls raise InputError where images are not (n, 3, h, w) with one prompt each, RunError where the judge gives
    another shape, NaN, infinity, or no gradient although it is said to.
    """
    import torch

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise InputError(
                f"images of shape {tuple(images.shape)} and {len(prompts)} prompts; a reward reads (n, 3, h, w) and n "
                "prompts"
            )
        given = reward(images, prompts)
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        if shape != (len(images),):
            raise RunError(
                f"reward '{reward.name}' gave {shape} for {len(images)} images; it must give a ({len(images)},) tensor"
            )
        bad = int((~given.isfinite()).sum())
        if bad:
            raise RunError(
                f"reward '{reward.name}' gave NaN or infinity for {bad} of {len(images)} images; look at the images"
            )
        if reward.differentiable and images.requires_grad and torch.is_grad_enabled() and not given.requires_grad:
            raise RunError(
                f"reward '{reward.name}' is said to be differentiable but gave no gradient; mark it black box"
            )
        return given.to(images.device, torch.float32)

    return Named(reward.name, reward.differentiable, judge)
