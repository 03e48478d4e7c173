"""`fieldsmith studio`: a base and what a run or adapters make of it, side by side, while scales and seeds move.

Plain functions of a Studio, which a page of gradio (an extra) calls; the page is served to this machine alone.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.side_effects import image_statistics
from fieldsmith.models import check_adapters, load, merge_adapters
from fieldsmith.models.core import Model
from fieldsmith.models.editing import check_editor, edit, encode_unique, quantised
from fieldsmith.read import read_toml
from fieldsmith.run import base_of
from fieldsmith.training import step_generator

Turn = tuple[Tensor, Tensor]  # what base and corrected model made, (3, h, w) in [0, 1]
App = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass
class Studio:
    """A base, the adapters over it or a whole trained pipeline beside it, and pictures from while it trained."""

    name: str
    model: Model
    adapters: tuple[str, ...] = ()
    trained: Model | None = None  # where a run shipped a pipeline instead of an adapter
    strips: list[tuple[int, pathlib.Path]] = field(default_factory=list)  # step, picture at equal seeds
    lock: threading.Lock = field(default_factory=threading.Lock)  # weights move in place: one draws at a time

    def __post_init__(self) -> None:
        parts = self.model.pipeline.components.values() if self.adapters else ()
        self._plain = [(part, _copy(part)) for part in parts if isinstance(part, torch.nn.Module)]

    @property
    def edits(self) -> bool:
        """Whether the model goes on from an image."""
        with contextlib.suppress(InputError):
            check_editor(self.model)
            return True
        return False

    @contextlib.contextmanager
    def at(self, scales: Sequence[float]) -> Iterator[Model]:
        """The corrected model, each adapter at its scale; the base's weights are back afterwards, to the last bit."""
        if self.trained:
            yield self.trained
            return
        named = self.model.adapters
        try:
            merge_adapters(self.model, [f"{one}:{s}" for one, s in zip(self.adapters, scales, strict=True) if s])
            yield self.model
        finally:
            self.model.adapters = named
            for part, weights in self._plain:
                part.load_state_dict(weights)


def _copy(part: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in part.state_dict().items()}


def open_studio(source: str, adapters: Sequence[str] = (), resolution: int | None = None) -> Studio:
    """The studio of a finished run, or of a model with adapters over it.

    Raises InputError where one cannot be loaded, or an adapter is of another family.
    """
    left, folder = base_of(source), pathlib.Path(source).expanduser()
    strips = sorted((int(found[1]), file) for file in folder.glob("samples/step-*.png")
                    if (found := re.fullmatch(r"step-(\d+)\.png", file.name)))  # fmt: skip
    if left and not left.adapter:
        settings = read_toml(folder / "config.toml")
        name = settings.get("model") or settings.get("teacher")
        base = load(str(name), resolution)
        return Studio(source, base, trained=load(left.model, resolution), strips=strips)
    over = (*(left.adapter if left else ()), *adapters)
    model = load(left.model if left else source, resolution, config_from=left.config_from if left else "")
    if over:
        check_adapters(model.family, model.name, *over)
    opened = Studio(source, model, over, strips=strips)
    with opened.at([1.0] * len(over)):  # an adapter that does not fit is refused now, not at the first picture
        return opened


def drawn(
    studio: Studio, prompt: str, scales: Sequence[float], seed: int = 0, n: int = 2, steps: int = 20,
    guidance: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """n images of the base and of the corrected model at the seeds from `seed` on, each (n, 3, h, w) in [0, 1].

    Raises InputError at a word that the model does not know.
    """
    asked, seeds = [prompt] * n, [seed + k for k in range(n)]
    with studio.lock:
        before = sampler(studio.model, steps, guidance)(asked, seeds)
        with studio.at(scales) as model:
            return before, sampler(model, steps, guidance)(asked, seeds)


def measures(before: Tensor, after: Tensor) -> list[tuple[str, float, float]]:
    """What is measured of what is shown: each statistic's mean of both sides, and how far the images are apart."""
    was, now = image_statistics(before), image_statistics(after)
    rows = [(name, float(was[name].mean()), float(now[name].mean())) for name in was]
    return [*rows, ("distance, RMS of pixels", 0.0, float((before - after).square().mean().sqrt()))]


def turned(
    studio: Studio, turns: Sequence[Turn], words: str, scales: Sequence[float], seed: int = 0, steps: int = 20,
    guidance: float | None = None,
) -> list[Turn]:  # fmt: skip
    """The session with one more turn, each side on what it made itself; `turns` begins with the source on both."""
    with studio.lock, torch.no_grad():
        sides = []
        both: list[contextlib.AbstractContextManager[Model]] = [
            contextlib.nullcontext(studio.model), studio.at(scales),
        ]  # fmt: skip
        for side, one in enumerate(both):
            with one as model:
                source = quantised(turns[-1][side][None])
                generator = step_generator(seed, len(turns) - 1)
                sides.append(edit(model, encode_unique(model, [words]), source, generator, steps, guidance)[0])
        return [*turns, (sides[0], sides[1])]


def undone(turns: Sequence[Turn]) -> list[Turn]:
    """The session without its last turn; the source stays."""
    return list(turns[:-1]) if len(turns) > 1 else list(turns)


def guarded(app: App, port: int, folder: pathlib.Path) -> App:
    """The page's server, for this machine's own browser alone: the host that is asked for and the page that asks have
    to be this address, so that no other site's page reaches it; files come from `folder` alone."""
    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        own = headers.get("host") in hosts and (origin is None or origin in {f"http://{host}" for host in hosts})
        file = re.search(r"file[=/](.*)", unquote(scope["path"]))
        inside = not file or pathlib.Path("/", file[1]).resolve().is_relative_to(folder.resolve())
        if own and inside:
            return await app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"fieldsmith studio answers its own page alone\n"})

    return answer
