"""Settings of `distill`, which are also the command line's flags; presets carry published and laptop numbers.

DASH notes, 3 and 11.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from fieldsmith.config import (
    GIVEN,
    Count,
    DataConfig,
    FitConfig,
    MemoryConfig,
    Natural,
    NonNegative,
    Positive,
    SamplerSteps,
    config,
)
from fieldsmith.errors import InputError, check_word
from fieldsmith.methods.distill.objectives import BY_ROW, FEATURES, OBJECTIVES, WEIGHTS, Name, Objective
from fieldsmith.read import read_json

Curriculum = Literal["uniform", "tirt", "sigmoid", "min-snr", "min-snr-x0", "p2", "edm2"]
CURRICULA: tuple[str, ...] = get_args(Curriculum)
DATA = ("auto", "digits", "shapes", "fashion")  # what is no folder
LEAST = 20  # images a guidance scale, however short the run


@config
class DistillConfig(FitConfig, DataConfig, MemoryConfig):
    """Train a smaller student of a guided teacher, both branches of guidance kept; it ships as a diffusers pipeline."""

    FIRST = ("teacher", "data", "shrink", "student", "objective", "steps", "batch", "lr", "evaluate", "out")
    NOTES = """--preset NAME picks a recipe (default: the objective's own, else fieldsmith).
--scale laptop|paper picks how long it trains (default: laptop for zoo teachers, else paper).
--config FILE.toml (such as a run's config.toml) sets fields again, and flags come last.
--identifiability prints, for every objective, what it leaves undetermined, and ends."""

    teacher: str = "zoo:digits-unet"
    """A diffusers pipeline folder, a hub id, or a zoo model, with a null class (or prompt)."""
    data: str = "auto"
    """digits, shapes, fashion, or a folder of images with classes or captions (docs/data.md); auto: what the teacher's
    card names."""
    shrink: Annotated[float, Field(gt=1)] = 5.9
    """How many times fewer parameters the student's network has."""
    student: pathlib.Path | None = None
    """Instead, a JSON file of diffusers config fields for the student's network: {"block_out_channels": [16, 24]}."""
    init: Literal["fresh", "copied"] = "fresh"
    """How the student starts: new weights, or the teacher's where they fit and evenly chosen ones elsewhere."""
    objective: Name = "dash"
    """dash, conditional, composite, tag, gap, cond+gap, matched-dropout, student-dropout, w-conditioned, fitnets,
    bk-sdm or scratch; `fieldsmith distill --identifiability` prints what each leaves open."""
    imitation: NonNegative | None = None
    """Weight of |e_c|^2; None: the objective's own (dash: 1)."""
    unconditional: NonNegative | None = None
    """Weight of |e_u|^2; None: the objective's own (dash: 1)."""
    anchor: NonNegative | None = None
    """Weight of |s_c - eps|^2; None: the objective's own (dash: 0.1)."""
    gap: NonNegative | None = None
    """Weight of |e_c - e_u|^2; None: the objective's own."""
    composite_scales: tuple[float, ...] = (4.0,)
    """Scales of the composite objective: one number, the two ends of a uniform law, or more numbers to pick from."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """The scales that a w-conditioned student knows."""
    layout: Literal["pairs", "split"] = "pairs"
    """pairs: both branches at each state, as published; split: each state serves one branch, so more states."""
    null_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the student's evaluations that go to the null branch in the split layout."""
    natural: bool = False
    """Split layout: weigh rows as they fall (label dropout) instead of by the objective's weights."""
    curriculum: Curriculum = "uniform"
    """Weights over time; tirt is min(SNR, gamma) sigmoid(lambda_t) as published, min-snr its right form for noise."""
    curriculum_from: Literal["teacher", "fit", "learned"] = "fit"
    """Where tirt's, sigmoid's and edm2's numbers come from: the teacher's file (not edm2's), a fit to the frozen
    teacher's losses, or learned along with the student."""
    normalise: Literal["times", "batch"] = "times"
    """Divide weights by their mean over all times (the paper), or over the batch (the released code)."""
    gamma: Positive = 5.0
    """Where min-SNR weights are cut."""
    times: tuple[Positive, Positive] = (1.0, 1.0)
    """The states' times are drawn from this Beta law, not weighed back: 1 1 is uniform, 2 1 leans to noise."""
    bank: Natural = 16_384
    """Rows of the cached teacher in use at a time, in shards of 2,048; 0: ask it at every step, as published."""
    bank_folder: pathlib.Path | None = None
    """Where the cache lies, shared by runs; None: in the run directory, or in memory where there is none."""
    reuse: Positive = 4.0
    """How often a cached row is drawn on average before a new one takes its place."""
    stratify: bool = True
    """Spread each batch evenly over the times."""
    steps: Count = 1_500
    """Updates."""
    batch: Count = 64
    """Student evaluations in an update: 64 rows, or 32 pairs."""
    lr: Positive = 8e-3
    """AdamW's learning rate, decayed by a cosine; large, as suits networks of 100,000 parameters."""
    weight_decay: NonNegative = 1e-3
    """AdamW's weight decay."""
    warmup: Natural = 100
    """Updates over which the learning rate rises."""
    evaluate: Natural = 300
    """Images a guidance scale for the page, and a measure of the states that are compared and of how long the page's
    classifier trains; unless it is given, a run of fewer than 1,500 steps has a fifth of them. 0 only trains."""
    sampler_steps: SamplerSteps = 20
    """Sampler steps for the page."""

    @classmethod
    def preset_of(cls, name: str | None, scale: str | None, given: Mapping[str, Any]) -> Self:
        objective = given.get("objective")
        if objective is not None:
            check_word(objective, tuple(OBJECTIVES), "distill's objectives")
        name = name or (objective if objective in PRESETS else "fieldsmith")
        check_word(name, tuple(PRESETS), "distill's presets")
        zoo = str(given.get("teacher", cls.teacher)).startswith("zoo:")
        scale = scale or ("laptop" if zoo else "paper")
        check_word(scale, tuple(SCALES), "distill's scales")
        settings = PRESETS[name] | SCALES[scale]
        steps = given.get("steps", settings.get("steps", cls.steps))
        return cls(**settings, evaluate=min(cls.evaluate, max(LEAST, steps // 5)))

    def check(self) -> None:
        objective_of(self)  # one whose weights are all 0 is refused there
        for name in ("composite_scales", "guidance_scales"):
            if not getattr(self, name):
                raise InputError(f"no guidance scale given; name at least one, e.g. --{name.replace('_', '-')} 4")
        if self.evaluate == 1:
            raise InputError("evaluate=1 is too few to compare; use at least 2, or 0 to measure nothing")
        coupled = self.objective in ("composite", "tag", "gap", "cond+gap") or bool(self.gap)
        if self.layout == "split" and coupled:
            raise InputError(f"objective '{self.objective}' needs both branches at each state; use --layout pairs")
        if self.layout == "pairs" and self.objective in BY_ROW:
            raise InputError(f"objective '{self.objective}' drops labels row by row; use --layout split")
        if self.objective == "w-conditioned":
            for name in WEIGHTS:
                if getattr(self, name) is not None:
                    raise InputError(
                        f"{name}={getattr(self, name)}: a w-conditioned student has one branch; leave it out"
                    )
        if self.objective in FEATURES and self.bank:
            raise InputError(
                f"objective '{self.objective}' looks inside the teacher, which no cache holds; use --bank 0"
            )
        if self.objective in FEATURES and (self.gap or self.unconditional):
            raise InputError(
                f"objective '{self.objective}' has one branch to look into; leave out gap and unconditional"
            )
        if self.curriculum == "edm2" and self.curriculum_from == "learned" and self.normalise == "batch":
            raise InputError("a learned 'edm2' keeps a scale of its own, which normalise='batch' would undo; use times")
        if self.curriculum_from == "teacher" and self.curriculum not in ("tirt", "sigmoid"):
            raise InputError(f"curriculum '{self.curriculum}' is not stored with teachers; use --curriculum-from fit")
        if self.data not in DATA and not self.data.startswith(GIVEN) and not pathlib.Path(self.data).is_dir():
            raise InputError(
                f"data '{self.data}' is no folder; give {', '.join(DATA[1:])}, or a folder of images with classes"
            )
        self.student_fields()

    def student_fields(self) -> dict[str, Any] | None:
        """The config fields of the file that `student` names. Raises InputError where it is no such file."""
        if self.student is None:
            return None
        fields = read_json(self.student, "student config")
        if not isinstance(fields, dict):
            raise InputError(f"student config '{self.student}' is no mapping of config fields to values")
        return fields


PUBLISHED = {"batch": 128, "bank": 0, "stratify": False}  # 64 pairs, the teacher asked at every step
RIVAL = {**PUBLISHED, "batch": 64}
DROPOUT = {**RIVAL, "layout": "split", "natural": True}
PRESETS: dict[str, dict[str, Any]] = {
    "dash": {**PUBLISHED, "curriculum": "tirt"},
    "dash-released": {**PUBLISHED, "curriculum": "tirt", "normalise": "batch"},
    "dash-uniform": PUBLISHED,
    # label dropout with the teacher's label dropped too, from the teacher's own weights, with a small cache used often
    "fieldsmith": {
        "objective": "matched-dropout", "layout": "split", "natural": True, "null_share": 0.2, "init": "copied",
        "bank": 4_096, "reuse": 16,
    },
    **{name: {**RIVAL, "objective": name} for name in OBJECTIVES if name not in ("dash", *BY_ROW)},
    **{name: {**DROPOUT, "objective": name} for name in BY_ROW},
    "multi-w": {**RIVAL, "objective": "composite", "composite_scales": (1.0, 4.0)},
}  # fmt: skip
SCALES: dict[str, dict[str, Any]] = {
    "laptop": {},
    "paper": {"steps": 234_000, "lr": 1e-4, "weight_decay": 1e-3, "ema": 0.999, "warmup": 0},
}


def objective_of(config: DistillConfig) -> Objective:
    """The objective that the settings name, with their own weights. Raises InputError where nothing is left of it."""
    objective = OBJECTIVES[config.objective]
    if objective.composite and not isinstance(objective.scales, str):
        scales = config.guidance_scales if objective.guided_input else config.composite_scales
        objective = replace(objective, scales=scales)
    own = {name: value for name in WEIGHTS if (value := getattr(config, name)) is not None}
    dropped = config.null_share if config.layout == "split" and config.natural else None
    objective = replace(objective, **own, null_share=dropped)
    if not any((objective.composite, *(getattr(objective, name) for name in WEIGHTS))):
        raise InputError("every weight of the objective is 0; set imitation or another one above 0")
    return objective
