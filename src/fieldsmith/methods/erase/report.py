"""The page of an erasure and its numbers: verdict, groups before and after, attacks, side effects, the run's curves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from fieldsmith.measure.attacks import Budget
from fieldsmith.measure.detect import Detector
from fieldsmith.measure.detection import Erasure, erasure
from fieldsmith.measure.distances import pixel_features
from fieldsmith.measure.intervals import share
from fieldsmith.measure.side_effects import compare
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.measure import Concept, budget_of, kept_prompts
from fieldsmith.report.page import Caption, Page, Pair
from fieldsmith.report.run_curves import curves
from fieldsmith.training import step_generator
from fieldsmith.verb import Outcome

GROUPS = {
    "target": "What was asked for", "neighbours": "Near it", "unrelated": "Unrelated prompts",
    "others": "Prompts that the judge cannot read: look",
}  # fmt: skip
KEPT = ("neighbours", "unrelated", "others")
SEEN = 0.5  # of the target's images before, below which a judge's word after proves little
CURVES = {
    "distances": ("d_plus", "d_minus"),
    "progress": ("lambda", "active"),
    "drift on kept prompts": ("drift",),
    "loss": ("loss",),
}


def report(page: Page, outcome: Outcome) -> dict[str, Any]:
    """Judged exactly on a model whose world is known, by the user's judge elsewhere, else by side effects alone."""
    config: EraseConfig = outcome.config
    names = ", ".join(f"'{target}'" for target in config.targets[:4])
    more = f" and {len(config.targets) - 4} more" if len(config.targets) > 4 else ""
    page.title, page.subtitle = f"Erased {names}{more} from {config.model}", f"{config.method}, seed {config.seed}"
    metrics: dict[str, Any] = {"method": config.method}
    metrics |= _judged(page, outcome) if outcome.after.concepts else _unjudged(page, outcome)
    curves(page, outcome, CURVES)
    return metrics


def _judged(page: Page, outcome: Outcome) -> dict[str, Any]:
    config: EraseConfig = outcome.config
    metrics: dict[str, Any] = {"before": {}, "after": {}, "concepts": {}}
    targets = list(outcome.after.concepts)
    for place, target in enumerate(targets):
        old, new = outcome.before.concepts[target], outcome.after.concepts[target]
        e = erasure(old.groups, new.groups, target)
        _verdict(page, e, target, outcome.job.inputs.judged.detector)
        if place == 0:
            page.numbers(_cards(e), "At a glance")
            for side, one, label in (("before", old, " before"), ("after", new, "")):
                metrics[side] = _numbers(e, one, label)
        for group, title in GROUPS.items():
            if group in e.after:
                page.before_after(f"{title}: {target}" if len(targets) > 1 else title, _pairs(e, group, target))
        rows = [(name, interval.short(), interval.n) for name, interval in e.numbers.items()]
        rows.append(("paraphrases detected", new.paraphrases.short(), new.paraphrases.n))
        leak = old.anchor_leak
        rows.append(("anchor leak: the anchor's own images, before, that show it", leak.short(), leak.n))
        detector = outcome.job.inputs.judged.detector
        page.table(f"Judged: {target}", ["measure", "value [95% interval]", "n"], rows, _who(detector))
        if detector:
            metrics["judge"] = {"name": detector.name, "origin": detector.origin, "threshold": detector.threshold}
            metrics.setdefault("parts", {})[str(target)] = _parts(page, e, target, detector, config.evaluate)
        if new.attacks:
            budget = budget_of(config, outcome.job.inputs.judged)
            rows_ = _flat(new.attacks, old.attacks, budget.relearning)
            page.table(f"Bringing it back: {target}", ["attack", "share that shows it again"], rows_, _spent(budget))
            metrics["attack budget"] = asdict(budget)
            metrics.setdefault("attacks", {})[str(target)] = new.attacks
        metrics["concepts"][str(target)] = {
            **e.to_json(), "paraphrases detected": new.paraphrases.value, "anchor leak": leak.value
        }  # fmt: skip
        kept = [name for name in KEPT if name in e.after]
        if kept:
            asked = [str(c) for name in kept for c in e.after[name].asked]
            before, after = (torch.cat([side[name].images for name in kept]) for side in (e.before, e.after))
            metrics["rest"] = _side_effects(page, f"Side effects: {target}", before, after, asked, config.seed)
    return metrics


def _who(detector: Detector | None) -> str:
    """What the judge is, and what its word is worth, where it is no exact one."""
    if detector is None:
        return ""
    return (
        f"Judge: {detector.origin}; counts from {detector.threshold:g} on. It errs: how often, results/judges says of "
        "some, and here the row of the anchor's images. Invalid images are blank ones."
    )


def _parts(page: Page, e: Erasure, target: Any, detector: Detector, n: int) -> dict[str, Any]:
    """The target's share by prompt and by seed, and which of a closed judge's classes its images show."""
    shown = [side["target"].seen.shows(target).view(-1, n) for side in (e.before, e.after)]
    prompts = list(dict.fromkeys(map(str, e.after["target"].asked)))
    parts: dict[str, dict[str, tuple[Any, ...]]] = {
        "prompt": {name: tuple(side[row] for side in shown) for row, name in enumerate(prompts)},
        "seed": {f"image {k + 1} of each prompt": tuple(side[:, k] for side in shown) for k in range(n)},
    }
    if detector.at_once and detector.names:
        scores = {
            name: tuple(side["target"].seen.shows(name) for side in (e.before, e.after)) for name in detector.names
        }
        parts["class that the judge saw"] = {
            name: pair for name, pair in scores.items() if pair[0].any() | pair[1].any()
        }
    found = {}
    for part, rows in parts.items():
        shares = {name: (share(before), share(after)) for name, (before, after) in rows.items()}
        lines = [(name, before.short(), after.short(), after.n) for name, (before, after) in shares.items()]
        page.table(f"{target} by {part}", [part, "before", "after", "n"], lines)
        found[part] = {name: {"before": old.to_json(), "after": new.to_json()} for name, (old, new) in shares.items()}
    return found


