"""What a distillation run is told: every field with its default and meaning, and the presets (DASH notes, 3 and 11)."""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass, replace
from typing import Literal

from fieldsmith.errors import InputError, check_word

OBJECTIVES = (
    "dash", "conditional", "composite", "tag", "gap", "cond+gap", "matched-dropout", "student-dropout", "w-conditioned",
    "fitnets", "bk-sdm", "scratch",
)  # fmt: skip
FEATURES = ("fitnets", "bk-sdm")  # objectives that also match what is inside the networks
CURRICULA = ("uniform", "tirt", "sigmoid", "min-snr", "min-snr-x0", "p2", "edm2")


@dataclass(frozen=True)
class DistillConfig:
    """Train a smaller student of a guided teacher, both branches of guidance kept; it ships as a diffusers pipeline."""

    teacher: str = "zoo:digits-unet"
    """A diffusers pipeline folder, a hub id, or a zoo model, with a null class (or prompt)."""
    data: str = "auto"
    """digits, shapes, or a folder with a subfolder of images a class; auto: what the teacher's card names."""
    out: pathlib.Path | None = None
    """The run directory to write (new or empty); the student goes to its model/."""
    shrink: float = 5.9
    """How many times fewer parameters the student's network has."""
    student: pathlib.Path | None = None
    """Instead, a JSON file of diffusers config fields for the student's network: {"block_out_channels": [16, 24]}."""
    init: Literal["fresh", "copied"] = "fresh"
    """How the student starts: new weights, or the teacher's where they fit and evenly chosen ones elsewhere."""
    objective: str = "dash"
    """dash, conditional, composite, tag, gap, cond+gap, matched-dropout, student-dropout, w-conditioned, fitnets,
    bk-sdm or scratch; `fieldsmith distill --identifiability` prints what each leaves open."""
    imitation: float | None = None
    """Weight of |e_c|^2; None: the objective's own (dash: 1)."""
    unconditional: float | None = None
    """Weight of |e_u|^2; None: the objective's own (dash: 1)."""
    anchor: float | None = None
    """Weight of |s_c - eps|^2; None: the objective's own (dash: 0.1)."""
    gap: float | None = None
    """Weight of |e_c - e_u|^2; None: the objective's own."""
    composite_scales: tuple[float, ...] = (4.0,)
    """Scales of the composite objective: one number, the two ends of a uniform law, or more numbers to pick from."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """The scales that a w-conditioned student knows."""
    layout: Literal["pairs", "split"] = "pairs"
    """pairs: both branches at each state, as published; split: each state serves one branch, so more states."""
    null_share: float = 0.1
    """Share of the student's evaluations that go to the null branch in the split layout."""
    natural: bool = False
    """Split layout: weigh rows as they fall (label dropout) instead of by the objective's weights."""
    curriculum: Literal["uniform", "tirt", "sigmoid", "min-snr", "min-snr-x0", "p2", "edm2"] = "uniform"
    """Weights over time; tirt is min(SNR, gamma) sigmoid(lambda_t) as published, min-snr its right form for noise."""
    curriculum_from: Literal["teacher", "fit", "learned"] = "fit"
    """Where tirt's, sigmoid's and edm2's numbers come from: the teacher's file (not edm2's), a fit to the frozen
    teacher's losses, or learned along with the student."""
    normalise: Literal["times", "batch"] = "times"
    """Divide weights by their mean over all times (the paper), or over the batch (the released code)."""
    gamma: float = 5.0
    """Where min-SNR weights are cut."""
    times: tuple[float, float] = (1.0, 1.0)
    """The states' times are drawn from this Beta law, not weighed back: 1 1 is uniform, 2 1 leans to noise."""
    bank: int = 16_384
    """Rows of the cached teacher in use at a time, in shards of 2,048; 0: ask it at every step, as published."""
    bank_folder: pathlib.Path | None = None
    """Where the cache lies, shared by runs; None: in the run directory."""
    reuse: float = 4.0
    """How often a cached row is drawn on average before a new one takes its place."""
    stratify: bool = True
    """Spread each batch evenly over the times."""
    steps: int = 1_500
    """Updates."""
    batch: int = 64
    """Student evaluations in an update: 64 rows, or 32 pairs."""
    lr: float = 8e-3
    """AdamW's learning rate, decayed by a cosine; large, as suits networks of 100,000 parameters."""
    weight_decay: float = 1e-3
    """AdamW's weight decay."""
    warmup: int = 100
    """Updates over which the learning rate rises."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights that are kept."""
    evaluate: int = 300
    """Images a guidance scale for the page."""
    sampler_steps: int = 20
    """Sampler steps for the page."""
    threads: int | None = None
    """Torch threads; None: as many as torch wants."""
    seed: int = 0
    """Everything random follows from it."""


