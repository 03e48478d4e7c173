"""Settings of `sharpen`, which are also the command line's flags; presets carry published and laptop numbers.

VSM notes, 2.7 and 8.2.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Mapping
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
    Share,
    config,
)
from fieldsmith.errors import InputError, check_word

Method = Literal[
    "plain", "variance-learning", "variance-penalty", "jacobian-floor", "jacobian-match", "covariance", "neighbours",
    "guide",
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(Method)
NEEDS_HEAD = ("variance-learning", "variance-penalty", "covariance")
JACOBIAN = ("jacobian-floor", "jacobian-match", "covariance")
LEAST = 20  # images before and after, however short the run
WORLDS = ("columns", "cards", "shapes")  # data with a judge of their own


@config
class SharpenConfig(FitConfig, DataConfig, MemoryConfig):
    """Train a model on its own data so that fewer samples lie where the data has none; it ships as a pipeline."""

    FIRST = ("model", "data", "judge", "method", "steps", "batch", "lr", "guidance", "samples", "out")
    NOTES = """--preset NAME picks a recipe (default: the method's own, else guide).
--scale laptop|paper picks how long it trains (default: laptop for zoo models, else paper).
--config FILE.toml (such as a run's config.toml) sets fields again, and flags come last."""

    model: str = "zoo:columns-ddpm"
    """A diffusers pipeline folder, a hub id, or a zoo model; on rectified flow by what needs no learned variance."""
    data: str = "auto"
    """columns, cards, shapes or a folder of images; auto: what the model's card names. A model that reads words learns
    each image under its caption where the images have captions."""
    judge: str | None = None
    """For a folder: file.py:name, package.module:name or an http:// address that says which images are valid. None:
    the field's sharpness is measured instead."""
    method: Method = "guide"
    """plain, variance-learning (I-DDPM), variance-penalty (VSM), jacobian-floor, jacobian-match, covariance (OCM),
    neighbours, or guide: a small, briefly trained network of the same data that the model is steered away from."""
    strength: NonNegative = 0.1
    """rho: weight of the penalty or the Jacobian term; published VSM has 0.1."""
    weight: Literal["inverse-sigma", "constant"] = "inverse-sigma"
    """rho / sqrt(1 - abar_t) as in the released pixel code, or rho as in its latent code."""
    kind: Literal["normalised", "raw"] = "normalised"
    """Which Jacobian the floor raises; the raw one collapses at 0.1."""
    probes: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of a batch's rows at which a Jacobian is asked: a JVP costs several forwards."""
    perturbation: NonNegative = 0.0
    """gamma of DDPM-IP: x_t is built from eps + gamma xi, the target stays eps; 0.1 is its paper's."""
    add_head: bool = False
    """Give the model a variance head where it has none."""
    train: Literal["all", "head"] = "all"
    """All weights, or the output layer's variance half alone, which leaves the mean as it is to the last bit."""
    times: tuple[float, float] = (0.0, 1.0)
    """Noise levels sigma in which training times are drawn; the decision window is about 0.2 0.8 of images."""
    min_snr: Positive | None = None
    """Weigh the eps error by min(1, this / SNR): 5 suits networks that predict x_0; None: by 1, as published."""
    bank: Annotated[Count, Field(ge=2)] = 512
    """neighbours: rows of data whose posterior mean is the target in place of one draw of noise."""
    off_path: Share = 0.0
    """neighbours: share of rows at states between two noised images, where no data path goes."""
    guide_size: Annotated[float, Field(gt=1)] = 4.0
    """guide: how many times fewer parameters the small network has."""
    guidance: Annotated[float, Field(ge=1)] = 2.0
    """guide: eps = worse + guidance (eps_model - eps_worse); 1 is off."""
    lr: Positive = 5e-4
    """AdamW's learning rate, decayed by a cosine."""
    l2: NonNegative = 0.0
    """Weight of |theta|^2 / 2 in the gradient, as Adam's coupled decay."""
    warmup: Natural = 20
    """Updates over which the learning rate rises."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the averaged weights that are kept; 0: none."""
    share_every: Count = 50
    """How often the term's share of the gradient is measured; one more backward pass each."""
    samples: Natural = 200
    """Images before and after, at equal noise, for the judge and the page; unless it is given, a run of fewer steps
    than 400 has half of them. 0 trains and saves only."""
    sampler_steps: SamplerSteps = 40
    """Ancestral steps of them; Euler's on rectified flow."""
    extractor: str | None = None
    """Folder or hub id of a CLIP or DINOv2 model whose features the page's distances use; None: 8 x 8 pixels."""

    @classmethod
    def preset_of(cls, name: str | None, scale: str | None, given: Mapping[str, Any]) -> Self:
        method = given.get("method")
        if method is not None:
            check_word(method, METHODS, "sharpen's methods")
        name = name or PRESET_OF_METHOD.get(str(method), method) or "guide"
        check_word(name, tuple(PRESETS), "sharpen's presets")
        zoo = str(given.get("model", cls.model)).startswith("zoo:")
        scale = scale or ("laptop" if zoo else "paper")
        check_word(scale, tuple(SCALES), "sharpen's scales")
        settings = PRESETS[name] | SCALES[scale]
        steps = given.get("steps", settings.get("steps", cls.steps))
        return cls(**settings, samples=min(cls.samples, max(LEAST, steps // 2)))

    def check(self) -> None:
        low, high = self.times
        if not 0 <= low < high <= 1:
            raise InputError(f"times={low:g} {high:g} should be two rising noise levels in 0 to 1, such as 0.2 0.8")
        if 0 < self.samples < 4:
            raise InputError(f"samples={self.samples} is too few to compare; use at least 4, or 0 to measure nothing")
        if self.train == "head" and self.method not in NEEDS_HEAD:
            raise InputError(f"method '{self.method}' trains no variance head; use one of {', '.join(NEEDS_HEAD)}")
        for name in ("weight_decay", "l2"):
            if self.train == "head" and getattr(self, name):
                raise InputError(
                    f"{name}={getattr(self, name)} moves the whole output layer, but train 'head' leaves the mean as "
                    f"it is; use {name}=0, or train 'all'"
                )
        if self.method == "jacobian-floor" and self.kind == "raw" and self.strength >= 0.1:
            raise InputError(
                f"a raw Jacobian's floor at strength={self.strength} is known to collapse the score; keep it below "
                "0.1, or use --kind normalised"
            )
        if self.checkpointing and self.method in ("jacobian-floor", "jacobian-match"):
            raise InputError(
                f"method '{self.method}' asks for the Jacobian, whose graph cannot be run again; leave out "
                "--checkpointing, or lower --batch or --probes"
            )
        self._check_data()

    def _check_data(self) -> None:
        """Raises InputError where there is no such data, or where it and the judge do not go together."""
        if self.data in WORLDS:
            if self.judge is not None:
                raise InputError(f"world '{self.data}' has a judge of its own; leave out '{self.judge}'")
        elif self.data != "auto" and not self.data.startswith(GIVEN) and not pathlib.Path(self.data).is_dir():
            near = difflib.get_close_matches(self.data, WORLDS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"name one, or {', '.join(WORLDS)}"
            raise InputError(f"data '{self.data}' is no folder of images; {hint}")


PRESET_OF_METHOD = {"variance-penalty": "vsm", "variance-learning": "improved-ddpm", "covariance": "ocm"}
PRESETS: dict[str, dict[str, Any]] = {
    "guide": {},
    "vsm": {"method": "variance-penalty"},
    "vsm-latent": {"method": "variance-penalty", "weight": "constant"},
    "plain": {"method": "plain"},
    "improved-ddpm": {"method": "variance-learning"},
    "jacobian-floor": {"method": "jacobian-floor", "strength": 0.01},
    "jacobian-match": {"method": "jacobian-match", "strength": 0.01},
    "ddpm-ip": {"method": "plain", "perturbation": 0.1},
    "ocm": {"method": "covariance", "train": "head", "strength": 1.0},
    "neighbours": {"method": "neighbours", "off_path": 0.5},
}
SCALES: dict[str, dict[str, Any]] = {
    "laptop": {},
    "paper": {"steps": 30_000, "batch": 64, "lr": 1e-5, "ema": 0.9999, "warmup": 0},
}
