"""Worlds without captions whose judge says of each image whether it could be in the data (VSM notes, 4 and 8.4).

In: 'columns', 'cards', 'chess', or a folder of images with the user's own judge, a Python function or an HTTP server.
Out: a `JudgedWorld`, which draws training and held-out images and gives `Verdicts` with reasons.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import io
import pathlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fieldsmith.errors import InputError, RewardError
from fieldsmith.functions import call, check_signature, load_function, name_of
from fieldsmith.servers import Server, Unreadable

WORLDS = ("columns", "cards", "chess")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
UNREADABLE = "unreadable"
BATCH = 64  # images in one question to a judge behind HTTP
RETRIES, PAUSE = 3, 0.5  # retries after the first attempt; seconds before the first of them
GRAIN = 0.08  # largest RMS distance from what was read, over a whole image, card or square

Mutation = Callable[[int, int], Tensor]  # (n, seed) -> n corrupted images
Verdict = tuple[bool, tuple[str, ...]]  # whether an image is valid, and why not


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of n images."""

    valid: Tensor  # (n,) bool
    readable: Tensor  # (n,) bool; what cannot be read counts as invalid and is reported apart
    reasons: tuple[tuple[str, ...], ...]  # per image, () where valid
    contents: tuple[Hashable | None, ...]  # per image what it shows, None where invalid


class JudgedWorld(Protocol):
    """Data that can be drawn without end and a judge that reads pixels alone."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def support(self) -> int | None:
        """How many different contents training data can show, None where they are countless or unknown."""

    @property
    def mutations(self) -> Mapping[str, Mutation]:
        """Ways to corrupt an image that the judge must notice; {} where there are none."""

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        """(n, channels, size, size) in [0, 1]; held_out=True: only contents that training data never show."""

    def judge(self, images: Tensor) -> Verdicts:
        """Raises InputError on images of another shape; NaN makes an image unreadable."""

    def novel(self, content: Hashable) -> bool:
        """Whether valid content is never in training data."""


def load(source: str, size: int | None = None, judge: str | Callable[..., Any] | None = None) -> JudgedWorld:
    """The named world at a size (None: its own), or a folder of images with the judge that it needs."""
    if source not in WORLDS:
        if not pathlib.Path(source).is_dir():
            near = difflib.get_close_matches(source, WORLDS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known worlds: {', '.join(WORLDS)}; or name a folder"
            raise InputError(f"'{source}' is neither a world with a judge nor a folder of images; {hint}")
        if judge is None:
            raise InputError(f"folder '{source}' needs a judge; name one: file.py:name, package.module:name or http://")
        return FolderWorld(source, judge, **({} if size is None else {"size": size}))
    if judge is not None:
        raise InputError(f"world '{source}' has a judge of its own; leave out '{judge}'")
    from fieldsmith.worlds.cards import CardsWorld
    from fieldsmith.worlds.chess import ChessWorld
    from fieldsmith.worlds.columns import ColumnsWorld

    makers: dict[str, Callable[..., JudgedWorld]] = {"columns": ColumnsWorld, "cards": CardsWorld, "chess": ChessWorld}
    return makers[source](**({} if size is None else {"size": size}))


# what all judges share


def readable(images: Tensor, world: JudgedWorld) -> tuple[Tensor, Tensor]:
    """The images in [0, 1] with those that hold NaN or infinities black, and which ones are finite, (n,)."""
    expected = (world.channels, world.size, world.size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
        raise InputError(
            f"images of shape {tuple(images.shape)} and type {str(images.dtype).removeprefix('torch.')}; the judge of "
            f"{world.name} reads floats (n, {', '.join(map(str, expected))}) in [0, 1]"
        )
    images = images.detach().to("cpu", torch.float32)
    finite = images.flatten(1).isfinite().all(1)
    return images.where(finite[:, None, None, None], torch.zeros(())).clamp(0, 1), finite


def residual(images: Tensor, drawn: Tensor, window: int) -> Tensor:
    """RMS difference between images and what was read in them, in each window around a pixel; (n, height, width)."""
    square = (images - drawn).square().mean(1, keepdim=True)
    for shape in ((window, 1), (1, window)):
        padding = (shape[0] // 2, shape[1] // 2)
        square = torch.nn.functional.avg_pool2d(square, shape, 1, padding, count_include_pad=False)
    return square[:, 0].sqrt()


def nearest(x: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Which of bank (m, d) is nearest to each x (..., d), and how far x leans from it towards another, (...).

    0 is not at all, 0.5 half-way to another: a blend shows here even where its two parts hardly differ.
    """
    centre = bank.mean(0)
    bank = bank - centre
    products, gram = (x - centre) @ bank.T, bank @ bank.T
    norms = gram.diag()
    best = (2 * products - norms).argmax(-1)
    towards = products - products.gather(-1, best[..., None]) - gram[best] + norms[best][..., None]
    apart = (norms + norms[:, None] - 2 * gram)[best]
    return best, torch.where(apart > 1e-3, towards / apart, torch.zeros(())).amax(-1)