_PUBLISHED = DistillConfig(batch=128, bank=0, stratify=False)  # 64 pairs, the teacher asked at every step
PRESETS: dict[str, DistillConfig] = {
    "dash": replace(_PUBLISHED, curriculum="tirt"),
    "dash-released": replace(_PUBLISHED, curriculum="tirt", normalise="batch"),
    "dash-uniform": _PUBLISHED,
    # label dropout with the teacher's label dropped too, from the teacher's own weights, with a small cache used often
    "fieldsmith": DistillConfig(
        objective="matched-dropout", layout="split", natural=True, null_share=0.2, init="copied", bank=4_096, reuse=16,
    ),
    **{
        name: replace(_PUBLISHED, batch=64, objective=name)
        for name in OBJECTIVES
        if name not in ("dash", "matched-dropout", "student-dropout", "scratch")
    },
    **{
        name: replace(_PUBLISHED, batch=64, objective=name, layout="split", natural=True)
        for name in ("matched-dropout", "student-dropout", "scratch")
    },
    "multi-w": replace(_PUBLISHED, batch=64, objective="composite", composite_scales=(1.0, 4.0)),
}  # fmt: skip
PAPER = {"steps": 234_000, "lr": 1e-4, "weight_decay": 1e-3, "ema": 0.999, "warmup": 0}


def preset(name: str, scale: str = "laptop") -> DistillConfig:
    """A recipe at laptop or paper size. Raises InputError at an unknown name."""
    check_word(name, tuple(PRESETS), "distill's presets")
    return replace(PRESETS[name], **PAPER) if scale == "paper" else PRESETS[name]  # type: ignore[arg-type]


def check(config: DistillConfig) -> None:
    """Raises InputError with the value and the fix; needs neither model nor data."""
    check_word(config.objective, OBJECTIVES, "distill's objectives")
    for name, least in (("steps", 1), ("batch", 1), ("evaluate", 2), ("sampler_steps", 1), ("threads", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    for name in ("imitation", "unconditional", "anchor", "gap", "weight_decay", "warmup", "bank"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"{name}={value} must be 0 or above")
    for name in ("lr", "gamma", "reuse", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name}={getattr(config, name)} must be above 0")
    if not 0 <= config.ema < 1:
        raise InputError(f"ema={config.ema} must be at least 0 and below 1; 0.999 is a good start")
    if not config.shrink > 1:
        raise InputError(f"shrink={config.shrink} gives no smaller student; use more than 1, the paper's is 5.9")
    if not 0 < config.null_share < 1:
        raise InputError(f"null_share={config.null_share} must lie between 0 and 1; 0.1 is a good start")
    if not all(0 < one < math.inf for one in config.times):
        raise InputError(f"times={config.times} are no Beta law; both numbers must be above 0, 1 1 is uniform")
    if not config.composite_scales or not config.guidance_scales:
        raise InputError("no guidance scale given; name at least one, e.g. --composite-scales 4")
    coupled = config.objective in ("composite", "tag", "gap", "cond+gap") or bool(config.gap)
    if config.layout == "split" and coupled:
        raise InputError(f"objective '{config.objective}' needs both branches at each state; use --layout pairs")
    if config.layout == "pairs" and config.objective in ("student-dropout", "scratch", "matched-dropout"):
        raise InputError(f"objective '{config.objective}' drops labels row by row; use --layout split")
    if config.objective == "w-conditioned":
        for name in ("imitation", "unconditional", "anchor", "gap"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"{name}={getattr(config, name)}: a w-conditioned student has one branch; leave it out"
                )
    if config.bank and config.objective in FEATURES:
        raise InputError(f"objective '{config.objective}' looks inside the teacher, which no cache holds; use --bank 0")
    if config.objective in FEATURES and (config.gap or config.unconditional):
        raise InputError(f"objective '{config.objective}' has one branch to look into; leave out gap and unconditional")
    if config.curriculum == "edm2" and config.curriculum_from == "learned" and config.normalise == "batch":
        raise InputError("a learned 'edm2' keeps a scale of its own, which normalise='batch' would undo; use times")
    if config.curriculum_from == "teacher" and config.curriculum not in ("tirt", "sigmoid"):
        raise InputError(f"curriculum '{config.curriculum}' is not stored with teachers; use --curriculum-from fit")
