"""What `fieldsmith sharpen` shows: samples before and after at equal noise, with the judge's reasons.

In: the config, the metrics, images with their verdicts. Out: a Page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.report.page import Caption, Page, Pair, Panel
from fieldsmith.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from fieldsmith.worlds.judged import Verdicts

SHOWN = 16
WHAT = {
    "guide": "the model itself is as it was; each step moves away from what a small, briefly trained network says",
    "plain": "more training of the same kind, the control",
    "variance-learning": "the reverse variance is learned beside the score",
    "variance-penalty": "VSM: the reverse variance is learned and made small; only shared layers touch the score",
    "jacobian-floor": "the score's normalised Jacobian is raised, which is not the data's own score",
    "jacobian-match": "second-order denoising score matching: the Jacobian is matched to the errors' covariance",
    "covariance": "the reverse variance is matched to the score's own curvature",
    "neighbours": "targets are posterior means over a batch of data",
}


def page_of(
    config: SharpenConfig,
    metrics: dict[str, Any],
    before: tuple[Tensor, Verdicts],
    after: tuple[Tensor, Verdicts],
    directory: Run,
) -> Page:
    """The report."""
    was, now = metrics["before"]["hallucinated"], metrics["after"]["hallucinated"]
    page = Page(f"{config.model}: {config.method}", f"{WHAT[config.method]}; seed {config.seed}")
    apart = now["high"] < was["low"] or now["low"] > was["high"]
    fewer = now["value"] < was["value"]
    word = ("Fewer" if fewer else "More") if apart else "No clear change"
    page.verdict(
        f"{100 * now['value']:.1f}% [{100 * now['low']:.1f}, {100 * now['high']:.1f}] of {now['n']} samples are "
        f"hallucinated, before it was {100 * was['value']:.1f}% [{100 * was['low']:.1f}, {100 * was['high']:.1f}].",
        fewer if apart else None,
        word,
    )
    cards = [("hallucinated", f"{100 * now['value']:.1f}%", f"of {now['n']} images; before {100 * was['value']:.1f}%")]
    if now["value"] and was["value"]:
        change = 100 * (now["value"] / was["value"] - 1)
        cards.append(("change", f"{change:+.0f}%", "of the rate, at equal noise"))
    if "different" in metrics["after"]:
        one = metrics["after"]
        cards.append(("different", f"{one['different']}", f"contents in {one['valid']} valid images"))
    cards.append(("cost", f"{metrics['forward_equivalents']:,}", "forwards of the trained network"))
    page.numbers(cards)
    for warning in metrics["warnings"]:
        page.text("", warning)
    page.before_after("From equal noise", [Pair(metrics["world"], before[0][:SHOWN], after[0][:SHOWN],
                                                _captions(before[1]), _captions(after[1]))])  # fmt: skip
    _reasons(page, metrics)
    _rest(page, metrics)
    history = directory.history()
    names = ("loss", "eps error", "L_vb", "term", "gradient share")
    panels = [
        Panel(name, {name: ([row["step"] for row in rows], [row[name] for row in rows])})
        for name in names
        if (rows := [row for row in history if name in row])
    ]
    page.curves("Training", panels)
    page.command("Repeat it, use it", _commands(config, directory))
    return page


def _captions(judged: Verdicts) -> list[Caption]:
    return [
        Caption("valid" if good else words[0] if words else "invalid", bool(good))
        for good, words in zip(judged.valid.tolist()[:SHOWN], judged.reasons[:SHOWN], strict=True)
    ]


def _reasons(page: Page, metrics: dict[str, Any]) -> None:
    before, after = metrics["before"], metrics["after"]
    names = sorted({*before["reasons"], *after["reasons"]}, key=lambda name: -before["reasons"].get(name, 0))
    rows = [(name, before["reasons"].get(name, 0), after["reasons"].get(name, 0)) for name in names]
    if rows:
        note = f"Of {after['images']} images each, the commonest reasons; an image may have several."
        page.table("Why the judge refused", ("reason", "before", "after"), rows, note=note)


def _rest(page: Page, metrics: dict[str, Any]) -> None:
    rest = metrics["rest"]
    keys = list(rest["before"])
    rows = [(key, f"{rest['before'][key]:.4g}", f"{rest['after'][key]:.4g}") for key in keys]
    note = f"Distances on {rest['extractor']} to {rest['real']} held-out images; biased upward for both by few images."
    page.table("What else changed", ("measure", "before", "after"), rows, note=note)


def _commands(config: SharpenConfig, directory: Run) -> list[str]:
    lines = arguments.repeat_and_load("sharpen", config, directory, adapter=False)
    if config.method == "guide":
        lines.append(
            f"fieldsmith sample --model {config.model} --worse {directory.folder / 'guide'} "
            f"--guidance {config.guidance:g} --prompts '' --out sample.png"
        )
    else:
        model = directory.folder / "model"
        lines.append(f"fieldsmith sample --model {model} --variance small --prompts '' --out sample.png")
    return lines
