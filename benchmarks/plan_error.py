"""How far plans are off: the peak that `plan` says against the one that a run then has, on small models.

In: nothing. Out: a share. Both sides count bytes of storages alive (models/footprint.py): the run for real, in every
operation that it makes from its preflight to its last step; the plan from configs alone. What a device's allocator
adds to either is left out of both, so the share is of the estimate itself, and the same on every machine.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fieldsmith.commands.memory import Memory
from fieldsmith.models.blueprint import blueprint
from fieldsmith.models.footprint import measured

from fieldsmith.commands import plan
from fieldsmith.methods.align.config import preset as align_preset
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.models import load
from fieldsmith.models.memory import checkpoint_activations
from fieldsmith.models.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
from fieldsmith.models.unet import UNet
from fieldsmith.worlds.scenes import VOCABULARY

WORDS = ("a", "red", "blue", "square", "circle")
PLAIN, FRUGAL = Memory(), Memory(checkpointing=True)
_ERASE = EraseConfig(
    targets=("red circle",), anchors=("blue circle",), steps=4, window=(1, 3), budget=24, rollout_guidance=1.0, rank=4,
    dropout=0.1, batch=4, chunk=12, subset="attention",
)  # fmt: skip
_ALIGN = replace(
    align_preset("flow-grpo"), prompts=("red circle", "blue square"), reward="brightness", steps=3, epochs=1,
    prompts_per_epoch=2, rollouts=8, chunk=16, rank=4,
)  # fmt: skip
_EDIT = EditConfig(epochs=1, groups=2, rollouts=4, turns=2, steps=3, chunk=8, rank=4, updates=2)
_DISTILL = DistillConfig(steps=2, batch=16, bank=0, shrink=3.0, warmup=0)
_SHARPEN = SharpenConfig(method="plain", steps=2, batch=8, warmup=0)


@dataclass(frozen=True)
class Setting:
    """A run: which pipeline, which verb, its settings and its memory's."""

    name: str
    pipeline: str
    verb: str
    config: Any
    memory: Memory = PLAIN


SETTINGS = (
    Setting("erase", "flux", "erase", _ERASE),
    Setting("erase, mid-size", "flux-mid", "erase", _ERASE),
    Setting("erase, checkpointing", "flux", "erase", _ERASE, FRUGAL),
    Setting("erase, full weights, chunks", "flux", "erase", replace(_ERASE, full=True, chunk=5)),
    Setting("align", "flux", "align", _ALIGN),
    Setting("edit", "kontext", "edit", _EDIT),
    Setting("distill", "unet", "distill", _DISTILL),
    Setting("sharpen", "unet", "sharpen", _SHARPEN),
)


@dataclass(frozen=True)
class Error:
    """Bytes as planned and as measured, of one setting."""

    name: str
    planned: int
    measured: int

    @property
    def share(self) -> float:
        return abs(self.planned / self.measured - 1)


def plan_error(settings: Sequence[Setting] = SETTINGS) -> float:
    """The worst share by which a planned peak misses the measured one."""
    with tempfile.TemporaryDirectory() as folder:
        return max(error_of(setting, pathlib.Path(folder)).share for setting in settings)


def error_of(setting: Setting, folder: pathlib.Path) -> Error:
    """One setting's two peaks; its pipeline is written under `folder` where it is not there yet."""
    place = folder / setting.pipeline
    if not place.exists():
        PIPELINES[setting.pipeline](place)
    model = load(place)
    run = RUNS[setting.verb](model, setting.config, setting.memory)
    found = measured(model, run)
    data = {"data": 64} if setting.verb in ("distill", "sharpen") else {}
    case = plan.CASES[setting.verb](blueprint(place).model, setting.config, **data)
    return Error(setting.name, plan.rehearsal(case, setting.memory).peak, found)


def _saved(pipeline: Any, folder: pathlib.Path) -> None:
    pipeline.save_pretrained(folder)


def _unet(folder: pathlib.Path) -> None:
    UNet(unet_pipeline(class_rows=4), "tiny", classes=("cat", "dog", "owl")).save(folder)


PIPELINES: dict[str, Callable[[pathlib.Path], object]] = {
    "flux": lambda folder: _saved(flux_pipeline(WORDS, layers=1, single_layers=1, heads=2), folder),
    "flux-mid": lambda folder: _saved(
        flux_pipeline(WORDS, layers=1, single_layers=3, heads=12, text_width=128, text_length=16), folder
    ),
    "kontext": lambda folder: _saved(
        kontext_pipeline(
            VOCABULARY, vae_channels=(8, 8, 8), latent_channels=4, layers=1, single_layers=1, heads=2, text_length=10,
            size=24,
        ), folder,
    ),
    "unet": _unet,
}  # fmt: skip


Run = Callable[[], object]


def _erase(model: Any, config: Any, memory: Memory) -> Run:
    from fieldsmith.methods.erase.loop import erase

    if memory.checkpointing:
        checkpoint_activations(model)
    return lambda: erase(model, config)


def _align(model: Any, config: Any, memory: Memory) -> Run:
    from fieldsmith.methods.align.loop import align

    from fieldsmith.rewards import load as reward

    return lambda: align(model, config, reward(config.reward, None))


def _edit(model: Any, config: Any, memory: Memory) -> Run:
    from fieldsmith.methods.edit.loop import edit

    from fieldsmith.methods.edit.rollouts import Task
    from fieldsmith.rewards.sessions import Exact
    from fieldsmith.worlds.scenes import ScenesWorld
    from fieldsmith.worlds.scenes_judge import Channel

    world = ScenesWorld(24)
    task = Task(lambda n, seed: world.sessions(n, config.turns, seed, config.dependency), Exact(config.against), True)
    return lambda: edit(model, config, task, Channel(1.0, 0.0, 0.0))


def _distill(model: Any, config: Any, memory: Memory) -> Run:
    from fieldsmith.methods.distill.loop import distill

    from fieldsmith.methods.distill.bank import Source
    from fieldsmith.models.shrink import shrink

    return lambda: distill(
        model, shrink(model, config.shrink), Source(_states(model), torch.arange(64) % 3, model.classes), config,
        quiet=True,
    )  # fmt: skip


def _sharpen(model: Any, config: Any, memory: Memory) -> Run:
    from fieldsmith.methods.sharpen.loop import sharpen

    return lambda: sharpen(model, _states(model), config, quiet=True)


def _states(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.noise(64, torch.Generator().manual_seed(0))
    return found


RUNS: dict[str, Callable[[Any, Any, Memory], Run]] = {
    "erase": _erase, "align": _align, "edit": _edit, "distill": _distill, "sharpen": _sharpen,
}  # fmt: skip
