"""A training step of each verb against the bare networks' forwards and backwards in it, at the same batches.

A run of few steps is taken from one of many, so that preparation cancels. The bare cost is a replay: every call of the
denoiser, the autoencoder and the text encoders in those steps, recorded in a run of its own, and a backward where one
followed. What is over is ours: draws, losses, advantages, optimiser, log. Time is this process's CPU time on one
thread; rounds of both alternate, and of each the fastest counts, since others were disturbed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fieldsmith import verb
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.step import Inputs as DistillInputs
from fieldsmith.methods.distill.verb import DISTILL
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.edit.verb import EDIT
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.step import Inputs as SharpenInputs
from fieldsmith.methods.sharpen.verb import SHARPEN
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.models.shrink import shrink
from fieldsmith.rewards import Reward
from fieldsmith.worlds.scenes import ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel

BRIGHT = Reward("brightness", False, lambda images, prompts: images.mean((1, 2, 3)))  # a judge that costs nothing


@dataclass(frozen=True)
class Ratio:
    """A verb's step over the bare networks' calls in it, by CPU time, and the latter's calls a step."""

    verb: str
    ratio: float
    step_milliseconds: float
    calls: float


def erase(steps: int) -> list[Model]:
    config = replace(EraseConfig.preset_of("tiny", None, {}), targets=("circle",), anchors=("square",))
    per_step = config.batch * (config.window[1] - config.window[0] + 1)
    model = load("zoo:shapes-flux")
    verb.train(ERASE, _watched(model), replace(config, budget=steps * per_step), EraseInputs())
    return [model]


def align(steps: int) -> list[Model]:
    config = replace(
        AlignConfig.preset_of("flow-grpo", "laptop", {}), model="zoo:shapes-flux", prompts=("red circle", "blue square")
    )
    model = load("zoo:shapes-flux")
    verb.train(ALIGN, _watched(model), replace(config, epochs=steps), AlignInputs(BRIGHT))
    return [model]


def edit(steps: int) -> list[Model]:
    config = EditConfig.preset_of("fieldsmith", "laptop", {}).replace(epochs=steps, groups=8, max_mean=1.0)
    model, world = load("zoo:scenes-kontext"), ScenesWorld(24)

    def judge(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Any:
        bright = after.mean((1, 2, 3))
        return type("Scored", (), {"following": bright, "consistency": 1 - bright})

    inputs = EditInputs(lambda n, seed, turns: world.sessions(n, turns, seed, 0.7), judge, Channel())
    verb.train(EDIT, _watched(model), config, inputs)
    return [model]


def distill(steps: int) -> list[Model]:
    teacher = load("zoo:digits-unet")
    student = shrink(teacher, 4.0)
    shape = teacher.noise(1, torch.Generator().manual_seed(0)).shape[1:]
    states = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    source = Source(states, torch.arange(64) % 10, tuple(str(i) for i in range(10)))
    config = DistillConfig.preset_of("dash", None, {}).replace(steps=steps, bank=0, curriculum="uniform")
    verb.train(DISTILL, _watched(teacher), config, DistillInputs(source=source, student=_watched(student)))
    return [teacher, student]


def sharpen(steps: int) -> list[Model]:
    model = load("zoo:columns-ddpm")
    shape = model.noise(1, torch.Generator().manual_seed(0)).shape[1:]
    states = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    config = SharpenConfig.preset_of("vsm", None, {}).replace(steps=steps)
    verb.train(SHARPEN, _watched(model), config, SharpenInputs(states=states))
    return [model]


VERBS: dict[str, Callable[[int], list[Model]]] = {
    "erase": erase, "align": align, "edit": edit, "distill": distill, "sharpen": sharpen,
}  # fmt: skip
COUNTS = {"erase": (1, 4), "align": (1, 3), "edit": (1, 3), "distill": (5, 25), "sharpen": (5, 25)}


@dataclass
class Call:
    """One call of a network, as it was made."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    gradient: bool
    reference: Callable[[], Any]
    trained: list[Tensor]

    def again(self) -> None:
        for p in self.trained:  # methods freeze them when they are done
            p.requires_grad_(True)
        with self.reference(), torch.set_grad_enabled(self.gradient):
            said = self.function(*self.arguments, **self.named)
            out = _first(said)
            if out.requires_grad:
                out.sum().backward()


def _first(said: Any) -> Tensor:
    """The tensor in whatever a diffusers module gives."""
    while not isinstance(said, Tensor):
        if hasattr(said, "latent_dist"):
            return said.latent_dist.mean
        said = said[0]
    return said


RECORD: list[Call] | None = None


def _watched(model: Model) -> Model:
    """The model, every call of whose networks lands in RECORD while that is a list."""
    pipeline = model.pipeline
    places: list[tuple[Any, str]] = [(model.network, "forward")]
    if getattr(pipeline, "vae", None) is not None:
        places += [(pipeline.vae, "encode"), (pipeline.vae, "decode")]
    places += [(part, "forward") for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    for owner, name in places:
        original = getattr(owner, name)

        def watching(*arguments: Any, _original: Any = original, **named: Any) -> Any:
            if RECORD is not None:
                kept = [_kept(one) for one in arguments], {key: _kept(one) for key, one in named.items()}
                trained = [p for p in model.network.parameters() if p.requires_grad]
                off = model.reference if model._off else contextlib.nullcontext
                RECORD.append(Call(_original, tuple(kept[0]), kept[1], torch.is_grad_enabled(), off, trained))
            return _original(*arguments, **named)

        setattr(owner, name, watching)
    return model


def _kept(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def recorded(verb: str, few: int, many: int) -> list[Call]:
    """The calls of the steps by which a run of `many` is longer than one of `few`."""
    global RECORD
    lengths = []
    for steps in (few, many):
        RECORD = []
        VERBS[verb](steps)
        lengths.append(len(RECORD))
    calls, RECORD = RECORD, None
    return calls[lengths[0] :]


@contextlib.contextmanager
def _timed(into: list[float]) -> Iterator[None]:
    began = time.process_time()
    yield
    into.append(time.process_time() - began)


def measure(verb: str, rounds: int = 4) -> Ratio:
    few, many = COUNTS[verb]
    calls = recorded(verb, few, many)
    bare: list[float] = []
    short: list[float] = []
    long: list[float] = []
    for _ in range(rounds):
        with _timed(bare):
            for call in calls:
                call.again()
        with _timed(short):
            VERBS[verb](few)
        with _timed(long):
            VERBS[verb](many)
    ours = min(long) - min(short)
    return Ratio(verb, ours / min(bare), 1000 * ours / (many - few), len(calls) / (many - few))
