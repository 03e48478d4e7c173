"""`fieldsmith align`: train towards a reward, save, judge what changed, write the page.

In: the words after the verb. Out: a run directory with adapter/ (or model/), metrics.json and report.html.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments, memory
from fieldsmith.commands.memory import Memory
from fieldsmith.errors import InputError
from fieldsmith.methods.align.config import RECIPES, AlignConfig, check, preset, scale_for

if TYPE_CHECKING:
    from torch import Tensor

    from fieldsmith.diagnose.concepts import Sampler
    from fieldsmith.methods.align.loop import Result
    from fieldsmith.models.core import Model
    from fieldsmith.report.page import Page
    from fieldsmith.rewards import Reward
    from fieldsmith.run import Run

NOTES = f"""--preset NAME picks a recipe (default: flow-grpo): {", ".join(RECIPES)}.
--scale laptop|paper picks the numbers that it runs at (default: laptop for zoo models, else paper where
the recipe was published with code that says them).
--config FILE.toml (such as a run's config.toml) sets fields again, and flags come last."""
PAGE_PROMPTS = 6  # shown
MOST = 64  # prompts that the page judges


def align(words: Sequence[str]) -> None:
    run(*settings(list(words)))


def configure(words: list[str]) -> AlignConfig:
    """The settings without those of its memory."""
    return settings(words)[0]


def settings(words: list[str]) -> tuple[AlignConfig, Memory]:
    """Preset, then file, then flags."""
    name, path = arguments.take(words, "--preset"), arguments.take(words, "--config")
    scale = arguments.take(words, "--scale")
    file = arguments.from_file(path, AlignConfig, "align", Memory) if path else {}
    fits = memory.taken(file)
    model = arguments.peek(words, "--model") or file.get("model", AlignConfig.model)
    name = name or file.get("preset") or "flow-grpo"
    scale = scale or scale_for(name, model)
    if scale not in ("laptop", "paper"):
        raise InputError(f"scale '{scale}' is unknown; use laptop or paper")
    base = preset(name, "paper" if scale == "paper" else "laptop")
    return arguments.parse_with(dataclasses.replace(base, **file), fits, words, "align", NOTES)


def run(config: AlignConfig, fits: Memory = memory.DEFAULT) -> Run:
    """The whole verb; the finished run directory. Raises InputError before anything is written."""
    check(config)
    memory.check(fits, not config.full, "--full")
    from rich.console import Console

    from fieldsmith.diagnose.concepts import sampler
    from fieldsmith.methods.align import loop
    from fieldsmith.methods.align.setting import named_prompts
    from fieldsmith.rewards import checked
    from fieldsmith.rewards import load as load_reward
    from fieldsmith.worlds.model_cards import world_of

    console = Console(stderr=True)
    world = world_of(config.model)
    prompts = named_prompts(config.prompts) or _captions(world)
    config = dataclasses.replace(config, prompts=prompts)
    reward = checked(load_reward(config.reward, world))
    watched = {reward.name: reward}
    for name in config.held_out_rewards:
        watched[name] = checked(load_reward(name, world))
    if world:
        watched["valid"] = checked(load_reward("valid", world))
    directory = arguments.directory_of(config, "align", fits)
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    model = memory.loaded(fits, config.model, config.resolution)
    memory.prepare_training(fits, model)
    result = loop.align(model, config, reward, directory, optimizer=fits.optimizer)
    shipped = "adapter" if model.spec else "model"
    model.save(directory.folder / shipped)
    console.print(f"{result.steps} steps in {result.seconds:.0f} s; judging what changed")
    after = sampler(model, max(28, config.steps), config.guidance)

    def before(prompts: Sequence[str], seed: int) -> Tensor:
        with model.reference():
            return sampler(model, max(28, config.steps), config.guidance)(prompts, seed)

    metrics: dict[str, Any] = {
        "method": config.preset, "seconds": result.seconds, "forward_equivalents": result.forward_equivalents,
        "steps": result.steps, "stopped": result.stopped, "adapter": shipped,
    }  # fmt: skip
    metrics |= _page(model, config, directory, result, before, after, watched)
    directory.finish(metrics)
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def _captions(world: Any) -> tuple[str, ...]:
    """The world's own captions, where the model has one."""
    if world is None:
        return ()
    from fieldsmith.worlds.shapes import HELD_OUT, caption, concepts

    return tuple(caption(c) for c in concepts() if (c.colour, c.shape) != HELD_OUT)


def _others(model: Model, config: AlignConfig) -> list[str]:
    """Prompts that the run did not aim at: the world's open captions; elsewhere no prompt, or the run's own."""
    from fieldsmith.worlds.model_cards import world_of
    from fieldsmith.worlds.shapes import COLOURS, SHAPES, Concept, caption

    if world_of(config.model):
        open_ = [*(Concept(colour) for colour in COLOURS), *(Concept(shape=shape) for shape in SHAPES), Concept()]
        names = [caption(concept, synonyms) for concept in open_ for synonyms in (False, True)]
        names = [*dict.fromkeys(name for name in names if name not in config.prompts), ""]
    else:
        try:
            model.encode([""])
            names = [""]
        except InputError:  # a class-conditional model without a null class
            names = list(config.prompts)
    return [name for name in names for _ in range(max(4, config.evaluate))]


def _page(
    model: Model,
    config: AlignConfig,
    directory: Run,
    result: Result,
    before: Sampler,
    after: Sampler,
    watched: dict[str, Reward],
) -> dict[str, Any]:
    """Rewards at equal seeds, the rest, pictures, curves."""
    import torch

    from fieldsmith.metrics.distances import pixel_features
    from fieldsmith.metrics.rest import compare
    from fieldsmith.processes import once
    from fieldsmith.report.page import Caption, Page, Pair
    from fieldsmith.training import step_generator

    page = Page(f"{config.reward} raised on {config.model}", f"{config.preset or config.estimator}, seed {config.seed}")
    some = (
        [config.prompts[i * len(config.prompts) // MOST] for i in range(MOST)] if len(config.prompts) > MOST else None
    )
    asked = [prompt for prompt in some or config.prompts for _ in range(config.evaluate)]
    old, new = before(asked, config.seed + 7), after(asked, config.seed + 7)
    with torch.no_grad():
        scores = {
            name: (once(partial(_in_parts, judge, old, asked)), once(partial(_in_parts, judge, new, asked)))
            for name, judge in watched.items()
        }
    rows, found = _rewards(scores)
    first = next(iter(scores))
    change = found[first]["change"]
    hacked = [name for name in list(scores)[1:] if found[name]["change"]["high"] < 0]
    grew = change["low"] > 0
    words = f"{first} went from {found[first]['before']['value']:.3g} to {found[first]['after']['value']:.3g}"
    words += f" [{change['low']:+.3g}, {change['high']:+.3g}] at equal seeds, {len(asked)} images"
    words += f"; but {' and '.join(hacked)} fell: the reward is being hacked." if hacked else "."
    page.verdict(words if grew else f"No gain that {len(asked)} images can show: {words}", grew and not hacked)
    shown = list(dict.fromkeys(asked))
    pairs = []
    for prompt in [shown[i * len(shown) // PAGE_PROMPTS] for i in range(min(PAGE_PROMPTS, len(shown)))]:
        places = [i for i, word in enumerate(asked) if word == prompt][:8]
        marks = [[Caption(f"{side[i]:.2f}", None) for i in places] for side in scores[first]]
        pairs.append(Pair(prompt, old[places], new[places], *marks))
    page.before_after("Before and after, with the reward of each image", pairs)
    page.table(
        "Rewards", ["reward", "before", "after", "change at equal seeds"], rows,
        note="The first was trained on. The others were never seen: one that falls is a sign of reward hacking.",
    )  # fmt: skip
    others = _others(model, config)
    rest = compare(
        before(others, config.seed + 8), after(others, config.seed + 8), others, pixel_features(8),
        step_generator(config.seed, 0, stream=7),
    )  # fmt: skip
    headers, lines = rest.table()
    page.table("What else changed, on prompts that were not trained", headers, lines, note=rest.verdict)
    kl = _kl(model, config, result)
    page.table("How far it went", ["step", "t", "KL to the reference, nats", "strength h"], kl["rows"], note=kl["note"])
    _curves(page, directory, result)
    commands = arguments.repeat_and_load("align", config, directory, model.spec is not None)
    page.command("Repeat it, load it", commands)
    page.write(directory.folder / "report.html")
    return {"rewards": found, "rest": rest.to_json(), "kl": kl["total"], "hacked": hacked}


def _in_parts(judge: Reward, images: Tensor, asked: list[str], size: int = 256) -> Tensor:
    import torch

    parts = torch.arange(len(asked)).split(size)
    return torch.cat([judge(images[at], [asked[i] for i in at.tolist()]) for at in parts])


def _rewards(scores: dict[str, tuple[Tensor, Tensor]]) -> tuple[list[Any], dict[str, Any]]:
    from fieldsmith.metrics.intervals import mean_interval

    rows, found = [], {}
    for name, (old, new) in scores.items():
        sides = {"before": mean_interval(old), "after": mean_interval(new), "change": mean_interval(new - old)}
        rows.append((name, *(side.short() for side in sides.values())))
        found[name] = {k: {"value": v.value, "low": v.low, "high": v.high, "n": v.n} for k, v in sides.items()}
    return rows, found


def _kl(model: Model, config: AlignConfig, result: Result) -> dict[str, Any]:
    """KL of the policy's own stochastic steps to the reference's, step by step, and the recipe's strength there."""
    from fieldsmith.methods.align.measures import path_kl

    by_step, s = path_kl(model, config)
    h = result.h or ("-",) * len(s)
    rows = [(k + 1, f"{float(s.t[k]):.3f}", f"{by_step[k]:.4g}", h[k]) for k in range(len(s))]
    total = sum(by_step)
    note = f"{total:.4g} nats over the whole path, exact at every step, averaged over rollouts of the trained policy."
    return {"rows": rows, "total": total, "note": note}


def _curves(page: Page, directory: Run, result: Result) -> None:
    from fieldsmith.report.page import Panel

    history = directory.history()
    panels = []
    for title, key in (
        ("reward of the rollouts", "reward"),
        ("rows held by the trust region", "held"),
        ("KL to the reference, a step", "kl to reference"),
        ("loss", "loss"),
    ):
        rows = [row for row in history if key in row]
        if rows:
            panels.append(Panel(title, {key: ([row["step"] for row in rows], [row[key] for row in rows])}, "step"))
    calls = int(sum(row.get("reward calls", 0) for row in history))
    cost = f"{result.forward_equivalents:,} forward-equivalents (a forward of one state is 1, its backward 2)"
    page.curves(
        "The run", panels, note=f"{result.steps} steps, {result.seconds:.0f} s, {cost}, {calls:,} reward calls."
    )
