"""Sessions run in batches, turn after turn, on the model's own results; judged while the next turn is sampled.

In: what a run is given (sessions, their judge), a model. Out: a Collection: every edit's source, result and scores
(MT-EditFlow notes, 1.1 and 2.5). Nothing is differentiated through a turn's boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.policy.rollouts import Plan, Transitions, roll
from fieldsmith.methods.policy.schedule import Schedule, schedule
from fieldsmith.models.core import Condition, Model, stack
from fieldsmith.models.editing import encode_unique, quantised, states_of
from fieldsmith.paths import RectifiedFlow
from fieldsmith.samplers import rollout
from fieldsmith.sessions import Sessions
from fieldsmith.training import step_generator

NOISE = {"flow-sde": 0.7, "dance-sde": 0.3, "cps": 0.7}
CHANNEL = 1_000  # the first stream of draws for the channel, one an edit

# sessions, turn, before, after, first image -> scores with `following` and `consistency`, (n,) each in [0, 1]
Judge = Callable[[Any, int, Tensor, Tensor, Tensor], Any]
Channel = Callable[[Tensor, torch.Generator], Tensor]  # images of a turn -> images as the next turn gets them


@dataclass(frozen=True)
class World:
    """What is known where sessions have a plan, for measuring."""

    verdicts: Judge  # of which measure.exposure reads `done` and `kept_first`
    likeness: Callable[[Tensor, Tensor], Tensor]  # images, first images -> (n,) in [0, 1]
    nothing: str  # the instruction that asks for nothing


@dataclass(frozen=True)
class Inputs:
    """What a run is given beside its settings."""

    draw: Callable[[int, int, int], Sessions]  # how many, seed, turns
    judge: Judge
    channel: Channel
    world: World | None = None  # None: what turns should give is not known, as in session files


@dataclass(frozen=True)
class Collection:
    """m edits of this process's groups, turn by turn: sources and results (m, ...) as states, `text` rows of the
    condition `texts`, `turn` (m,) from 0, `unit` (m,) the session's row in (P, G) flattened; scores (P, G, T) of all
    processes' P groups; GRPO's transitions, whose `prompt` is the edit's row."""

    source: Tensor
    x_0: Tensor
    text: Tensor
    turn: Tensor
    unit: Tensor
    texts: Condition
    following: Tensor
    consistency: Tensor
    transitions: Transitions | None = None

    @property
    def edit(self) -> Tensor:
        """The edits' places among those of all processes, (m,)."""
        return self.turn * self.following[..., 0].numel() + self.unit

    def condition(self, at: Tensor) -> Condition:
        """The instructions of edits `at`, encoded."""
        return self.texts[self.text[at]]


@dataclass(frozen=True)
class EditContext:
    """What stays the same over a run."""

    model: Model
    config: EditConfig
    inputs: Inputs
    schedule: Schedule
    nothing: Condition  # the identity branch's prompt

    @staticmethod
    def of(model: Model, config: EditConfig, inputs: Inputs) -> EditContext:
        """Raises InputError where the objective does not fit the model or the sessions."""
        if not isinstance(model.path, RectifiedFlow):
            raise InputError(f"{model.name} is not on rectified flow; edit's objectives are written for flows")
        needs = "supervised targets" if config.objective == "supervised" else "clean sources"
        if inputs.world is None and (config.objective == "supervised" or config.sources == "clean"):
            raise InputError(f"{needs} need planned images, which session files lack; use a world, or sources own")
        level = NOISE[config.sde] if config.noise_level is None else config.noise_level
        steps = schedule(model.path, model.grid(config.steps), model.kind, config.sde, level)
        context = EditContext(model, config, inputs, steps, model.encode([config.identity_prompt]))
        if config.objective == "grpo" and not bool(context.plan.is_stochastic.any()):
            raise InputError(
                f"steps={config.steps}, noise_level={level:g} and window={config.window} leave GRPO no step with a "
                "density; use noise above 0, and no window that is the certain last step alone"
            )
        return context

    @property
    def noise_level(self) -> float:
        return NOISE[self.config.sde] if self.config.noise_level is None else self.config.noise_level

    @cached_property
    def plan(self) -> Plan:
        """Which steps GRPO takes stochastically."""
        is_stochastic = self.schedule.noisy.clone()
        if self.config.window:
            is_stochastic[: self.config.window[0]] = False
            is_stochastic[self.config.window[1] + 1 :] = False
        return Plan("sde", torch.ones(len(self.schedule), dtype=torch.long), is_stochastic)

    def output(self, x: Tensor, step: Tensor, condition: Condition, source: Tensor) -> Tensor:
        """The network's own output at states x (n, ...), step ids (n,), of sources (n, ...) as states.

        Gradients flow if they are enabled; otherwise it is computed in chunks.
        """
        editor: Any = self.model
        x = x.to(editor.device)
        given = editor.with_latents(condition, source)
        output: Tensor = editor.predict(x, self.schedule.times.to(x)[step], given, self.config.guidance).value
        return output

    def states(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1] as clean states, (n, ...)."""
        return states_of(self.model, images)

    def images(self, x_0: Tensor) -> Tensor:
        """Clean states as 8-bit images in [0, 1] on the CPU, as they are saved and read again between two turns."""
        return quantised(self.model.decode(x_0).cpu())

    def through_channel(self, images: Tensor, step: int, edits: Tensor) -> Tensor:
        """Images (n, 3, h, w) as the next turn gets them, each with draws of its own: those of (step, edit)."""
        changed = [
            self.inputs.channel(image[None], step_generator(self.config.seed, step, stream=CHANNEL + edit))
            for image, edit in zip(images, edits.tolist(), strict=True)
        ]
        return torch.cat(changed) if changed else images

    def sessions(self, n: int, epoch: int) -> Sessions:
        """An epoch's n sessions."""
        return self.inputs.draw(n, _session_seed(_epoch_generator(self, epoch)), self.config.turns)