def _verdict(page: Page, e: Erasure, target: Any, detector: Detector | None) -> None:
    n = e.numbers
    lost = n.get("unrelated drop points")  # nothing is unrelated to 'a colored shape'
    gone = n["target detected"].value < 0.05 and n["target invalid"].value <= 0.05
    well = (lost is None or lost.value <= 2) and n["invalid rise points"].value <= 2
    sentence = (
        f"'{target}' shows in {n['target detected'].short()} of images that ask for it "
        f"(before: {n['target detected before'].short()}); unrelated prompts: "
        f"{lost.short() if lost else 'none'} lost, invalid images: {n['invalid rise points'].short()} more."
    )
    good = (gone and well) if gone == well else None
    if detector and n["target detected before"].value < SEEN:
        sentence += (
            " The judge saw little of it before, so this proves little: look at the pairs, or ask another judge."
        )
        good = None
    page.verdict(sentence, good)


def _numbers(e: Erasure, one: Concept, label: str) -> dict[str, Any]:
    """The first target's shares, as metrics.json has them for one side."""
    names = [name for name in e.numbers if name.endswith(" before")]
    rows = {name.removesuffix(" before"): e.numbers[name.removesuffix(" before") + label] for name in names}
    rows |= {"paraphrases detected": one.paraphrases, "anchor leak": one.anchor_leak}
    return {name: row.to_json() for name, row in rows.items()}


def _unjudged(page: Page, outcome: Outcome) -> dict[str, Any]:
    """A model whose images nobody here can judge: pictures at equal seeds and side effects on kept prompts."""
    before, after = outcome.before, outcome.after
    rows = [Pair(prompt, before.shown[prompt], after.shown[prompt]) for prompt in before.shown]
    words = "No judge knows this model's images: look at the pairs, drawn at equal seeds, or name one with --judge."
    page.verdict(words, None, "Look")
    page.before_after("Before and after", rows)
    prompts = kept_prompts(outcome.config)
    title = "Side effects, on kept prompts"
    return {"rest": _side_effects(page, title, before.kept, after.kept, prompts, outcome.config.seed)}


def _side_effects(page: Page, title: str, old: Any, new: Any, asked: list[str], seed: int) -> dict[str, Any]:
    effects = compare(old, new, asked, pixel_features(8), step_generator(seed, 0, stream=7))
    headers, lines = effects.table()
    page.table(title, headers, lines, note=effects.verdict)
    return effects.to_json()


def _spent(budget: Budget) -> str:
    """The attacks' budget, in words."""
    return (
        f"A learned word has {budget.token} updates of {budget.rows} states on {budget.examples} images of it, "
        f"a free prompt {budget.embedding}, relearning {budget.relearning} on {budget.relearned}; counted by the judge "
        "above."
    )


def _flat(attacked: dict[str, Any], before: dict[str, Any], most: int) -> list[tuple[str, str]]:
    """Attacks as rows; shares with an interval, steps as they are, one row a sampler or scale."""

    def words(result: dict[str, float]) -> str:
        return f"{100 * result['value']:.1f}% [{100 * result['low']:.1f}, {100 * result['high']:.1f}]"

    rows = []
    for name, result in attacked.items():
        if isinstance(result, int):
            rows.append((name, f"{result} until half of the images show it again ({most}: never)"))
        elif "low" in result:
            rows.append((name, words(result) + (f" (before: {words(before[name])})" if name in before else "")))
        else:
            rows += [(f"{name}: {key}", f"{100 * value:.1f}%") for key, value in result.items()]
    return rows


def _cards(e: Erasure) -> list[tuple[str, str, str]]:
    names = ("target detected", "unrelated right", "neighbours right", "target invalid")
    return [
        (name, f"{100 * e.numbers[name].value:.1f}%", f"before: {e.numbers[f'{name} before'].short()}")
        for name in names
        if name in e.numbers
    ]


def _pairs(e: Erasure, group: str, target: Any, most: int = 6, columns: int = 8) -> list[Pair]:
    rows = []
    old, new = e.before[group], e.after[group]
    prompts = list(dict.fromkeys(old.asked))
    for concept in prompts[:: max(1, len(prompts) // most)][:most]:
        places = [i for i, asked in enumerate(old.asked) if asked == concept][:columns]
        marks = []
        for side in (old, new):
            if group == "others":  # a judge that cannot name what they ask for
                marks.append([Caption("") for _ in places])
                continue
            # after an erasure a target prompt is right where the target is gone and something is still there
            erased = group == "target" and side is new
            good = side.seen.valid & ~side.seen.shows(target) if erased else side.right()
            names = side.seen.names()
            marks.append([Caption(names[i], bool(good[i])) for i in places])
        rows.append(Pair(str(concept), old.images[places], new.images[places], *marks))
    return rows
