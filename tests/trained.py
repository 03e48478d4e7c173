"""Each verb's training alone, as tests ask for it: `erase(model, config, run, callback)` and so on."""

from __future__ import annotations

import pathlib
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fieldsmith import checkpoints, rewards, verb
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
from fieldsmith.models.core import Model
from fieldsmith.run import Run
from fieldsmith.verb import Callback, Job, Trained


def align(
    model: Model, config: AlignConfig, reward: Any, run: Run | None = None, callback: Callback | None = None
) -> Trained:
    return verb.train(ALIGN, model, config, AlignInputs(rewards.load(reward)), run, callback)[1]


def erase(model: Model, config: EraseConfig, run: Run | None = None, callback: Callback | None = None) -> Trained:
    return verb.train(ERASE, model, config, EraseInputs(), run, callback)[1]


def edit(
    model: Model, config: EditConfig, inputs: EditInputs, run: Run | None = None, callback: Callback | None = None
) -> Trained:
    return verb.train(EDIT, model, config, inputs, run, callback)[1]


def distill(
    teacher: Model, student: Model | None, source: Source, config: DistillConfig, run: Run | None = None
) -> tuple[Job, Trained]:
    return verb.train(DISTILL, teacher, config, DistillInputs(source=source, student=student), run)


def sharpen(model: Model, states: Tensor, config: SharpenConfig, run: Run | None = None) -> tuple[Job, Trained]:
    return verb.train(SHARPEN, model, config, SharpenInputs(states=states), run)


def weights_in(checkpoint: pathlib.Path) -> dict[str, Tensor]:
    """The parameters that a checkpoint of one process holds, by name."""
    stored = load_file(checkpoint / checkpoints.FILE)
    return {name.removeprefix("weights/"): part for name, part in stored.items() if name.startswith("weights/")}
