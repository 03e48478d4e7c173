"""A world of a user's own: images, and a judge that is a Python function or an HTTP server.

In: a folder, a dataset or images (data.py). Out: an `ImageWorld`, which is a JudgedWorld.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fieldsmith import data
from fieldsmith.errors import InputError, RewardError
from fieldsmith.functions import call, check_signature, load_function, name_of
from fieldsmith.pictures import Frame, Images
from fieldsmith.servers import Server, Unreadable
from fieldsmith.worlds.judged import UNREADABLE, Verdicts, generator_of, readable

BATCH = 64  # images in one question to a judge behind HTTP
RETRIES, PAUSE = 3, 0.5  # retries after the first attempt; seconds before the first of them

Judge = str | Callable[..., Any]  # images (n, channels, size, size) in [0, 1] -> n verdicts; or its name or address
Verdict = tuple[bool, tuple[str, ...]]  # whether an image is valid, and why not


class ImageWorld:
    """Images that are read when they are asked for, every sixth held out, and a judge; `images` are to train on, and
    `captions` has one for each of those, or none at all.

    A function, or its name, gets a copy of images and returns n bools or n pairs (bool, reason). A server is POSTed
    {"images": [base64 PNG, ...]} and answers {"valid": [...]}, with "reasons": [[...], ...] if it likes. What an image
    shows is unknown, so nothing is ever novel.
    """

    support: int | None = None

    def __init__(self, images: Images, judge: Judge | None, name: str = "images", captions: Sequence[str] = ()):
        """Raises InputError at fewer than 2 images, and where a judge's name leads to no function."""
        if len(images) < 2:
            raise InputError(f"'{name}' has {len(images)} image; it needs at least 2")
        self.name, self.size, self.channels = name, images.frame.size, images.frame.channels
        self._answered = False
        self._server: Server | None = None
        self.judges = judge is not None
        if judge is None:
            pass
        elif isinstance(judge, str) and judge.startswith(("http://", "https://")):
            self._server = Server(judge, retries=RETRIES, pause=PAUSE)
        else:
            self._what = f"judge '{judge if isinstance(judge, str) else name_of(judge)}'"
            self._function = load_function(judge, "judge") if isinstance(judge, str) else judge
            check_signature(self._function, self._what, "images")
        out = torch.arange(len(images)) % 6 == min(len(images), 6) - 1
        self.images, self._held = images.part(~out), images.part(out)
        self.captions = tuple(caption for caption, held in zip(captions, out.tolist(), strict=False) if not held)

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        pool = self._held if held_out else self.images
        return pool[torch.randint(len(pool), (n,), generator=generator_of(seed, held_out))]

    def novel(self, content: Hashable) -> bool:
        return False

    def judge(self, images: Tensor) -> Verdicts:
        """Raises RewardError where the judge fails, InputError where a server never answered."""
        images, finite = readable(images, self)
        verdicts = iter(self._ask(images[finite]) if finite.any() else ())
        answers = [next(verdicts) if fine else (False, (UNREADABLE,)) for fine in finite.tolist()]
        valid = torch.tensor([answer for answer, _ in answers], dtype=torch.bool)
        return Verdicts(valid, finite, tuple(reasons for _, reasons in answers), (None,) * len(answers))

    def _ask(self, images: Tensor) -> list[Verdict]:
        if self._server is None:
            return self._ask_function(images)
        try:
            verdicts = [verdict for part in images.split(BATCH) for verdict in _ask_server(self._server, part)]
        except RewardError as error:
            if self._answered:
                raise
            raise InputError(str(error)) from error
        self._answered = True
        return verdicts

    def _ask_function(self, images: Tensor) -> list[Verdict]:
        n = len(images)
        output = call(self._function, self._what, f"{n} images", images.clone())
        try:
            answers = list(output)
        except Exception as error:
            raise RewardError(f"{self._what} returned {repr(output)[:80]} for {n} images; return a list") from error
        if len(answers) != n:
            raise RewardError(f"{self._what} returned {len(answers)} answers to {n} images; return one an image")
        verdicts = []
        for row, answer in enumerate(answers, 1):
            try:
                verdicts.append(_verdict(answer))
            except Exception as error:
                raise RewardError(
                    f"{self._what} returned {repr(answer)[:80]} for image {row} of {n}; return a bool or (bool, reason)"
                ) from error
        return verdicts


def of(source: Any, judge: Judge | None, frame: Frame, words: bool = False) -> ImageWorld:
    """A folder, a dataset or images, with `words` with their captions where they have some.

    Raises InputError where data.py does, and where there are fewer than 2.
    """
    found = data.load(source, frame, captioned=None if words else False, name="images")
    return ImageWorld(found.images, judge, found.name, found.captions)


def _ask_server(server: Server, images: Tensor) -> list[Verdict]:
    def read(answer: Any) -> list[Verdict]:
        try:
            valid, reasons = answer["valid"], answer.get("reasons") or [()] * len(images)
            if len(valid) != len(images) or len(reasons) != len(images):
                raise ValueError(f"{len(valid)} answers and {len(reasons)} reasons to {len(images)} images")
            return [_verdict(pair) for pair in zip(valid, reasons, strict=True)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unreadable(f"it gave no verdicts ({type(error).__name__}: {error})") from error

    return server.post("", {"images": [_png(image) for image in images]}, read, f"{len(images)} images")


def _png(image: Tensor) -> str:
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _verdict(answer: Any) -> Verdict:
    """One verdict: a bool (also of numpy or torch), or a pair of it with one or several reasons."""
    valid, reasons = answer if isinstance(answer, (tuple, list)) else (answer, ())
    if str(getattr(valid, "dtype", type(valid).__name__)).removeprefix("torch.") != "bool":
        raise TypeError(f"{valid!r} is no bool")
    if bool(valid):
        return True, ()
    words = (reasons,) if isinstance(reasons, str) else tuple(str(reason) for reason in reasons or ())
    return False, tuple(word for word in words if word) or ("invalid",)
