"""`fieldsmith erase`: train, save, judge what changed, write the page.

In: the words after the verb. Out: a run directory with adapter/ (or model/), metrics.json and report.html.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments, memory
from fieldsmith.commands.memory import Memory
from fieldsmith.methods.erase.config import EraseConfig, check, preset

if TYPE_CHECKING:
    from fieldsmith.measure.detection import Erasure
    from fieldsmith.measure.drawing import Sampler
    from fieldsmith.models.core import Model
    from fieldsmith.report.page import Page
    from fieldsmith.runs import Run

GROUPS = {"target": "What was asked for", "neighbours": "Near it", "unrelated": "The rest"}
NOTES = """Also: --preset tiny|demo|paper|paper-gore|paper-sd3 (default: tiny for zoo models, else paper) sets the
fields below, --config FILE.toml (such as a run's config.toml) sets them again, and flags come last."""


def erase(words: Sequence[str]) -> None:
    run(*settings(list(words)))


def configure(words: list[str]) -> EraseConfig:
    """The settings without those of its memory."""
    return settings(words)[0]


def settings(words: list[str]) -> tuple[EraseConfig, Memory]:
    """Preset, then file, then flags."""
    name, path = arguments.take(words, "--preset"), arguments.take(words, "--config")
    file = arguments.from_file(path, EraseConfig, "erase", Memory) if path else {}
    fits = memory.taken(file)
    model = arguments.peek(words, "--model") or file.get("model", EraseConfig.model)
    method = arguments.peek(words, "--method") or file.get("method", EraseConfig.method)
    base = preset(name or ("tiny" if model.startswith("zoo:") else "paper"), method)
    return arguments.parse_with(dataclasses.replace(base, **file), fits, words, "erase", NOTES)


def run(config: EraseConfig, fits: Memory = memory.DEFAULT) -> Run:
    """The whole verb; the finished run directory. Raises InputError before anything is written."""
    check(config)
    memory.check(fits, not config.full, "--full")
    directory = arguments.directory_of(config, "erase", fits)
    from rich.console import Console

    from fieldsmith.methods.erase import loop

    console = Console(stderr=True)
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    model = memory.loaded(fits, config.model, config.resolution)
    with memory.trained(fits, model):
        result = loop.erase(model, config, directory)
    shipped = _ship(model, config, directory)
    console.print(f"{result.steps} steps in {result.seconds:.0f} s; judging what changed")

    from fieldsmith.measure.drawing import sampler

    changed: Any = loop.Projected(model, config) if config.method == "projection" else model
    steps = max(28, config.steps)  # every method is judged with the same sampler
    after = sampler(changed, steps, config.rollout_guidance)

    def before(prompts: Sequence[str], seed: int) -> Any:
        with model.reference():
            return sampler(model, steps, config.rollout_guidance)(prompts, seed)

    metrics: dict[str, Any] = {
        "method": config.method,
        "seconds": result.seconds,
        "forward_equivalents": result.forward_equivalents,
        "steps": result.steps,
        "stopped": result.stopped,
        "adapter": shipped,
    }
    metrics |= _page(model, config, directory, metrics, before, after)
    directory.finish(metrics)
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def _ship(model: Model, config: EraseConfig, directory: Run) -> str:
    """Save what the user ships; its folder's name."""
    if config.method == "projection":
        return "none: the projection acts while sampling"
    folder = "adapter" if model.spec else "model"
    model.save(directory.folder / folder)
    return folder


def _page(
    model: Model, config: EraseConfig, directory: Run, metrics: dict[str, Any], before: Sampler, after: Sampler
) -> dict[str, Any]:
    """Judge and show: exactly on a model whose world is known, by the rest alone elsewhere."""
    from fieldsmith.report.page import Page
    from fieldsmith.worlds.model_cards import world_of

    names = ", ".join(f"'{target}'" for target in config.targets[:4])
    more = f" and {len(config.targets) - 4} more" if len(config.targets) > 4 else ""
    page = Page(f"Erased {names}{more} from {config.model}", f"{config.method}, seed {config.seed}")
    world = world_of(config.model)
    found = _judged(page, model, config, world, before, after) if world else _unjudged(page, config, before, after)
    _training_section(page, directory, metrics)
    commands = arguments.repeat_and_load("erase", config, directory, metrics["adapter"] == "adapter")
    page.command("Repeat it, load it", commands)
    page.write(directory.folder / "report.html")
    return found


def _judged(
    page: Page, model: Model, config: EraseConfig, world: Any, before: Sampler, after: Sampler
) -> dict[str, Any]:
    from fieldsmith.measure.attacks import battery
    from fieldsmith.measure.detection import detected, erasure
    from fieldsmith.measure.distances import pixel_features
    from fieldsmith.measure.side_effects import compare
    from fieldsmith.training import step_generator
    from fieldsmith.worlds.shapes_groups import erased_concepts, groups, paraphrases

    found: dict[str, Any] = {"concepts": {}}
    targets = erased_concepts(config.targets)
    for place, target in enumerate(targets):
        judged_on = groups(target, targets)
        e = erasure(before, after, world, target, judged_on, config.evaluate, config.seed)
        words = detected(after, world, target, paraphrases(target), config.evaluate, config.seed + 9)
        n = e.numbers
        lost = n.get("unrelated drop points")  # nothing is unrelated to 'a colored shape'
        gone = n["target detected"].value < 0.05 and n["target invalid"].value <= 0.05
        well = (lost is None or lost.value <= 2) and n["invalid rise points"].value <= 2
        sentence = (
            f"'{target}' shows in {n['target detected'].short()} of images that ask for it "
            f"(before: {n['target detected before'].short()}); unrelated prompts: "
            f"{lost.short() if lost else 'none'} lost, invalid images: {n['invalid rise points'].short()} more."
        )
        page.verdict(sentence, (gone and well) if gone == well else None)
        if place == 0:
            page.numbers(_cards(e), "At a glance")
        for group, title in GROUPS.items():
            if group not in e.after:
                continue
            page.before_after(f"{title}: {target}" if len(targets) > 1 else title, _pairs(e, group, target))
        rows = [(name, interval.short(), interval.n) for name, interval in n.items()]
        rows.append(("paraphrases detected", words.short(), words.n))
        leak = detected(before, world, target, list(config.anchors), 2 * config.evaluate, config.seed + 8)
        rows.append(("anchor leak: the anchor's own images, before, that show it", leak.short(), leak.n))
        page.table(f"Judged: {target}", ["measure", "value [95% interval]", "n"], rows)
        if config.attacks and model.family == "flux" and config.method != "projection":
            attacked = battery(model, world, target, judged_on["target"], config.seed)
            page.table(f"Bringing it back: {target}", ["attack", "share that shows it again"], _flat(attacked))
            found.setdefault("attacks", {})[str(target)] = attacked
        found["concepts"][str(target)] = {**e.to_json(), "paraphrases detected": words.value, "anchor leak": leak.value}
        kept = [name for name in ("neighbours", "unrelated") if name in e.after]
        if not kept:
            continue
        asked = [str(c) for name in kept for c in e.after[name].asked]
        old, new = (_cat([side[name].images for name in kept]) for side in (e.before, e.after))
        rest = compare(old, new, asked, pixel_features(8), step_generator(config.seed, 0, stream=7))
        headers, lines = rest.table()
        page.table(f"What else changed: {target}", headers, lines, note=rest.verdict)
        found["rest"] = rest.to_json()
    return found


def _unjudged(page: Page, config: EraseConfig, before: Sampler, after: Sampler) -> dict[str, Any]:
    """A model whose images nobody here can judge: pictures at equal seeds and the rest on kept prompts."""
    from fieldsmith.measure.distances import pixel_features
    from fieldsmith.measure.side_effects import compare
    from fieldsmith.report.page import Pair
    from fieldsmith.training import step_generator

    shown = list(dict.fromkeys((*config.targets[:4], *config.keep[:8])))
    rows = []
    for prompt in shown:
        old, new = (draw([prompt] * 4, config.seed) for draw in (before, after))
        rows.append(Pair(prompt, old, new))
    page.verdict("No judge knows this model's images: look at the pairs, drawn at equal seeds.", None, "Look")
    page.before_after("Before and after", rows)
    kept = [prompt for prompt in (config.keep or ("",)) for _ in range(max(4, config.evaluate // 2))]
    rest = compare(
        before(kept, config.seed),
        after(kept, config.seed),
        kept,
        pixel_features(8),
        step_generator(config.seed, 0, stream=7),
    )
    headers, lines = rest.table()
    page.table("What else changed, on kept prompts", headers, lines, note=rest.verdict)
    return {"rest": rest.to_json()}


def _flat(attacked: dict[str, Any]) -> list[tuple[str, str]]:
    """Attacks as rows; shares with an interval, steps as they are, one row a sampler or scale."""
    rows = []
    for name, found in attacked.items():
        if isinstance(found, int):
            rows.append((name, f"{found} until half of the images show it again (40: never)"))
        elif "low" in found:
            rows.append((name, f"{100 * found['value']:.1f}% [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"))
        else:
            rows += [(f"{name}: {key}", f"{100 * value:.1f}%") for key, value in found.items()]
    return rows


def _cards(e: Erasure) -> list[tuple[Any, Any, Any]]:
    cards: list[tuple[Any, Any, Any]] = []
    for name in ("target detected", "unrelated right", "neighbours right", "target invalid"):
        if name in e.numbers:
            before = f"before: {e.numbers[f'{name} before'].short()}"
            cards.append((name, f"{100 * e.numbers[name].value:.1f}%", before))
    return cards


def _pairs(e: Erasure, group: str, target: Any, most: int = 6, columns: int = 8) -> list[Any]:
    from fieldsmith.report.page import Caption, Pair
    from fieldsmith.worlds.shapes import caption

    rows = []
    old, new = e.before[group], e.after[group]
    prompts = list(dict.fromkeys(old.asked))
    for concept in prompts[:: max(1, len(prompts) // most)][:most]:
        places = [i for i, asked in enumerate(old.asked) if asked == concept][:columns]
        marks = []
        for side in (old, new):
            names, right, shows = side.seen.names(), side.right(), side.seen.shows(target)
            # after an erasure a target prompt is right where the target is gone and something is still there
            gone = side.seen.valid & ~shows
            good = gone if group == "target" and side is new else right
            marks.append([Caption(names[i], bool(good[i])) for i in places])
        rows.append(Pair(caption(concept), old.images[places], new.images[places], *marks))
    return rows


def _training_section(page: Page, directory: Run, metrics: dict[str, Any]) -> None:
    from fieldsmith.report.page import Panel

    history = directory.history()
    panels = []
    for title, keys in (
        ("distances", ("d_plus", "d_minus")),
        ("progress", ("lambda", "active")),
        ("drift on kept prompts", ("drift",)),
        ("loss", ("loss",)),
    ):
        series = {}
        for key in keys:
            rows = [row for row in history if key in row]
            if rows:
                series[key] = ([row["step"] for row in rows], [row[key] for row in rows])
        if series:
            panels.append(Panel(title, series, "step"))
    if panels:
        cost = f"{metrics['forward_equivalents']:,} forward-equivalents (a forward of one state is 1, its backward 2)"
        page.curves("The run", panels, note=f"{metrics['steps']} steps, {metrics['seconds']:.0f} s, {cost}.")


def _cat(parts: list[Any]) -> Any:
    import torch

    return torch.cat(parts)
