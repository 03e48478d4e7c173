"""The public functions: names and settings become configs, callables and data, which go to `verb.run`.

The command line calls the same functions with a config that it has parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fieldsmith import verb
from fieldsmith.config import Config, configure
from fieldsmith.errors import InputError
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.models import load as load
from fieldsmith.models.core import Model
from fieldsmith.result import Result
from fieldsmith.verb import Callback
from fieldsmith.worlds.model_cards import world_of

C = TypeVar("C", bound=Config)


def erase(
    model: Model | str | None = None,
    targets: Sequence[str] | str | None = None,
    anchors: Sequence[str] | str | None = None,
    *,
    method: str | Callable[..., Any] | None = None,
    config: EraseConfig | None = None,
    preset: str | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Result:
    """Make target prompts give what anchor prompts give (GEM, arXiv 2606.00140, and six baselines).

    `model` is a Model, which is trained in place, or a name to load. `method` may be a function of your own
    (docs/extend.md). Every field of EraseConfig is a keyword; `config` takes the whole. out=None writes nothing.
    Raises InputError before anything is trained or written, RunError where training breaks.
    """
    build = method if callable(method) else None
    named = getattr(method, "__name__", None) if build else method
    given = {"targets": targets, "anchors": anchors, "method": f"function:{named}" if build else named}
    config, model = settle(EraseConfig, model, "model", config, preset, None, given, settings)
    if build is None and ":" in config.method:
        build = load_function(config.method)
    return verb.run(ERASE, config, EraseInputs(world_of(config.model), build), model, callback)


def settle(
    kind: type[C],
    model: Model | str | None,
    source: str,
    config: C | None,
    preset: str | None,
    scale: str | None,
    named: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[C, Model | None]:
    """The config of a call, and the model where it was given as one; `source` is the field that names it.

    Raises InputError where both a config and settings are given, or at a bad setting.
    """
    given = {name: value for name, value in named.items() if value is not None} | settings
    if isinstance(model, Model):
        given[source] = model.name
    elif model is not None:
        given[source] = str(model)
    if config is None:
        return configure(kind, given, preset, scale), model if isinstance(model, Model) else None
    other = sorted(set(given) - {source})
    if other or preset or scale:
        raise InputError(f"config and {', '.join(other) or 'preset'} are both given; put everything into the config")
    return config.replace(**given), model if isinstance(model, Model) else None
