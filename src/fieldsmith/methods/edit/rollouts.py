"""Sessions run in batches, turn after turn, on the model's own results; judged while the next turn is drawn.

In: a Task (sessions and their judge), a model. Out: a Collection: every edit's source, result and scores (MT-EditFlow
notes, 1.1 and 2.5). Nothing is differentiated through a turn's boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.align.rollouts import Plan, Rows, roll
from fieldsmith.methods.align.schedule import Schedule, schedule
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.models.core import Condition, Model, stack
from fieldsmith.models.editing import encode_unique, quantised, states_of
from fieldsmith.paths import RectifiedFlow
from fieldsmith.samplers import rollout
from fieldsmith.training import step_generator

NOISE = {"flow-sde": 0.7, "dance-sde": 0.3, "cps": 0.7}


class Sessions(Protocol):
    """n sessions of equally many turns. `clean(0)` is the start; later planned states only where a world knows them."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any) -> Any: ...
    @property
    def turns(self) -> int: ...
    def prompts(self, turn: int) -> list[str]: ...
    def clean(self, turn: int) -> Tensor: ...


class Judged(Protocol):
    """One turn's scores in [0, 1], each (n,)."""

    @property
    def following(self) -> Tensor: ...
    @property
    def consistency(self) -> Tensor: ...


Judge = Callable[[Any, int, Tensor, Tensor, Tensor], Judged]  # sessions, turn, before, after, first image


@dataclass(frozen=True)
class Task:
    """What is asked: sessions drawn as (how many, seed), their judge, and whether planned states are known."""

    draw: Callable[[int, int], Any]
    judge: Judge
    planned: bool


Channel = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Collection:
    """m = T P G edits, turn by turn: sources and results (m, ...) as states, `text` rows of the condition `texts`,
    `turn` (m,) from 0, `unit` (m,) the session's row in (P, G) flattened; scores (P, G, T); GRPO's rows if drawn."""

    source: Tensor
    x_0: Tensor
    text: Tensor
    turn: Tensor
    unit: Tensor
    texts: Condition
    following: Tensor
    consistency: Tensor
    rows: Rows | None

    def condition(self, at: Tensor) -> Condition:
        return self.texts[self.text[at]]


@dataclass(frozen=True)
class Setting:
    """What stays the same over a run."""

    model: Model
    config: EditConfig
    task: Task
    s: Schedule
    channel: Channel
    nothing: Condition

    @staticmethod
    def of(model: Model, config: EditConfig, task: Task, channel: Channel) -> Setting:
        if not isinstance(model.path, RectifiedFlow):
            raise InputError(f"{model.name} is not on rectified flow; edit's objectives are written for flows")
        needs = "supervised targets" if config.objective == "supervised" else "clean sources"
        if not task.planned and (config.objective == "supervised" or config.sources == "clean"):
            raise InputError(f"{needs} need planned images, which session files lack; use a world, or sources own")
        level = NOISE[config.sde] if config.noise_level is None else config.noise_level
        s = schedule(model.path, model.grid(config.steps), model.kind, config.sde, level)
        nothing = model.encode([config.identity_prompt])
        setting = Setting(model, config, task, s, channel, nothing)
        if config.objective == "grpo" and not bool(setting.drawn.any()):
            raise InputError(
                f"steps={config.steps}, noise_level={level:g} and window={config.window} leave GRPO no step with a "
                "density; use noise above 0, and no window that is the certain last step alone"
            )
        return setting

    @property
    def noise_level(self) -> float:
        return NOISE[self.config.sde] if self.config.noise_level is None else self.config.noise_level

    @property
    def drawn(self) -> Tensor:
        """Steps that GRPO draws, (K,) bool."""
        drawn = self.s.noisy.clone()
        if self.config.window:
            drawn[: self.config.window[0]] = False
            drawn[self.config.window[1] + 1 :] = False
        return drawn

    def output(self, x: Tensor, step: Tensor, condition: Condition, source: Tensor) -> Tensor:
        """The network's own output at rows (n, ...), step ids (n,); gradients flow if they are enabled."""
        model: Any = self.model
        x = x.to(model.device)
        seen = model.with_latents(condition, source)
        parts = [
            model.predict(x[at], self.s.times.to(x)[step[at]], seen[at], self.config.guidance).value
            for at in (
                [torch.arange(len(x))] if torch.is_grad_enabled() else torch.arange(len(x)).split(self.config.chunk)
            )
        ]
        return torch.cat(parts)