def place(key: str) -> float:
    """A fixed place in [0, 1) for a content; those below the held-out share are never drawn for training."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) / 2**32


def generator_of(seed: int, held_out: bool = False) -> torch.Generator:
    """Streams of the same seed for training and for held-out images do not overlap."""
    return torch.Generator().manual_seed(2 * seed + held_out)


def noisy(images: Tensor, seed: int) -> Tensor:
    """The images under noise of 48 grey levels, three times what the published judge of cards lets pass."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 48 / 255 * noise).clamp(0, 1)


# the user's own world


class FolderWorld:
    """The images under a folder, every sixth held out, and a judge: a Python function or an HTTP server.

    The function, or its name, gets a copy of images (n, channels, size, size) in [0, 1] and returns n bools or n pairs
    (bool, reason). The server is POSTed {"images": [base64 PNG, ...]} and answers {"valid": [...]}, with "reasons":
    [[...], ...] if it likes. What an image shows is unknown, so nothing is ever novel.
    """

    support: int | None = None
    mutations: Mapping[str, Mutation] = {}

    def __init__(self, path: str | pathlib.Path, judge: str | Callable[..., Any], size: int = 64, channels: int = 3):
        if size < 1 or channels not in (1, 3):
            raise InputError(f"size={size}, channels={channels}: give a size above 0, and 1 or 3 channels")
        self.name, self.size, self.channels = str(path), size, channels
        self._answered = False
        self._server: Server | None = None
        if isinstance(judge, str) and judge.startswith(("http://", "https://")):
            self._server = Server(judge, retries=RETRIES, pause=PAUSE)
        else:
            self._what = f"judge '{judge if isinstance(judge, str) else name_of(judge)}'"
            self._function = load_function(judge, "judge") if isinstance(judge, str) else judge
            check_signature(self._function, self._what, "images")
        images = _images(pathlib.Path(path), size, channels)
        out = torch.arange(len(images)) % 6 == min(len(images), 6) - 1
        self._pools = images[~out], images[out]

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        pool = self._pools[held_out]
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
                words = f"{self._what} returned {repr(answer)[:80]} for image {row} of {n}"
                raise RewardError(f"{words}; return a bool, or (bool, reason)") from error
        return verdicts


def _images(path: pathlib.Path, size: int, channels: int) -> Tensor:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if len(files) < 2:
        raise InputError(f"folder '{path}' has {len(files)} images ({', '.join(SUFFIXES)}); it needs at least 2")
    images = torch.empty(len(files), channels, size, size)
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                small = image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BOX)
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"'{file}' cannot be read as an image; remove it or save it again") from error
        images[i] = pixels(small)
    return images


def pixels(image: Image.Image) -> Tensor:
    """A greyscale or RGB image as (channels, height, width) in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
    return flat.reshape(image.height, image.width, -1).permute(2, 0, 1)


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