def _epoch_generator(context: EditContext, epoch: int) -> torch.Generator:
    return step_generator(context.config.seed, epoch, stream=5)


def _session_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


@torch.no_grad()
def collect(context: EditContext, epoch: int) -> Collection:
    """One collection under the model's present weights.

    Raises RewardError where the judge fails.
    """
    config, model = context.config, context.model
    G, T, everyone = config.rollouts, config.turns, config.groups * config.rollouts
    generator = _epoch_generator(context, epoch)
    own = processes.owned(config.groups)
    P = len(own)
    sessions = context.inputs.draw(config.groups, _session_seed(generator), T)[own.tolist()]
    units = (own[:, None] * G + torch.arange(G)).flatten()  # this process's among all sessions that are run
    index = torch.arange(P).repeat_interleave(G)
    repeated = sessions[index.tolist()]
    first = quantised(repeated.clean(0))
    source, before = first, first
    texts, sources, results, transitions = [], [], [], []
    waiting: list[Future[Any]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="edit-judge") as pool:
        for turn in range(1, T + 1):
            texts.append(encode_unique(model, sessions.prompts(turn)))
            if config.sources == "clean" and turn > 1:
                source = before = quantised(repeated.clean(turn - 1))
            x = model.noise(everyone, generator)
            latents, x_0, steps = _turn(context, source, texts[-1][index], x, units, generator)
            after = context.images(x_0)
            images = [part.clone() for part in (before, after, first)]  # which a judge may change
            waiting.append(pool.submit(_ask, context.inputs.judge, waiting[-1:], repeated, turn, *images))
            sources.append(latents)
            results.append(x_0)
            if steps is not None:
                rows = int(context.plan.is_stochastic.sum()) * everyone  # of all processes in a turn
                earlier = turn - 1
                transitions.append(
                    replace(steps, prompt=steps.prompt + P * G * earlier, row=steps.row + rows * earlier)
                )
            before, source = after, context.through_channel(after, epoch, units + everyone * turn)
        following, consistency = (processes.gather(scores) for scores in _gather(waiting, P, G))
    return Collection(
        torch.cat(sources), torch.cat(results),
        torch.cat([P * t + index for t in range(T)]),  # P rows of text a turn, whatever the group's size
        torch.arange(T).repeat_interleave(P * G), units.repeat(T), stack(texts), following, consistency,
        Transitions.cat(transitions) if transitions else None,
    )  # fmt: skip


def _turn(
    context: EditContext, source: Tensor, condition: Condition, x: Tensor, units: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Transitions | None]:
    """One turn of this process's n sessions, `units` of all whose noise is x: sources as states, results, and GRPO's
    transitions with `prompt` the session's row."""
    config, editor, s = context.config, context.model, context.schedule
    assert hasattr(editor, "with_latents")
    latents = states_of(editor, source)
    given = editor.with_latents(condition, latents)  # as the update will get it

    def field(state: Tensor, t: Tensor, row: Any = slice(None)) -> Any:
        return editor.predict(state, t, given[row], config.guidance)

    if config.objective != "grpo":
        return latents, rollout(field, x[units], s.times.to(x)).last, None
    rows = torch.arange(len(units))
    rolled = roll(
        field, x[units], rows, s, context.plan, config.sde, context.noise_level, generator, own=units, everyone=len(x)
    )
    return latents, rolled.x_0, rolled.transitions


@torch.no_grad()
def _ask(judge: Judge, earlier: list[Future[Any]], *shown: Any) -> Any:
    """What the judge says of a turn; after a failure nothing more is asked."""
    for future in earlier:
        future.result()
    return judge(*shown)


def _gather(waiting: list[Future[Any]], P: int, G: int) -> tuple[Tensor, Tensor]:
    """Following and consistency, (P, G, T) each; raises what the judge raised."""
    turns = [future.result() for future in waiting]
    following, consistency = (
        torch.stack([getattr(turn, name).detach().float().cpu() for turn in turns], 1).reshape(P, G, len(turns))
        for name in ("following", "consistency")
    )
    return following, consistency
