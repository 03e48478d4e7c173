"""A world of a user's own: images, and a judge that is a Python function or an HTTP server.

In: a folder, or images in memory. Out: an `ImageWorld`, which is a JudgedWorld.
"""

from __future__ import annotations

import base64
import http.client
import importlib
import importlib.util
import io
import json
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fieldsmith.errors import InputError, RunError
from fieldsmith.worlds import pictures
from fieldsmith.worlds.judged import UNREADABLE, Mutation, Verdicts, generator_of, readable

BATCH = 64  # images in one question to a judge behind HTTP
TIMEOUT, RETRIES, PAUSE = 60.0, 3, 0.5  # seconds; retries after the first attempt; the pause doubles

Judge = str | Callable[[Tensor], Any]  # images (n, channels, size, size) in [0, 1] -> n verdicts


class ImageWorld:
    """Images (n, channels, size, size) in [0, 1], every sixth held out, and a judge.

    A function gets images and returns n bools or n pairs (bool, reason). A server is POSTed {"images": [base64 PNG,
    ...]} and answers {"valid": [...]}, with "reasons": [[...], ...] if it likes. What an image shows is unknown, so
    nothing is ever novel.
    """

    support: int | None = None
    mutations: Mapping[str, Mutation] = {}

    def __init__(self, images: Tensor, judge: Judge, name: str = "images"):
        """`judge` is the function itself, module:function, file.py:function or an http address."""
        if len(images) < 2:
            raise InputError(f"{name}: {len(images)} images; it needs at least 2")
        self.name, self.size, self.channels = name, images.shape[-1], images.shape[1]
        self._judge_name = judge if isinstance(judge, str) else getattr(judge, "__name__", type(judge).__name__)
        self._answered = False
        self._ask: Callable[[Tensor], Any] = judge if callable(judge) else _named(judge)
        out = torch.arange(len(images)) % 6 == min(len(images), 6) - 1
        self._pools = images[~out], images[out]

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        pool = self._pools[held_out]
        return pool[torch.randint(len(pool), (n,), generator=generator_of(seed, held_out))]

    def novel(self, content: Hashable) -> bool:
        return False

    def judge(self, images: Tensor) -> Verdicts:
        """Raises InputError where the judge fails at the first question, RunError where it fails later."""
        images, finite = readable(images, self)
        asked = iter(self._verdicts(images[finite]) if finite.any() else ())
        answers = [next(asked) if fine else (False, (UNREADABLE,)) for fine in finite.tolist()]
        valid = torch.tensor([answer for answer, _ in answers], dtype=torch.bool)
        return Verdicts(valid, finite, tuple(reasons for _, reasons in answers), (None,) * len(answers))

    def _verdicts(self, images: Tensor) -> list[tuple[bool, tuple[str, ...]]]:
        try:
            answers = list(self._ask(images))
            if len(answers) != len(images):
                raise ValueError(f"{len(answers)} answers to {len(images)} images")
            read = [_answer(answer) for answer in answers]
        except Exception as error:  # whatever a stranger's code may raise
            sort = RunError if self._answered else InputError
            raise sort(
                f"judge '{self._judge_name}' failed with {type(error).__name__}: {error}; it must give one verdict "
                "per image: fix it, or name another"
            ) from error
        self._answered = True
        return read


def of_folder(path: str | pathlib.Path, judge: Judge, size: int = 64, channels: int = 3) -> ImageWorld:
    """The images under a folder. Raises InputError where there are fewer than 2, or one cannot be read."""
    files = pictures.files_in(pathlib.Path(path))
    if len(files) < 2:
        raise InputError(
            f"folder '{path}' has {len(files)} images ({', '.join(pictures.SUFFIXES)}); it needs at least 2"
        )
    return ImageWorld(torch.stack([pictures.read(file, size, channels) for file in files]), judge, str(path))


def of_images(images: Iterable[Any], judge: Judge, size: int, channels: int) -> ImageWorld:
    """Tensors, PIL images, arrays or paths. Raises InputError as `pictures.convert`."""
    return ImageWorld(torch.stack([pictures.convert(image, size, channels) for image in images]), judge)


def _named(judge: str) -> Callable[[Tensor], Any]:
    """The server at an address, or a function by its name."""
    return partial(_ask_server, judge) if judge.startswith(("http://", "https://")) else _function(judge)


def _function(judge: str) -> Callable[[Tensor], Any]:
    where, _, name = judge.rpartition(":")
    if not where or not name:
        raise InputError(f"judge '{judge}' is no module:function, file.py:function or http://host:port/path; name one")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(pathlib.Path(where).stem, where)
            if spec is None or spec.loader is None:
                raise ImportError("no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        found = getattr(module, name)
    except Exception as error:  # importing runs a stranger's code
        raise InputError(
            f"judge '{judge}' cannot be loaded, {type(error).__name__}: {error}; fix its file or its name"
        ) from error
    if not callable(found):
        raise InputError(f"judge '{judge}' is a {type(found).__name__}, which cannot be called; name a function")
    return found  # type: ignore[return-value]


def _ask_server(address: str, images: Tensor) -> list[tuple[bool, Sequence[str]]]:
    answers: list[tuple[bool, Sequence[str]]] = []
    for part in images.split(BATCH):
        answer = _post(address, {"images": [_png(image) for image in part]})
        valid, reasons = answer["valid"], answer.get("reasons") or [()] * len(part)
        if len(valid) != len(part) or len(reasons) != len(part):
            raise ValueError(f"{len(valid)} answers and {len(reasons)} reasons to {len(part)} images")
        answers += zip(valid, reasons, strict=True)
    return answers


def _post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for attempt in range(RETRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return dict(json.loads(response.read()))
        except urllib.error.HTTPError as error:
            if attempt == RETRIES or (error.code < 500 and error.code not in (408, 429)):
                raise
        except (OSError, http.client.HTTPException):
            if attempt == RETRIES:
                raise
        time.sleep(PAUSE * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _png(image: Tensor) -> str:
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _answer(answer: Any) -> tuple[bool, tuple[str, ...]]:
    """One verdict: a bool (also of numpy or torch), or a pair of it with one or several reasons."""
    valid, reasons = answer if isinstance(answer, (tuple, list)) else (answer, ())
    if str(getattr(valid, "dtype", type(valid).__name__)).removeprefix("torch.") != "bool":
        raise TypeError(f"{valid!r} is no bool")
    if bool(valid):
        return True, ()
    words = (reasons,) if isinstance(reasons, str) else tuple(str(reason) for reason in reasons or ())
    return False, tuple(word for word in words if word) or ("invalid",)
