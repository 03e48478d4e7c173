"""Each verb's training alone, as tests ask for it: `erase(model, config, run, callback)` and so on."""

from __future__ import annotations

from fieldsmith import verb
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.edit.verb import EDIT
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.models.core import Model
from fieldsmith.run import Run
from fieldsmith.verb import Callback, Trained


def erase(model: Model, config: EraseConfig, run: Run | None = None, callback: Callback | None = None) -> Trained:
    return verb.train(ERASE, model, config, EraseInputs(), run, callback)[1]


def edit(
    model: Model, config: EditConfig, inputs: EditInputs, run: Run | None = None, callback: Callback | None = None
) -> Trained:
    return verb.train(EDIT, model, config, inputs, run, callback)[1]
