"""What `fieldsmith diagnose` shows: the page made of the numbers of metrics.json alone.

In: the config and the metrics. Out: a Page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fieldsmith.diagnose.guidance import MATTERS
from fieldsmith.report.page import Page, Panel

FINE = 24  # points on the curve of G(w) between w = 0 and 6
GAP = {"share": "share of gap", "rho": "rho", "cosine": "cosine", "weighted_cosine": "weighted",
       "relative_gap_error": "gap error", "gain": "gain", "residual": "orthogonal", "recalibration": "a*"}  # fmt: skip
BRANCHES = {"e_c": "E_c", "e_u": "E_u", "common": "common", "difference": "difference", "correlation": "correlation"}
TOLD = (2, 4)  # scales at which a table gives G(w)
HOW = (
    "Guidance moves a sample along the gap between a network's conditional and unconditional branch. rho is the size "
    "of the student's gap over the teacher's, cosine their direction (mean over states; 'weighted' counts large gaps "
    "more). Healthy: rho from 0.85 to 1.15 and cosine at least 0.8 wherever more than 5% of the teacher's squared gap "
    "is (rows set off). Collapse: rho below 0.3. Blow-up: rho above 1.5. Distorted: in between.",
    "A gap can match while both branches are off by the same amount, which every sample then carries. E_c and E_u are "
    "the branches' squared errors, 'common' that of their mean, 'difference' that of the gap; 'gap error' is the same "
    "over the teacher's squared gap: (1 - gain)^2 + orthogonal. Drift: healthy gaps, but E_c + E_u above twice a "
    "reference.",
    "G(w) is the squared error of the guided prediction at scale w: E_u at 0, E_c at 1. a*(t) is the factor on the "
    "scale that makes up best for a gap of the wrong size: guide with w a*(t), free of charge; it cannot turn a gap. "
    "All errors are per pixel, in the form in which the networks predict.",
    "The teacher's guided path is where sampling takes place; noised data is where training looked.",
)


def page_of(config: dict[str, Any], metrics: dict[str, Any], folder: str) -> Page:
    """The report."""
    page = Page(
        f"Guidance of {config['model']}",
        f"against its teacher {config['teacher']}, at {config['tuples']} states of each kind, seed {config['seed']}",
    )
    good = {"healthy": True, "distorted": None}.get(metrics["verdict"], False)
    page.verdict(" ".join((metrics["words"], _where(metrics))), good, metrics["verdict"].capitalize())
    page.numbers(_cards(config, metrics))
    for kind, found in metrics["states"].items():
        _kind(page, kind, found)
    page.text("How to read it", HOW)
    page.command("Repeat it", f"fieldsmith diagnose --config {folder}/config.toml --out ANOTHER-FOLDER")
    return page


def _where(metrics: dict[str, Any]) -> str:
    """On which states the verdict was reached, and what the others say."""
    others = [f"on {kind}: {found['verdict']}" for kind, found in metrics["states"].items() if kind != metrics["where"]]
    seen = "; ".join((f"Seen on {metrics['where']}", *others))
    return f"({seen}.)"


def _cards(config: dict[str, Any], metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    cards = [
        (f"rho on {kind}", _short(found["worst_rho"]), f"the worst of bins that matter: {found['verdict']}")
        for kind, found in metrics["states"].items()
    ]
    if config["samples"]:
        what = "how far scale 3 moves the images away from scale 1, over the teacher's; 0 is a dead knob, 1 faithful"
        cards.append(("liveness", _short(metrics["liveness"]), what))
    cost = f"{metrics['forward_equivalents']:,}"
    return [*cards, ("cost", cost, f"forward-equivalents, {metrics['seconds']:.0f} s")]


def _short(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2f}"


def _kind(page: Page, kind: str, found: dict[str, Any]) -> None:
    """The sections of one kind of states."""
    title, rows = kind[0].upper() + kind[1:], [*found["bins"], found["pooled"]]
    bins = found["bins"]
    when = [*(f"{b['t_low']:.2g} to {b['t_high']:.2g}".replace(" ", "\u00a0") for b in bins), "all"]
    highlight = [i for i, b in enumerate(bins) if b["share"] > MATTERS]
    page.table(
        title,
        ["t", "states", *GAP.values()],
        [[t, b["n"], *_cells(b, GAP)] for t, b in zip(when, rows, strict=True)],
        f"Verdict on these states: {found['verdict']}. Rows set off hold more than 5% of the teacher's squared gap.",
        highlight,
    )
    page.table(
        f"{title}: errors per pixel",
        ["t", *BRANCHES.values(), *(f"G({w})" for w in TOLD)],
        [[t, *_cells(b, BRANCHES), *(f"{_guided(b, w):.3g}" for w in TOLD)] for t, b in zip(when, rows, strict=True)],
        highlight=highlight,
    )
    at = [(b["t_low"] + b["t_high"]) / 2 for b in bins]
    panels = [
        Panel("Size and direction of the gap", _series(at, bins, {"rho": "rho", "cosine": "cosine"}), "t"),
        Panel("Error of each branch", _series(at, bins, {"E_c": "e_c", "E_u": "e_u"}), "t", "per pixel"),
        Panel("Guided error", {"G(w)": _parabola(found["pooled"])}, "scale w", "per pixel"),
        Panel("Free recalibration", _series(at, bins, {"a*(t)": "recalibration"}), "t", "factor on the scale"),
    ]
    page.curves(f"{title}: curves", panels)


def _cells(b: dict[str, Any], names: dict[str, str]) -> list[str]:
    return [f"{100 * b[name]:.0f}%" if name == "share" else _cell(b[name]) for name in names]


def _cell(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3g}"


def _series(
    at: Sequence[float], bins: Sequence[dict[str, Any]], names: dict[str, str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Curves over the middles of bins, without those where a number is infinite."""
    curves = {}
    for label, name in names.items():
        points = [(t, b[name]) for t, b in zip(at, bins, strict=True) if b[name] is not None]
        curves[label] = ([t for t, _ in points], [value for _, value in points])
    return curves


def _parabola(pooled: dict[str, Any]) -> tuple[list[float], list[float]]:
    """G(w) for w from 0 to 6."""
    scales = [6 * i / FINE for i in range(FINE + 1)]
    return scales, [_guided(pooled, w) for w in scales]


def _guided(b: dict[str, Any], w: float) -> float:
    """G(w) from its three moments."""
    return b["e_u"] + 2 * w * b["cross"] + w**2 * b["gap_mse"]
