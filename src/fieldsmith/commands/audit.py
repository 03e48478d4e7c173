"""`fieldsmith audit`: which choice would hurt on this model and reward: estimator, strength per step, trust region.

In: the words after the verb. Out: a run directory with metrics.json and report.html; nothing is trained.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fieldsmith.commands import arguments
from fieldsmith.errors import InputError, check_word

if TYPE_CHECKING:
    from fieldsmith.methods.align.audit import Truths
    from fieldsmith.methods.align.context import AlignContext
    from fieldsmith.run import Run

EXACT = ("world:triangle",)  # closed forms: the three Gaussians of the paper's toy under its linear reward


@dataclass(frozen=True)
class AuditConfig:
    """Measure estimators, strengths and trust regions of `align`'s recipes on a model and a reward, before training."""

    model: str = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, a zoo model, or world:triangle, whose truth is a closed form."""
    reward: str = "classifier"
    """A reward, or a weighted sum of rewards, e.g. `classifier` or `right+0.1*brightness`; world:triangle: `linear`."""
    prompts: tuple[str, ...] = ()
    """Prompts to look at, or one text file with a prompt a line; empty: the world's own captions."""
    out: pathlib.Path | None = None
    """The run directory to write (new or empty)."""
    steps: int = 10
    """Sampler steps."""
    times: int = 5
    """At how many of them to measure."""
    states: int = 16
    """States at each time."""
    samples: int = 128
    """Rollouts from each state for the reference; its noise is subtracted, what it hides falls as 1 / samples."""
    reference: Literal["auto", "zeroth-order"] = "auto"
    """auto: a closed form where there is one, gradients along drawn chains where the reward has one, else rewards."""
    sde: Literal["auto", "flow-sde", "dance-sde", "cps", "ddim", "ddim-uniform"] = "auto"
    """The stochastic step; auto: flow-sde on flows, ddim elsewhere and on exact worlds."""
    noise_level: float | None = None
    """Its noise; None: its usual one."""
    guidance: float | None = None
    """Guidance scale; None: off."""
    temperature: float = 0.1
    """alpha: what the spread of rewards is held against, for what is measured is the limit of small reward / alpha."""
    displacement: float = 0.02
    """Root mean square change of the output, a number, at which the clip fractions are given."""
    chunk: int = 256
    """States per forward; lower it when memory is short."""
    resolution: int | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    seed: int = 0
    """Everything random follows from it."""


def audit(words: Sequence[str]) -> None:
    rest = list(words)
    path = arguments.take(rest, "--config")
    file = arguments.from_file(path, AuditConfig, "audit") if path else {}
    notes = "Also: --config FILE.toml (such as a run's config.toml) sets fields; flags come last."
    run(arguments.parse(AuditConfig(**file), rest, "audit", notes))


