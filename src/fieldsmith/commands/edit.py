"""`fieldsmith edit`: train an editor on its own multi-turn sessions, and run held-out sessions before and after.

In: the words after the verb. Out: a run directory with adapter/ (or model/), metrics.json and report.html.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fieldsmith import processes
from fieldsmith.commands import arguments, memory
from fieldsmith.commands.memory import Memory
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.edit.config import PRESETS, EditConfig, check, preset

if TYPE_CHECKING:
    from torch import Tensor

    from fieldsmith.methods.edit.rollouts import Task
    from fieldsmith.models.core import Model
    from fieldsmith.run import Run
    from fieldsmith.worlds.scenes_judge import Channel

NOTES = f"""--preset NAME picks a recipe (default: fieldsmith): {", ".join(PRESETS)}.
--scale laptop|paper picks its size (default: laptop for zoo models, else paper).
--config FILE.toml (such as a run's config.toml) sets fields again, and flags come last."""
HELD_OUT = 1_000_003  # added to the seed of sessions that are only measured


def edit(words: Sequence[str]) -> None:
    run(*settings(list(words)))


def configure(words: list[str]) -> EditConfig:
    """The settings without those of its memory."""
    return settings(words)[0]


def settings(words: list[str]) -> tuple[EditConfig, Memory]:
    """Preset, then file, then flags."""
    name, path = arguments.take(words, "--preset"), arguments.take(words, "--config")
    size = arguments.take(words, "--scale")
    file = arguments.from_file(path, EditConfig, "edit", Memory) if path else {}
    fits = memory.taken(file)
    model = str(arguments.peek(words, "--model") or file.get("model", EditConfig.model))
    size = size or ("laptop" if path or model.startswith("zoo:") else "paper")
    if size not in ("laptop", "paper"):
        raise InputError(f"scale '{size}' is unknown; use laptop or paper")
    base = dataclasses.replace(preset(name or "fieldsmith", size), **file)
    return arguments.parse_with(base, fits, words, "edit", NOTES)


def run(config: EditConfig, fits: Memory = memory.DEFAULT) -> Run:
    """The whole verb; the finished run directory. Raises InputError before anything is written."""
    check(config)
    memory.check(fits, not config.full, "--full")
    import torch
    from rich.console import Console

    from fieldsmith.methods.edit import loop
    from fieldsmith.models.editing import check_editor
    from fieldsmith.worlds.scenes_judge import Channel

    console = Console(stderr=True)
    directory = arguments.directory_of(config, "edit", fits)
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    if config.threads:
        torch.set_num_threads(config.threads)
    task = task_of(config)
    model = memory.loaded(fits, config.model, config.resolution)
    check_editor(model)
    channel = Channel(config.contrast, config.blur, config.noise)
    with memory.trained(fits, model):
        result = loop.edit(model, config, task, channel, directory)
    shipped = "adapter" if model.spec else "model"
    model.save(directory.folder / shipped)
    console.print(f"{result.steps} steps in {result.seconds:.0f} s ({result.stopped}); running held-out sessions")
    if result.stopped == loop.NO_VARIANCE:
        console.print(
            f"[bold]{config.patience} collections in a row taught nothing[/bold]: the judge gives every session of a "
            "group the same; raise --rollouts or --steps, ask for harder sessions, or lower --min-spread"
        )
    with model.reference():
        before = measured(model, config, task, channel)
    after = measured(model, config, task, channel)
    metrics: dict[str, Any] = {
        "method": config.preset or config.objective, "seconds": result.seconds, "steps": result.steps,
        "stopped": result.stopped, "forward_equivalents": result.forward_equivalents, "adapter": shipped,
        "before": before.numbers, "after": after.numbers,
    }  # fmt: skip
    from fieldsmith.commands.edit_page import page_of

    page_of(config, metrics, before, after, directory).write(directory.folder / "report.html")
    directory.finish(metrics)
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def task_of(config: EditConfig) -> Task:
    """Sessions and their judge. Raises InputError where one does not go with the other, or neither is there."""
    from fieldsmith.methods.edit.rollouts import Task
    from fieldsmith.rewards.sessions import load as load_judge
    from fieldsmith.worlds.model_cards import card_of
    from fieldsmith.worlds.scenes import ScenesWorld

    judge = load_judge(config.judge, config.against)
    if config.sessions == "auto":
        card = card_of(config.model)
        if card.get("world") != "scenes":
            raise InputError(
                f"'{config.model}' names no world of sessions; add --sessions FILE.jsonl with a line "
                '{"image": "a.png", "instructions": ["...", "..."]} a session'
            )
        world = ScenesWorld(int(card["size"]))
        return Task(lambda n, seed: world.sessions(n, config.turns, seed, config.dependency), judge, True)
    if config.judge == "exact":
        raise InputError("judge 'exact' knows worlds alone; add --judge remote:http://HOST:PORT/v1?model=MODEL")
    from fieldsmith.sessions import UserSessions

    listed = UserSessions.of(config.sessions, config.resolution or 512)
    if listed.turns < config.turns:
        raise InputError(f"turns={config.turns}, but the sessions of '{config.sessions}' have {listed.turns}; lower it")
    return Task(lambda n, seed: listed.sample(n, seed, config.turns), judge, False)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Held-out sessions run once: numbers for metrics.json, a few sessions' images (n, T + 1, 3, h, w), their words."""

    numbers: dict[str, Any]
    images: Tensor
    words: list[list[str]]
    marks: list[list[bool | None]]


def measured(model: Model, config: EditConfig, task: Task, channel: Channel, shown: int = 6) -> Measured:
    """Everything that the sessions tell; on a world with what clean sources and asking for nothing give too."""
    from fieldsmith.metrics import editing

    seed = HELD_OUT + config.seed
    if not task.planned:
        return _judged(model, config, task, channel, shown)
    from fieldsmith.diagnose.exposure import exposure

    sessions = task.draw(1, 0).world.sessions(config.evaluate, config.evaluate_turns, seed, config.dependency)
    found = exposure(
        model, sessions, config.evaluate_steps, seed, config.guidance, channel, forced=True, still=config.still
    )
    scores = editing.scores(found.sessions)
    numbers: dict[str, Any] = {
        name: [dataclasses.asdict(one) for one in turns] for name, turns in vars(scores).items() if turns
    }
    if found.drift is not None and found.artefacts is not None:
        numbers["drift"] = found.drift.mean(1).tolist()
        numbers["artefacts"] = found.artefacts.mean(1).tolist()
    words = [sessions.prompts(turn)[:shown] for turn in range(1, sessions.turns + 1)]
    marks: list[list[bool | None]] = [[bool(x) for x in one.done[:shown]] for one in found.own]
    return Measured(numbers, found.images[:shown], words, marks)


def _judged(model: Model, config: EditConfig, task: Task, channel: Channel, shown: int) -> Measured:
    """Sessions of a file, by the judge that trained: mean scores a turn."""
    import torch

    from fieldsmith.metrics.intervals import mean_interval
    from fieldsmith.models.editing import edit, encode_unique, quantised
    from fieldsmith.training import step_generator

    spent = model.forwards
    sessions = task.draw(config.evaluate, HELD_OUT + config.seed)
    first = quantised(sessions.clean(0))
    before = source = first
    numbers: dict[str, Any] = {"score of following": [], "score of consistency": []}
    images, words = [first], []
    for turn in range(1, sessions.turns + 1):
        generator = step_generator(config.seed, turn, stream=9)
        told_ = encode_unique(model, sessions.prompts(turn))
        after = edit(model, told_, source, generator, config.evaluate_steps, config.guidance)
        scores = processes.once(partial(task.judge, sessions, turn, before, after, first))
        for name, given in (("following", scores.following), ("consistency", scores.consistency)):
            if not bool(given.isfinite().all()):
                raise RunError(f"the judge gave NaN or infinity for {name} at turn {turn}")
            numbers[f"score of {name}"].append(dataclasses.asdict(mean_interval(given)))
        images.append(after)
        words.append(sessions.prompts(turn)[:shown])
        before, source = after, channel(after, generator)
    model.forwards = spent
    return Measured(numbers, torch.stack(images, 1)[:shown], words, [[None] * shown for _ in words])
