"""What a call is given -- names, settings, objects, finished runs -- becomes a config, which holds no objects.

In: keyword arguments of a verb's function. Out: its config, and the model where it was given as an object.
"""

from __future__ import annotations

import pathlib
from typing import Any, TypeVar

from fieldsmith.config import GIVEN, Config, configure
from fieldsmith.errors import InputError
from fieldsmith.models.core import Model
from fieldsmith.result import Result, going_on
from fieldsmith.run import base_of

C = TypeVar("C", bound=Config)


def settle(
    kind: type[C],
    model: Model | Result | str | None,
    source: str,
    config: C | None,
    preset: str | None,
    scale: str | None,
    named: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[C, Model | None]:
    """The config of a call, and the model where it was given as one; `source` is the field that names it.

    A Result, or a finished run's directory, stands for what the run left: its base with its adapters. Raises InputError
    where both a config and settings are given, or at a bad setting.
    """
    given = {name: value for name, value in named.items() if value is not None} | settings
    model = going_on(model)
    begun = getattr(config, source) if model is None and config is not None else model
    if isinstance(begun, str) and (found := base_of(begun)):
        model, of_base = found.model, {"config_from": found.config_from} if found.config_from else {}
        if config is not None:
            config = config.replace(**{source: model, "adapter": (*found.adapter, *config.adapter)}, **of_base)
        else:
            given |= of_base | {"adapter": (*found.adapter, *given.get("adapter", ()))}
    if isinstance(model, Model):
        given[source] = model.name
        if model.adapters and config is None:
            given.setdefault("adapter", model.adapters)
    elif model is not None:
        given[source] = str(model)
    if config is None:
        return configure(kind, given, preset, scale), model if isinstance(model, Model) else None
    other = sorted(set(given) - {source})
    if other or preset or scale:
        raise InputError(f"config and {', '.join(other) or 'preset'} are both given; put everything into the config")
    if isinstance(model, Model) and not config.adapter:
        given["adapter"] = model.adapters
    return config.replace(**given), model if isinstance(model, Model) else None


def data_name(data: Any) -> str | None:
    """How a config names data: a name as it is, an object as 'given:NAME'."""
    if data is None or isinstance(data, (str, pathlib.Path)):
        return None if data is None else str(data)
    return f"{GIVEN}{getattr(data, 'name', None) or type(data).__name__}"


def with_objects(config: C | None, given: dict[str, Any]) -> C | None:
    """Functions and objects may be given beside a config, which cannot hold them: move their names into it."""
    if config is None:
        return None
    names = [name for name, value in given.items() if str(value).startswith((GIVEN, "function:"))]
    return config.replace(**{name: given.pop(name) for name in names})


def still_there(name: Any) -> Any:
    """The name, or a function. Raises InputError where it is a name that stands for an object of another session."""
    if str(name).startswith((GIVEN, "function:")):
        raise InputError(f"'{name}' was an object in Python when this run was begun; hand it over again")
    return name