def check(config: AuditConfig) -> None:
    """Raises InputError with the value and the fix; needs no model."""
    arguments.at_least(config, 1, "steps", "times", "resolution")
    arguments.at_least(config, 8, "samples", "chunk")
    arguments.at_least(config, 2, "states")
    for name in ("temperature", "displacement", "noise_level"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise InputError(f"{name}={value} must be above 0")
    if config.times > config.steps:
        raise InputError(f"times={config.times} is more than the sampler's {config.steps} steps; lower it")
    if config.model.startswith("world:"):
        check_word(config.model, EXACT, "audit's exact worlds")
        check_word(config.reward, ("linear",), f"the rewards of {config.model}")


def run(config: AuditConfig) -> Run:
    """The whole verb; the finished run directory. Raises InputError before anything is written."""
    check(config)
    directory = arguments.directory_of(config, "audit")
    from rich.console import Console

    from fieldsmith.commands.audit_page import of_moment, of_outlook, page_of
    from fieldsmith.methods.align.advice import outlooks, recommend
    from fieldsmith.methods.align.audit import measure
    from fieldsmith.methods.align.config import RECIPES, preset, scale_for
    from fieldsmith.training import step_generator

    console = Console(stderr=True)
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    began = time.monotonic()
    setting, truths = _setting(config)
    noisy = setting.s.noisy.nonzero().flatten().tolist()
    if config.times > len(noisy):
        raise InputError(f"times={config.times} is more than the {len(noisy)} steps that draw noise; lower it")
    ids = sorted({noisy[round(i * (len(noisy) - 1) / max(config.times - 1, 1))] for i in range(config.times)})
    kind: Any = "closed form" if truths else "zeroth order"
    if config.reference == "auto" and not truths and setting.reward.differentiable:
        kind = "pathwise"
    pool = max(32, min(64, config.samples // 2))
    with console.status("measuring") as status, setting.model.count_nfe() as nfe:
        moments = measure(setting, ids, config.states, config.samples, kind, pool, truths, status.update)
    directory.begin()
    presets = {
        name: dataclasses.replace(
            preset(name), steps=config.steps, clip=preset(name, scale_for(name, config.model)).clip
        )
        for name in RECIPES
    }
    found = outlooks(presets, setting.s, setting.prior, moments)
    numbers = setting.model.noise(1, step_generator(config.seed, 0)).numel()
    words = recommend(found, setting.s, moments, setting.reward.differentiable, numbers, config.temperature)
    metrics = {
        "method": "audit",
        "seconds": time.monotonic() - began,
        "forward_equivalents": setting.prepared + nfe.total,
        "recommendation": words,
        "reference": kind,
        "numbers": numbers,
        "grid": setting.s.times.tolist(),
        "times": [of_moment(moment) for moment in moments],
        "recipes": {one.name: of_outlook(one, config.displacement, numbers) for one in found},
    }
    page_of(dataclasses.asdict(config), metrics, str(directory.folder)).write(directory.folder / "report.html")
    directory.finish(metrics)
    console.print(words)
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def _setting(config: AuditConfig) -> tuple[AlignContext, Truths | None]:
    """The reference policy, and for exact worlds grad E r and alpha grad V."""
    from fieldsmith.methods.align.config import AlignConfig
    from fieldsmith.methods.align.context import AlignContext
    from fieldsmith.models import load
    from fieldsmith.read import read_prompts
    from fieldsmith.rewards import load as reward_of
    from fieldsmith.worlds.model_cards import world_of

    exact = config.model.startswith("world:")
    plain = AlignConfig(
        model=config.model, reward=config.reward, prompts=read_prompts(config.prompts), seed=config.seed,
        steps=config.steps, sde="ddim" if exact and config.sde == "auto" else config.sde, chunk=config.chunk,
        noise_level=config.noise_level, guidance=config.guidance, strength="jacobian",
    )  # fmt: skip
    if exact:
        return _triangle(config, plain)
    model = load(config.model, config.resolution)
    world = world_of(config.model)
    if not plain.prompts and world:
        from fieldsmith.worlds.shapes import caption, concepts

        plain = dataclasses.replace(plain, prompts=tuple(caption(concept) for concept in concepts()))
    return AlignContext.of(model, plain, reward_of(config.reward, world)), None


def _triangle(config: AuditConfig, plain: Any) -> tuple[AlignContext, Truths | None]:
    import torch

    from fieldsmith.methods.align.audit import Truths
    from fieldsmith.methods.align.context import AlignContext
    from fieldsmith.models.exact import Exact
    from fieldsmith.paths import RectifiedFlow
    from fieldsmith.rewards import Reward
    from fieldsmith.samplers import flow_grid
    from fieldsmith.worlds.mixtures import triangle

    mixture, path, b = triangle(), RectifiedFlow(), torch.tensor([-0.5, 0.0], dtype=torch.float64)

    def pulled(x: Any, t: Any, alpha: float) -> Any:
        """alpha grad V of r / alpha, as a difference of scores."""
        tilted = mixture.tilted(b, strength=1 / alpha).mixture
        x64, t64 = x.double(), t.double()
        return (alpha * (tilted.score(x64, t64, path) - mixture.score(x64, t64, path))).to(x)

    reward = Reward("linear", True, lambda images, _: images @ b.to(images) + 3)
    model = Exact(mixture, path, flow_grid(config.steps))
    setting = AlignContext.of(model, dataclasses.replace(plain, prompts=("a point",)), reward)
    truths = Truths(lambda x, t: pulled(x, t, 1e5), lambda x, t: pulled(x, t, config.temperature))
    return setting, truths if config.reference == "auto" else None
