"""The page of an alignment and its numbers: rewards at equal seeds, side effects, KL by step, the run's curves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fieldsmith.measure.distances import pixel_features
from fieldsmith.measure.intervals import Interval, mean_interval, share
from fieldsmith.measure.side_effects import compare
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.measure import Measured, asked, other_prompts
from fieldsmith.methods.align.pairs import Pairs
from fieldsmith.report.page import Caption, Page, Pair
from fieldsmith.report.run_curves import curves
from fieldsmith.training import step_generator
from fieldsmith.verb import Outcome

SHOWN = 6  # prompts with pictures
CURVES = {
    "reward of the rollouts": ("reward",),
    "share of transitions outside the trust region": ("clip_fraction",),
    "KL to the reference, a step": ("kl to reference",),
    "share of pairs ranked as people did": ("preference accuracy",),
    "log gain of the images of pairs": ("log gain of the chosen", "log gain of the rejected"),
    "loss": ("loss",),
}


def report(page: Page, outcome: Outcome) -> dict[str, Any]:
    """Fill the page; rewards, side effects and KL for metrics.json."""
    config: AlignConfig = outcome.config
    before: Measured = outcome.before
    after: Measured = outcome.after
    page.subtitle = f"{config.preset or config.estimator}, seed {config.seed}"
    missing = {**before.missing, **after.missing}
    rows = {name: _sides(before.rewards[name], one) for name, one in after.rewards.items() if name not in missing}
    aimed = config.reward and next(iter(outcome.job.inputs.rewards))
    trained = aimed if aimed in rows else ""
    hacked = [name for name in rows if name != trained and rows[name]["change"].high < 0]
    preferences = {}
    if after.margins is None:
        page.title = f"{config.reward} raised on {config.model}"
        if trained:
            _verdict(page, trained, rows[trained], hacked, len(after.images))
        else:
            page.verdict(
                f"Trained, but what became of its reward is not measured: {missing[aimed]}", None, "Incomplete"
            )
    else:
        page.title = f"Preferences of {config.pairs} on {config.model}"
        preferences = {"preferences": _preferred(page, after.margins, outcome.job.context.pairs, hacked)}
    shown = f"Before and after{', with the reward of each image' if trained else ''}"
    page.before_after(shown, _pairs(config, before, after, trained))
    if missing:
        again = f"`fieldsmith measure {outcome.run.folder}` completes it." if outcome.run else "measure() completes it."
        page.text("Not measured", [*(f"{name}: {why}" for name, why in missing.items()), again])
    if rows:
        first = "The first was trained on. The others were never seen" if trained else "None was trained on"
        page.table(
            "Rewards", ["reward", "before", "after", "change at equal seeds"],
            [(name, *(side.short() for side in sides.values())) for name, sides in rows.items()],
            note=f"{first}: one that falls is a sign of reward hacking.",
        )  # fmt: skip
    generator = step_generator(config.seed, 0, stream=7)
    effects = compare(before.others, after.others, other_prompts(outcome.job), pixel_features(8), generator)
    headers, lines = effects.table()
    page.table("Side effects, on prompts that were not trained", headers, lines, note=effects.verdict)
    total = _kl(page, outcome)
    curves(page, outcome, CURVES)
    rewards = {name: {side: _plain(interval) for side, interval in sides.items()} for name, sides in rows.items()}
    sides = {side: {name: row[side] for name, row in rewards.items()} for side in ("before", "after")}
    return {
        "method": config.preset, **sides, **preferences, "rewards": rewards, "rest": effects.to_json(), "kl": total,
        "hacked": hacked, **({"missing": "; ".join(missing.values())} if missing else {}),
    }  # fmt: skip


def _sides(old: Any, new: Any) -> dict[str, Interval]:
    return {"before": mean_interval(old), "after": mean_interval(new), "change": mean_interval(new - old)}


def _plain(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}


def _verdict(page: Page, name: str, sides: dict[str, Interval], hacked: list[str], n: int) -> None:
    change = sides["change"]
    words = f"{name} went from {sides['before'].value:.3g} to {sides['after'].value:.3g}"
    words += f" [{change.low:+.3g}, {change.high:+.3g}] at equal seeds, {n} images"
    words += f"; but {' and '.join(hacked)} fell: the reward is being hacked." if hacked else "."
    grew = change.low > 0
    page.verdict(words if grew else f"No gain that {n} images can show: {words}", grew and not hacked)


def _preferred(page: Page, margins: Tensor, pairs: Pairs, hacked: list[str]) -> dict[str, Any]:
    """The verdict on a run that learned from pairs: how many of those that were held out it ranks as people did."""
    ranked, margin = share(margins > 0), mean_interval(margins)
    held_out = bool(pairs.held_out.any())
    which = f"{len(margins)} held-out pairs" if held_out else f"its own {len(margins)} pairs (none was held out)"
    words = f"The trained model ranks {ranked.short()} of {which} as people did"
    fell = f"; but {' and '.join(hacked)} fell" if hacked else ""
    learned = ranked.low > 0.5
    page.verdict(
        f"{words}{fell}." if learned else f"Half are ranked right by chance: {words}{fell}.", learned and not hacked
    )
    page.table(
        "Preferences", ["", "the trained model"],
        [("pairs ranked as people did", ranked.short()), ("margin, nats", margin.short())],
        note=f"On {which}: how much more than the reference it favours the chosen image, so that the reference has 0.",
    )  # fmt: skip
    return {"accuracy": _plain(ranked), "margin": _plain(margin), "held out": held_out}


def _pairs(config: AlignConfig, before: Measured, after: Measured, reward: str) -> list[Pair]:
    """Pictures of a few prompts, each with its reward where one was trained on."""
    prompts = asked(config)
    names = list(dict.fromkeys(prompts))
    few = min(SHOWN, len(names))
    pairs = []
    for name in [names[i * len(names) // few] for i in range(few)]:
        places = [i for i, prompt in enumerate(prompts) if prompt == name][:8]
        marks = [
            [Caption(f"{side.rewards[reward][i]:.2f}" if reward else "", None) for i in places]
            for side in (before, after)
        ]
        pairs.append(Pair(name, before.images[places], after.images[places], *marks))
    return pairs


def _kl(page: Page, outcome: Outcome) -> float:
    """KL of the policy's own stochastic steps to the reference's, and the recipe's strength there; the total."""
    by_step, s = outcome.after.kl
    h = outcome.job.context.effective_strength or ("-",) * len(s)
    rows = [(k + 1, f"{float(s.t[k]):.3f}", f"{by_step[k]:.4g}", h[k]) for k in range(len(s))]
    total = sum(by_step)
    note = f"{total:.4g} nats over the whole path, exact at every step, averaged over rollouts of the trained policy."
    page.table("How far it went", ["step", "t", "KL to the reference, nats", "strength h"], rows, note=note)
    return total
