"""Diagnosis 'guidance': what a student kept of its teacher's classifier-free guidance, and the page that shows it.

In: student, teacher, prompts, and data where the models know classes. Out: fidelity on noised data and on the teacher's
guided path, how far the scale moves the student's images, the worst verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fieldsmith.diagnoses import Diagnosis
from fieldsmith.diagnoses.config import GuidanceConfig
from fieldsmith.errors import InputError
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.guidance import (
    MATTERS,
    VERDICTS,
    Fidelity,
    Guidance,
    GuidedSampler,
    Tuples,
    ask,
    liveness,
    measure,
    noised_tuples,
    path_tuples,
)
from fieldsmith.measure.sweep import Classes
from fieldsmith.models.core import Model
from fieldsmith.report.page import Page, Panel
from fieldsmith.training import step_generator

NOISED, OWN_PATH = "noised data", "the teacher's guided path"  # the two kinds of states
FINE = 24  # points on the curve of G(w) between w = 0 and 6
GAP = {"share": "share of gap", "rho": "rho", "cosine": "cosine", "weighted_cosine": "weighted",
       "relative_gap_error": "gap error", "gain": "gain", "residual": "orthogonal", "recalibration": "a*"}  # fmt: skip
BRANCHES = {"e_c": "E_c", "e_u": "E_u", "common": "common", "difference": "difference", "correlation": "correlation"}
TABLED = (2, 4)  # scales at which a table gives G(w)
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


def diagnosis(
    student: Model, config: GuidanceConfig, teacher: Model, prompts: Sequence[str] = (), data: Classes | None = None
) -> Diagnosis:
    """Raises InputError where the two cannot be asked the same, or nothing says what to draw."""
    check_pair(student, teacher)
    prompts = prompts or (data.names if data else ())
    if not prompts:
        raise InputError(f"{teacher.name} reads text; name what to draw with --prompts 'a prompt' 'another'")
    results = {}
    for kind, tuples in _states(config, teacher, data, prompts).items():
        of_student, of_teacher = (ask(model, tuples, config.chunk) for model in (student, teacher))
        results[kind] = measure(of_student, of_teacher, tuples.t, config.bins, config.reference)
    alive = None
    if config.samples:
        drawn = [prompts[i % len(prompts)] for i in range(config.samples)]
        alive = liveness(_sampler(student, config), _sampler(teacher, config), drawn, config.seed)
    where, worst = max(results.items(), key=lambda item: VERDICTS.index(item[1].verdict))
    numbers = {
        "nfe": nfe(config, len(results)),
        "verdict": worst.verdict,
        "where": where,
        "liveness": alive if alive is None or alive < math.inf else None,
        "states": {kind: one.to_json() for kind, one in results.items()},
    }
    others = [f"on {kind}: {one.verdict}" for kind, one in results.items() if kind != where]
    words = f"{worst.words} ({'; '.join((f'Seen on {where}', *others))}.)"
    page = Page(
        f"Guidance of {student.name}",
        f"against its teacher {teacher.name}, at {config.tuples} states of each kind, seed {config.seed}",
    )
    good = {"healthy": True, "distorted": None}.get(worst.verdict, False)
    page.verdict(words, good, worst.verdict.capitalize())
    page.numbers(_cards(results, alive))
    for kind, one in results.items():
        _sections(page, kind, one)
    page.text("How to read it", HOW)
    return Diagnosis(numbers, words, page)


# what can be compared


def check_pair(student: Model, teacher: Model) -> None:
    """Raises InputError where the two cannot be asked the same, or have no guidance to compare."""
    for model in (student, teacher):
        _check_null(model)
    known = [getattr(model, "classes", None) for model in (student, teacher)]
    if known[0] != known[1]:
        raise InputError(
            f"the student knows {listed(known[0])} and the teacher {listed(known[1])}; give the teacher that "
            "the student was distilled from"
        )
    shapes = [tuple(model.noise(1, torch.Generator().manual_seed(0)).shape[1:]) for model in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise InputError(f"the student's states are {shapes[0]}, the teacher's {shapes[1]}; they must be the same")
    kinds = [_kind(model) for model in (student, teacher)]
    if kinds[0] != kinds[1]:
        raise InputError(f"the student predicts {kinds[0]} and the teacher {kinds[1]}, whose errors do not compare")
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    if not torch.allclose(student.path.alpha(t), teacher.path.alpha(t), atol=1e-4):
        raise InputError(
            "student and teacher have different noise schedules, so that one t is two noise levels; save the student "
            "with the teacher's scheduler"
        )


def _check_null(model: Model) -> None:
    if not getattr(model, "conditional", True):
        raise InputError(f"{model.name} is unconditional, so it has no guidance to measure")
    if getattr(model, "embedded_guidance", False) or getattr(model, "scales", None):
        raise InputError(
            f"{model.name} takes its guidance scale as an input, so it has one branch and no gap to measure"
        )
    try:
        model.encode([""])
    except InputError as error:
        raise InputError(
            f"{model.name} has no null class, so no guidance to measure; train it with one embedding row more than it "
            "has classes and with labels dropped now and then"
        ) from error


def listed(classes: Sequence[str] | None) -> str:
    """'10 classes (0, 1, 2, ...)'."""
    if not classes:
        return "no classes"
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


@torch.no_grad()
def _kind(model: Model) -> str:
    """The form in which the network predicts."""
    with model.uncounted():
        return model.predict(
            model.noise(1, torch.Generator().manual_seed(0)), model.grid(1)[0], model.encode([""])
        ).kind


# what is asked


def _states(config: GuidanceConfig, teacher: Model, data: Classes | None, prompts: Sequence[str]) -> dict[str, Tuples]:
    """The states by kind; those of noised data only where there are data."""
    states = {}
    if data:
        generator = step_generator(config.seed, 0)
        states[NOISED] = noised_tuples(teacher, data.held_images, data.held_labels, config.tuples, generator)
    generator = step_generator(config.seed, 1)
    states[OWN_PATH] = path_tuples(teacher, prompts, config.steps, config.scale, generator, config.tuples, config.chunk)
    return states


def _sampler(model: Model, config: GuidanceConfig) -> GuidedSampler:
    return lambda prompts, seed, guidance: sampler(model, config.steps, guidance)(prompts, seed)


def nfe(config: GuidanceConfig, kinds: int) -> int:
    """Network forwards of the whole diagnosis, of student and teacher alike: the models' own counts leave it out."""
    asked = kinds * config.tuples * 2 * 2
    path = -(-config.tuples // config.steps) * config.steps * (1 if config.scale == 1 else 2)
    return asked + path + config.samples * config.steps * (1 + 2) * 2  # scale 1 needs one branch


# the page


def _cards(results: dict[str, Guidance], alive: float | None) -> list[tuple[str, str, str]]:
    cards = [
        (f"rho on {kind}", _short(one.worst_rho), f"the worst of bins that matter: {one.verdict}")
        for kind, one in results.items()
    ]
    if alive is not None:
        what = "how far scale 3 moves the images away from scale 1, over the teacher's; 0 is a dead knob, 1 faithful"
        cards.append(("liveness", _short(alive), what))
    return cards


def _short(value: float) -> str:
    return f"{value:.2f}" if value < math.inf else "infinite"


def _sections(page: Page, kind: str, of_kind: Guidance) -> None:
    """The sections of one kind of states."""
    title, bins = kind[0].upper() + kind[1:], of_kind.bins
    rows = [*bins, of_kind.pooled]
    when = [*(f"{b.t_low:.2g} to {b.t_high:.2g}".replace(" ", "\u00a0") for b in bins), "all"]
    highlight = [i for i, b in enumerate(bins) if b.share > MATTERS]
    page.table(
        title,
        ["t", "states", *GAP.values()],
        [[t, b.n, *_cells(b, GAP)] for t, b in zip(when, rows, strict=True)],
        f"Verdict on these states: {of_kind.verdict}. Rows set off hold more than 5% of the teacher's squared gap.",
        highlight,
    )
    page.table(
        f"{title}: errors per pixel",
        ["t", *BRANCHES.values(), *(f"G({w})" for w in TABLED)],
        [
            [t, *_cells(b, BRANCHES), *(f"{b.guided_error(w):.3g}" for w in TABLED)]
            for t, b in zip(when, rows, strict=True)
        ],
        highlight=highlight,
    )
    scales = [6 * i / FINE for i in range(FINE + 1)]
    panels = [
        Panel("Size and direction of the gap", _series(bins, {"rho": "rho", "cosine": "cosine"}), "t"),
        Panel("Error of each branch", _series(bins, {"E_c": "e_c", "E_u": "e_u"}), "t", "per pixel"),
        Panel(
            "Guided error", {"G(w)": (scales, list(map(of_kind.pooled.guided_error, scales)))}, "scale w", "per pixel"
        ),
        Panel("Free recalibration", _series(bins, {"a*(t)": "recalibration"}), "t", "factor on the scale"),
    ]
    page.curves(f"{title}: curves", panels)


def _cells(b: Fidelity, names: dict[str, str]) -> list[str]:
    return [f"{100 * b.share:.0f}%" if name == "share" else f"{getattr(b, name):.3g}" for name in names]


def _series(bins: Sequence[Fidelity], names: dict[str, str]) -> dict[str, tuple[list[float], list[float]]]:
    """Curves over the middles of bins, without those where a number is infinite."""
    curves = {}
    for label, name in names.items():
        points = [((b.t_low + b.t_high) / 2, getattr(b, name)) for b in bins if math.isfinite(getattr(b, name))]
        curves[label] = ([t for t, _ in points], [value for _, value in points])
    return curves
