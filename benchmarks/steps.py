"""A training step of each verb against the bare networks' forwards and backwards in it, at the same batches.

The bare cost is a replay: every call of the denoiser, the autoencoder and the text encoders in a step, recorded in a
run of its own, and a backward where one followed. After each step of a second run its calls are replayed, so that
whatever else the machine does falls on both. What is over is ours: draws, losses, advantages, optimiser, log. Time is
this process's CPU time on one thread, the ratio the median over blocks of steps (a collection with its updates).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.against_plain import BRIGHT, in_turns
from experiments.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
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
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.models.shrink import shrink
from fieldsmith.models.unet import UNet
from fieldsmith.worlds.scenes import VOCABULARY, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel

LARGE = {"layers": 4, "single_layers": 4, "heads": 16}  # a transformer of 54 million parameters
WIDE = {"size": 8, "channels": 1, "widths": (224, 448), "layers": 2}  # a UNet of 49 million


@dataclass(frozen=True)
class Ratio:
    """A verb's step over the bare networks' calls in it, by CPU time, and the latter's calls a step."""

    verb: str
    parameters: int
    ratio: float
    step_milliseconds: float
    calls: float


@dataclass(frozen=True)
class Case:
    """A verb on networks that are made anew for each run; `block` steps make a cycle, `blocks` of them are timed."""

    make: Callable[[], list[Model]]
    run: Callable[[list[Model], int, verb.Callback], None]
    block: int
    blocks: int


def erase(models: list[Model], total: int, callback: verb.Callback, **sizes: Any) -> None:
    config = EraseConfig.preset_of("tiny", None, {}).replace(targets=("circle",), anchors=("square",), **sizes)
    per_step = config.batch * (config.window[1] - config.window[0] + 1)
    verb.train(ERASE, models[0], config.replace(budget=total * per_step), EraseInputs(), callback=callback)


def align(models: list[Model], total: int, callback: verb.Callback, **sizes: Any) -> None:
    config = AlignConfig.preset_of("flow-grpo", "laptop", {}).replace(prompts=("red circle", "blue square"), **sizes)
    verb.train(ALIGN, models[0], config.replace(epochs=total // 2), AlignInputs(BRIGHT), callback=callback)


def edit(models: list[Model], total: int, callback: verb.Callback, **sizes: Any) -> None:
    config = EditConfig.preset_of("fieldsmith", "laptop", {}).replace(max_mean=1.0, min_spread=0.0, **sizes)
    world = ScenesWorld(24)

    def judge(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Any:
        bright = after.mean((1, 2, 3))
        return type("Scored", (), {"following": bright, "consistency": 1 - bright})

    inputs = EditInputs(lambda n, seed, turns: world.sessions(n, turns, seed, 0.7), judge, Channel())
    verb.train(EDIT, models[0], config.replace(epochs=total // config.updates), inputs, callback=callback)


def distill(models: list[Model], total: int, callback: verb.Callback, **sizes: Any) -> None:
    teacher, student = models
    names = tuple(teacher.classes)  # type: ignore[attr-defined]
    states = torch.randn(64, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    source = Source(states, torch.arange(64) % len(names), names)
    config = DistillConfig.preset_of("dash", None, {}).replace(steps=total, bank=0, curriculum="uniform", **sizes)
    verb.train(DISTILL, teacher, config, DistillInputs(source=source, student=student), callback=callback)


def sharpen(models: list[Model], total: int, callback: verb.Callback, **sizes: Any) -> None:
    shape = models[0].latent_shape
    states = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    config = SharpenConfig.preset_of("vsm", None, {}).replace(steps=total, **sizes)
    verb.train(SHARPEN, models[0], config, SharpenInputs(states=states), callback=callback)


def pair(teacher: Model, ratio: float) -> list[Model]:
    return [teacher, shrink(teacher, ratio)]


def large_flux() -> list[Model]:
    return [Flux(flux_pipeline(("red", "blue", "circle", "square"), **LARGE), "large")]  # type: ignore[arg-type]


def large_kontext() -> list[Model]:
    shape: dict[str, Any] = {"vae_channels": (8, 8, 8), "latent_channels": 4, "text_length": 10, "size": 24}
    return [FluxKontext(kontext_pipeline(VOCABULARY, **shape, **LARGE), "large")]


def large_unet(classes: tuple[str, ...] | None = None, **options: Any) -> Model:
    return UNet(unet_pipeline(**WIDE, **options), "large", classes=classes)  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "erase": Case(lambda: [load("zoo:shapes-flux")], functools.partial(erase), 1, 4),
    "align": Case(lambda: [load("zoo:shapes-flux")], functools.partial(align), 2, 2),
    "edit": Case(lambda: [load("zoo:scenes-kontext")], functools.partial(edit, groups=8), 4, 2),
    "distill": Case(lambda: pair(load("zoo:digits-unet"), 4.0), functools.partial(distill), 5, 6),
    "sharpen": Case(lambda: [load("zoo:columns-ddpm")], functools.partial(sharpen), 5, 6),
    "erase, 50M": Case(large_flux, functools.partial(erase, batch=1, steps=5, window=(1, 3)), 1, 4),
    "align, 50M": Case(large_flux, functools.partial(align, steps=3, prompts_per_epoch=2, rollouts=2), 2, 3),
    "edit, 50M": Case(
        large_kontext, functools.partial(edit, groups=2, rollouts=2, turns=2, steps=2, renoise=1, updates=2), 2, 3
    ),
    "distill, 50M": Case(
        lambda: pair(large_unet(("cat", "dog"), class_rows=3), 2.0), functools.partial(distill, batch=8), 1, 4
    ),
    "sharpen, 50M": Case(lambda: [large_unet(learned_variance=True)], functools.partial(sharpen, batch=8), 1, 4),
}  # fmt: skip
SMALL = tuple(name for name in CASES if "," not in name)


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


def recorded(name: str, steps: int) -> list[list[Call]]:
    """The calls of each step of a run."""
    global RECORD
    case, found = CASES[name], []
    RECORD = []

    def callback(done: int, log: dict[str, float]) -> None:
        global RECORD
        if done and RECORD is not None:
            found.append(RECORD)
        RECORD = []  # what comes before the first step is preparation

    case.run([_watched(model) for model in case.make()], steps, callback)
    RECORD = None
    return found


def replayed(steps: list[list[Call]]) -> Iterator[float]:
    """A step's calls each time that it is asked."""
    for calls in steps:
        for call in calls:
            call.again()
        yield 0.0


def measure(name: str) -> Ratio:
    case = CASES[name]
    steps = case.block * (case.blocks + 1)
    calls, models = recorded(name, steps), case.make()
    pair = in_turns(
        lambda after: case.run(models, steps, lambda done, log: after(log["loss"]) if done else None),
        replayed(calls), case.block,
    )  # fmt: skip
    parameters = sum(p.numel() for model in models for n, p in model.network.named_parameters() if "lora_" not in n)
    each = 1000 * sum(pair.seconds[0]) / (case.blocks * case.block)
    return Ratio(name, parameters, pair.ratio, each, sum(map(len, calls[case.block :])) / (steps - case.block))