@torch.no_grad()
def collect(setting: Setting, epoch: int) -> Collection:
    """One collection under the model's present weights. Raises RunError where the judge fails."""
    config, model = setting.config, setting.model
    P, G, T = config.groups, config.rollouts, config.turns
    generator = step_generator(config.seed, epoch, stream=5)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    sessions = setting.task.draw(P, seed)
    index = torch.arange(P).repeat_interleave(G)
    many = sessions[index.tolist()]
    first = quantised(many.clean(0))
    source, before = first, first
    texts, parts, drawn, waiting = [], [], [], []
    with ThreadPoolExecutor(1, thread_name_prefix="edit-judge") as judge:
        for turn in range(1, T + 1):
            texts.append(encode_unique(model, sessions.prompts(turn)))
            if config.sources == "clean" and turn > 1:
                source = before = quantised(many.clean(turn - 1))
            x = model.noise(P * G, generator)
            latents, x_0, rows = _turn(setting, source, texts[-1][index], x, generator)
            after = quantised(_decoded(setting, x_0))
            if processes.is_main():  # the others hear what it was told
                judged = judge.submit(_judged, setting.task.judge, many, turn, before.clone(), after.clone(), first)
                waiting.append(judged)
            parts.append((latents, x_0))
            drawn.append(rows)
            before, source = after, setting.channel(after, generator)
        scores = processes.once(lambda: _gathered(waiting, P, G))
    unit = torch.arange(P * G).repeat(T)
    turns = torch.arange(T).repeat_interleave(P * G)
    # P rows of text a turn, whatever the group's size
    text = torch.cat([P * t + index for t in range(T)])
    rows = None
    if drawn[0] is not None:
        moved = [replace(part, prompt=part.prompt + P * G * t) for t, part in enumerate(drawn) if part is not None]
        rows = Rows(*(torch.cat([getattr(part, name) for part in moved]) for name in Rows.__dataclass_fields__))
    return Collection(
        torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), text, turns, unit,
        stack(texts), scores.following, scores.consistency, rows,
    )  # fmt: skip


@dataclass(frozen=True)
class _Turned:
    latents: Tensor
    x_0: Tensor
    rows: Rows | None

    def __iter__(self) -> Any:
        return iter((self.latents, self.x_0, self.rows))


def _turn(setting: Setting, source: Tensor, condition: Condition, x: Tensor, generator: torch.Generator) -> _Turned:
    """One turn of n sessions: sources as latents, results, and GRPO's rows with `prompt` the edit's row."""
    config = setting.config
    model: Any = setting.model
    latents, ends, kept = [], [], []
    for at in torch.arange(len(x)).split(config.chunk):
        latents.append(states_of(model, source[at]))
        seen = model.with_latents(condition[at], latents[-1])  # as the update will see it
        if config.objective == "grpo":
            found = roll(
                lambda state, t, row: model.predict(state, t, seen[row], config.guidance),  # noqa: B023
                x[at], torch.arange(len(at)), setting.s,
                Plan("sde", torch.ones(len(setting.s), dtype=torch.long), setting.drawn), config.sde,
                setting.noise_level, generator,
            )  # fmt: skip
            ends.append(found.x_0)
            kept.append(replace(found.rows, prompt=found.rows.prompt + int(at[0])))
        else:
            grid = setting.s.times.to(x)
            ends.append(
                rollout(lambda state, t: model.predict(state, t, seen, config.guidance), x[at], grid).last  # noqa: B023
            )
    rows = Rows(*(torch.cat([getattr(r, n) for r in kept]) for n in Rows.__dataclass_fields__)) if kept else None
    return _Turned(torch.cat(latents), torch.cat(ends), rows)


def _decoded(setting: Setting, x_0: Tensor) -> Tensor:
    return torch.cat([setting.model.decode(part).cpu() for part in x_0.split(setting.config.chunk)])


@torch.no_grad()
def _judged(judge: Judge, sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Judged:
    found = judge(sessions, turn, before, after, first)
    for name, given in (("following", found.following), ("consistency", found.consistency)):
        if given.shape != (len(after),):
            raise RunError(
                f"the judge gave {tuple(given.shape)} for {name} of {len(after)} edits; it must give one each"
            )
        if not bool(given.isfinite().all()):
            raise RunError(f"the judge gave NaN or infinity for {name} at turn {turn}")
    return found


@dataclass(frozen=True)
class _Scores:
    following: Tensor
    consistency: Tensor


def _gathered(waiting: Sequence[Future[Judged]], P: int, G: int) -> _Scores:
    """(P, G, T) of each; raises again what the judge raised."""
    turns = [future.result() for future in waiting]
    return _Scores(*(
        torch.stack([getattr(turn, name).detach().float().cpu() for turn in turns], 1).reshape(P, G, len(turns))
        for name in ("following", "consistency")
    ))  # fmt: skip
