"""What a sharpening run is told: every field with its default and meaning, and the presets (VSM notes, 2.7 and 8.2)."""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass, replace
from typing import Literal

from fieldsmith.errors import InputError, check_word

METHODS = (
    "plain", "variance-learning", "variance-penalty", "jacobian-floor", "jacobian-match", "covariance", "neighbours",
    "guide",
)  # fmt: skip
NEEDS_HEAD = ("variance-learning", "variance-penalty", "covariance")
JACOBIAN = ("jacobian-floor", "jacobian-match", "covariance")


@dataclass(frozen=True)
class SharpenConfig:
    """Train a model on its own data so that fewer samples lie where the data has none; it ships as a pipeline."""

    model: str = "zoo:columns-ddpm"
    """A diffusers pipeline folder, a hub id, or a zoo model, on a DDPM schedule."""
    data: str = "auto"
    """columns, cards or a folder of images; auto: what the model's card names."""
    judge: str | None = None
    """For a folder: file.py:name, package.module:name or an http:// address that says which images are valid."""
    out: pathlib.Path | None = None
    """The run directory to write (new or empty); the model goes to its model/."""
    method: str = "guide"
    """plain, variance-learning (I-DDPM), variance-penalty (VSM), jacobian-floor, jacobian-match, covariance (OCM),
    neighbours, or guide: a small, briefly trained network of the same data that the model is steered away from."""
    strength: float = 0.1
    """rho: weight of the penalty or the Jacobian term; published VSM has 0.1."""
    weight: Literal["inverse-sigma", "constant"] = "inverse-sigma"
    """rho / sqrt(1 - abar_t) as in the released pixel code, or rho as in its latent code."""
    kind: Literal["normalised", "raw"] = "normalised"
    """Which Jacobian the floor raises; the raw one collapses at 0.1."""
    probes: float = 0.25
    """Share of a batch's rows at which a Jacobian is asked: a JVP costs several forwards."""
    perturbation: float = 0.0
    """gamma of DDPM-IP: x_t is built from eps + gamma xi, the target stays eps; 0.1 is its paper's."""
    add_head: bool = False
    """Give the model a variance head where it has none."""
    train: Literal["all", "head"] = "all"
    """All weights, or the output layer's variance half alone, which leaves the mean as it is to the last bit."""
    times: tuple[float, float] = (0.0, 1.0)
    """Noise levels sigma in which training times are drawn; the decision window is about 0.2 0.8 of images."""
    min_snr: float | None = None
    """Weigh the eps error by min(1, this / SNR): 5 suits networks that predict x_0; None: by 1, as published."""
    bank: int = 512
    """neighbours: rows of data whose posterior mean is the target in place of one draw of noise."""
    off_path: float = 0.0
    """neighbours: share of rows at states between two noised images, where no data path goes."""
    guide_size: float = 4.0
    """guide: how many times fewer parameters the small network has."""
    guidance: float = 2.0
    """guide: eps = worse + guidance (eps_model - eps_worse); 1 is off."""
    steps: int = 400
    """Updates."""
    batch: int = 32
    """Rows of an update."""
    lr: float = 5e-4
    """AdamW's learning rate, decayed by a cosine."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    l2: float = 0.0
    """Weight of |theta|^2 / 2 in the gradient, as Adam's coupled decay."""
    warmup: int = 20
    """Updates over which the learning rate rises."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.99
    """Decay of the averaged weights that are kept; 0: none."""
    share_every: int = 50
    """How often the term's share of the gradient is measured; one more backward pass each."""
    samples: int = 200
    """Images before and after, at equal noise, for the judge and the page."""
    sampler_steps: int = 40
    """Ancestral steps of them."""
    extractor: str | None = None
    """Folder or hub id of a CLIP or DINOv2 model whose features the page's distances use; None: 8 x 8 pixels."""
    threads: int | None = None
    """Torch threads; None: as many as torch wants."""
    seed: int = 0
    """Everything random follows from it."""


_VSM = SharpenConfig(method="variance-penalty", strength=0.1)
PRESETS: dict[str, SharpenConfig] = {
    "guide": SharpenConfig(),
    "vsm": _VSM,
    "vsm-latent": replace(_VSM, weight="constant"),
    "plain": SharpenConfig(method="plain"),
    "improved-ddpm": SharpenConfig(method="variance-learning"),
    "jacobian-floor": SharpenConfig(method="jacobian-floor", strength=0.01),
    "jacobian-match": SharpenConfig(method="jacobian-match", strength=0.01),
    "ddpm-ip": SharpenConfig(method="plain", perturbation=0.1),
    "ocm": SharpenConfig(method="covariance", train="head", strength=1.0),
    "neighbours": SharpenConfig(method="neighbours", off_path=0.5),
}
PAPER = {"steps": 30_000, "batch": 64, "lr": 1e-5, "ema": 0.9999, "warmup": 0}


def preset(name: str, scale: str = "laptop") -> SharpenConfig:
    """A recipe at laptop or paper size. Raises InputError at an unknown name."""
    check_word(name, tuple(PRESETS), "sharpen's presets")
    return replace(PRESETS[name], **PAPER) if scale == "paper" else PRESETS[name]  # type: ignore[arg-type]


def check(config: SharpenConfig) -> None:
    """Raises InputError with the value and the fix; needs neither model nor data."""
    check_word(config.method, METHODS, "sharpen's methods")
    for name, least in (("steps", 1), ("batch", 1), ("bank", 2), ("share_every", 1), ("samples", 2),
                        ("sampler_steps", 1), ("threads", 1)):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    for name in ("strength", "perturbation", "weight_decay", "l2", "warmup"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name}={getattr(config, name)} must be 0 or above")
    for name in ("lr", "clip", "min_snr"):
        if getattr(config, name) is not None and not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name}={getattr(config, name)} must be above 0")
    if not 0 <= config.ema < 1:
        raise InputError(f"ema={config.ema} must be at least 0 and below 1; 0.99 is a good start")
    if not 0 < config.probes <= 1:
        raise InputError(f"probes={config.probes} is no share of a batch; use 0.25")
    if not 0 <= config.off_path <= 1:
        raise InputError(f"off_path={config.off_path} is no share of a batch; use 0.5")
    low, high = config.times
    if not 0 <= low < high <= 1:
        raise InputError(f"times={low:g} {high:g} should be two rising noise levels in 0 to 1, such as 0.2 0.8")
    if config.train == "head" and config.method not in NEEDS_HEAD:
        raise InputError(f"method '{config.method}' trains no variance head; use one of {', '.join(NEEDS_HEAD)}")
    for name in ("weight_decay", "l2"):
        if config.train == "head" and getattr(config, name):
            raise InputError(
                f"{name}={getattr(config, name)} moves the whole output layer, but train 'head' leaves the mean as it "
                f"is; use {name}=0, or train 'all'"
            )
    if config.method == "jacobian-floor" and config.kind == "raw" and config.strength >= 0.1:
        raise InputError(
            f"a raw Jacobian's floor at strength={config.strength} is known to collapse the score; keep it below 0.1, "
            "or use --kind normalised"
        )
    if not config.guide_size > 1:
        raise InputError(f"guide_size={config.guide_size} gives no smaller network; use more than 1, 4 is a good start")
    if not config.guidance >= 1:
        raise InputError(
            f"guidance={config.guidance} steers towards the worse network; use at least 1, 2 is a good start"
        )
