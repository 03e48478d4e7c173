"""The public functions: names and settings become configs, callables and data, which go to `verb.run`.

The command line calls the same functions with a config that it has parsed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from fieldsmith import verb
from fieldsmith.config import Config, configure
from fieldsmith.errors import InputError
from fieldsmith.functions import name_of
from fieldsmith.methods.edit.config import AUTO, FUNCTION, GIVEN, EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.edit.rollouts import World
from fieldsmith.methods.edit.verb import EDIT
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.models import load as load
from fieldsmith.models.core import Model
from fieldsmith.result import Result
from fieldsmith.rewards.sessions import load as load_judge
from fieldsmith.sessions import UserSessions
from fieldsmith.verb import Callback
from fieldsmith.worlds import scenes_judge
from fieldsmith.worlds.model_cards import card_of, world_of
from fieldsmith.worlds.scenes import NOTHING, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel

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


def edit(
    model: Model | str | None = None,
    sessions: str | pathlib.Path | Iterable[Any] | None = None,
    judge: str | Callable[..., Any] | None = None,
    *,
    config: EditConfig | None = None,
    preset: str | None = None,
    scale: str | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Result:
    """Train an image editor on its own multi-turn sessions (MT-EditFlow, arXiv 2606.01985).

    `model` is a Model, which is trained in place, or a name to load. `sessions` is a file with a line
    {"image": ..., "instructions": [...]} a session, or such dicts or pairs (image, instructions), where an image is a
    path or PIL's; or 'auto', the world that the model's card names. `judge` is judge(before, after, instructions) ->
    (following, consistency): images (n, 3, h, w) in [0, 1], n instructions, n numbers in [0, 1] each; or a name
    (EditConfig.judge). Every field of EditConfig is a keyword; `config` takes the whole. out=None writes nothing.
    Raises InputError before anything is trained or written, RewardError where the judge fails, RunError where training
    breaks.
    """
    named = {"sessions": str(sessions) if isinstance(sessions, (str, pathlib.Path)) else None,
             "judge": judge if isinstance(judge, str) else None}  # fmt: skip
    config, model = settle(EditConfig, model, "model", config, preset, scale, named, settings)
    entries = list(sessions) if sessions is not None and named["sessions"] is None else None
    if entries is not None:
        config = config.replace(sessions=f"{GIVEN}{len(entries)}")
    if callable(judge):
        config = config.replace(judge=f"{FUNCTION}{name_of(judge)}")
    config.check()
    size = getattr(model, "resolution", None)
    inputs = edit_inputs(config, entries, judge if callable(judge) else None, size)
    return verb.run(EDIT, config, inputs, model, callback)


def edit_inputs(
    config: EditConfig,
    sessions: Iterable[Any] | None = None,
    judge: Callable[..., Any] | None = None,
    size: int | None = None,
) -> EditInputs:
    """Sessions and judge of `edit`, as given or as the config names them; `size` of sessions' images in pixels.

    Raises InputError where a file cannot be read, a server does not answer, or no world is known.
    """
    scores = load_judge(judge or config.judge, config.against)
    channel = Channel(config.contrast, config.blur, config.noise)
    if config.sessions == AUTO:
        card = card_of(config.model)
        if card.get("world") != "scenes":
            raise InputError(
                f"'{config.model}' names no world of sessions; add --sessions FILE.jsonl with a line "
                '{"image": "a.png", "instructions": ["...", "..."]} a session'
            )
        world = ScenesWorld(int(card["size"]))
        plan = World(scenes_judge.judge, partial(scenes_judge.likeness, world), NOTHING)
        return EditInputs(
            lambda n, seed, turns: world.sessions(n, turns, seed, config.dependency), scores, channel, plan
        )
    source = config.sessions if sessions is None else sessions
    own = UserSessions.of(source, size or config.resolution or 512)
    if own.turns < config.turns:
        raise InputError(f"turns={config.turns}, but the sessions of '{config.sessions}' have {own.turns}; lower it")
    return EditInputs(own.sample, scores, channel)


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
