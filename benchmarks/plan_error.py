"""How far plans are off: the peak that `plan` says against the one that a run then has, on small models.

Both sides count bytes of storages alive (models/estimate_memory.py): the run for real, in every operation that it makes
from its preflight to its last step; the plan from configs alone. What a device's allocator adds to either is left out
of both, so the share is of the estimate itself, and the same on every machine.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experiments.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
from fieldsmith import planning, verb
from fieldsmith.config import Config
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.step import Inputs as DistillInputs
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.step import Inputs as SharpenInputs
from fieldsmith.models import load
from fieldsmith.models.estimate_memory import measured
from fieldsmith.models.meta_model import meta_model
from fieldsmith.models.unet import UNet
from fieldsmith.planning import Judged, Scores
from fieldsmith.worlds.scenes import VOCABULARY, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel

CLASSES = ("cat", "dog", "owl")
WORDS = ("a", "red", "blue", "square", "circle")
ERASE = EraseConfig(
    targets=("red circle",), anchors=("blue circle",), steps=4, window=(1, 3), budget=24, rollout_guidance=1.0, rank=4,
    dropout=0.1, batch=4, chunk=12, subset="attention",
)  # fmt: skip
ALIGN = AlignConfig.preset_of("flow-grpo", None, {}).replace(
    prompts=("red circle", "blue square"), reward="brightness", steps=3, epochs=1, prompts_per_epoch=2, rollouts=8,
    chunk=16, rank=4,
)  # fmt: skip
EDIT = EditConfig(epochs=1, groups=2, rollouts=4, turns=2, steps=3, chunk=8, rank=4, updates=2)
DISTILL = DistillConfig(steps=2, batch=16, bank=0, shrink=3.0, warmup=0)
SHARPEN = SharpenConfig(method="plain", steps=2, batch=8, warmup=0)


@dataclass(frozen=True)
class Setting:
    """A run: which pipeline, which verb and its settings."""

    name: str
    pipeline: str
    verb: str
    config: Any


SETTINGS = (
    Setting("erase", "flux", "erase", ERASE),
    Setting("erase, mid-size", "flux-mid", "erase", ERASE.replace(budget=12)),
    Setting("erase, checkpointing", "flux", "erase", ERASE.replace(checkpointing=True)),
    Setting("erase, full weights, chunks", "flux", "erase", ERASE.replace(full=True, chunk=5)),
    Setting("align", "flux", "align", ALIGN),
    Setting("edit", "kontext", "edit", EDIT),
    Setting("distill", "unet", "distill", DISTILL),
    Setting("sharpen", "unet", "sharpen", SHARPEN),
)


@dataclass(frozen=True)
class Compared:
    """Peaks in bytes, network evaluations and reward calls, as planned and as a run had them."""

    planned: int
    measured: int
    nfe: tuple[float, float]
    reward_calls: tuple[int, int]

    @property
    def error(self) -> float:
        return abs(self.planned / self.measured - 1)


def plan_error(settings: Sequence[Setting] = SETTINGS) -> float:
    """The worst share by which a planned peak misses the measured one."""
    with tempfile.TemporaryDirectory() as folder:
        return max(compare(setting, pathlib.Path(folder)).error for setting in settings)


def compare(setting: Setting, folder: pathlib.Path) -> Compared:
    """A setting planned and run; its pipeline is written under `folder` where it is not there yet."""
    place = folder / setting.pipeline
    if not place.exists():
        PIPELINES[setting.pipeline](place)
    config: Config = setting.config
    of, _ = planning.INPUTS[setting.verb]
    judged = Judged()
    seen = planning.rehearse(of, meta_model(place), config, INPUTS[setting.verb](config, judged), lambda: judged.calls)
    model, ran, judged = load(place), [], Judged()
    peak = measured(model, lambda: ran.append(verb.train(of, model, config, INPUTS[setting.verb](config, judged))[1]))
    return Compared(sum(seen.memory.values()), peak, (seen.nfe, ran[0].cost["nfe"]), (seen.reward_calls, judged.calls))


def _saved(pipeline: Any, folder: pathlib.Path) -> None:
    pipeline.save_pretrained(folder)


def _unet(folder: pathlib.Path) -> None:
    UNet(unet_pipeline(class_rows=4), "tiny", classes=CLASSES).save(folder)


PIPELINES: dict[str, Callable[[pathlib.Path], object]] = {
    "flux": lambda folder: _saved(flux_pipeline(WORDS, layers=1, single_layers=1, heads=2), folder),
    "flux-mid": lambda folder: _saved(
        flux_pipeline(WORDS, layers=1, single_layers=6, heads=12, text_width=128, text_length=16), folder
    ),
    "kontext": lambda folder: _saved(
        kontext_pipeline(
            VOCABULARY, vae_channels=(8, 8, 8), latent_channels=4, layers=1, single_layers=1, heads=2, text_length=10,
            size=24,
        ), folder,
    ),
    "unet": _unet,
}  # fmt: skip


def _sessions(config: EditConfig, judged: Judged) -> EditInputs:
    world = ScenesWorld(24)

    def judge(sessions: Any, turn: int, before: Any, after: Any, first: Any) -> Scores:
        following = judged.numbers(after)
        return Scores(following, following.flip(0))

    channel = Channel(config.contrast, config.blur, config.noise)
    return EditInputs(lambda n, seed, turns: world.sessions(n, turns, seed, config.dependency), judge, channel)


def _states() -> torch.Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


INPUTS: dict[str, Callable[[Any, Judged], Any]] = {
    "align": lambda config, judged: AlignInputs(judged.load("brightness")),
    "distill": lambda config, judged: DistillInputs(source=Source(_states(), torch.arange(64) % 3, CLASSES)),
    "edit": _sessions,
    "erase": lambda config, judged: EraseInputs(),
    "sharpen": lambda config, judged: SharpenInputs(states=_states()),
}
