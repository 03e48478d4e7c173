"""Estimators and recipes on the exact mixture, then recipes on zoo:shapes-flux-small.

The half-trained model draws what a caption asks in about half of its images, so that a reward has room. Every recipe
trains on the same captions with the same adapter until it has spent the cap; a probe at equal ratios of cost reads its
reward, the rewards that it never sees, KL and diversity. Each recipe's learning rate and batch (or temperature) is the
one with the best reward at half the cap in a sweep on a seed that no result uses.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from experiments.align import mixture
from experiments.align.tables import TRAINED, reward_of, tables
from experiments.study import Record, Run, Stage, Study, StudyConfig, in_words
from fieldsmith import verb
from fieldsmith.errors import RunError
from fieldsmith.measure.distances import diversity, pixel_features
from fieldsmith.measure.drawing import sampler
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.measure import path_kl
from fieldsmith.methods.align.step import Inputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.rewards import Reward
from fieldsmith.rewards import load as load_reward
from fieldsmith.worlds import asked
from fieldsmith.worlds.shapes import HELD_OUT, caption, concepts

SWEEP_SEED = 100
Setting = dict[str, Any]
WATCHED = ("right", "classifier", "classifier-heldout", "valid")
# what each sweep tries: learning rate with the size of a collection, or with the temperature
ZEROTH: tuple[Setting, ...] = tuple(
    {"lr": lr, "rollouts": n} for lr, n in ((3e-4, 24), (1e-3, 24), (1e-3, 8), (3e-3, 8))
)
BRANCH: tuple[Setting, ...] = tuple({"lr": lr, "rollouts": n} for lr, n in ((3e-4, 2), (1e-3, 2), (1e-3, 1), (3e-3, 1)))
FIRST: tuple[Setting, ...] = tuple(
    {"lr": lr, "temperature": a} for lr, a in ((1e-3, 0.003), (1e-3, 0.01), (3e-3, 0.01))
)
PATHWISE: tuple[Setting, ...] = tuple({"lr": lr} for lr in (3e-4, 1e-3, 3e-3))
ARMS: dict[str, dict[str, tuple[Setting, ...]]] = {
    "black-box": {
        **dict.fromkeys(("flow-grpo", "grpo-guard", "pcpo-flow", "nft"), ZEROTH),
        **dict.fromkeys(("tempflow-grpo", "rsm-branch-sd35", "rsm-branch-sd15"), BRANCH),
    },
    "differentiable": {
        **dict.fromkeys(("vgg-flow", "adjoint-matching"), FIRST),
        **dict.fromkeys(("rsm-terminal-sd35", "rsm-terminal-sd15", "gaussian-terminal"), FIRST),
        "draft": PATHWISE,
    },
}


@dataclass(frozen=True)
class AlignStudy(StudyConfig):
    """Repeat the alignment claims: the exact mixture, then zoo:shapes-flux-small."""

    out: Path = Path("results/align")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    model: str = "zoo:shapes-flux-small"
    """The model to align; the shapes world must judge it."""
    cap: int = 120_000
    """Cost of a black-box run in forward-equivalents; half with the other reward; sweeps spend half of either."""
    mixture_cap: int = 800_000
    """Cost of a run on the mixture."""


def stages(config: AlignStudy) -> list[Stage]:
    """The sweeps, then the final runs at the settings that they chose and what is done on the mixture."""
    bench, runs = Bench(config), config.out / "runs"
    sweeps, finals = [], []
    for kind, arms in ARMS.items():
        cap = config.cap if kind == "black-box" else config.cap // 2
        for arm, sweep in arms.items():
            for setting in sweep:
                path = runs / f"{kind}_{arm}_sweep-{in_words(setting, '-', '')}.json"
                work = partial(bench.record, kind, arm, SWEEP_SEED, cap // 2, setting)
                sweeps.append([Run(arm, path, work, {"setting": setting})])
    for seed in config.seeds:
        for kind, arms in ARMS.items():
            cap = config.cap if kind == "black-box" else config.cap // 2
            for arm in arms:
                path = runs / f"{kind}_{arm}_final_seed{seed}.json"
                finals.append([Run(arm, path, partial(bench.record, kind, arm, seed, cap))])
        finals.append([Run("estimators", runs / f"estimators_seed{seed}.json", partial(estimators_record, seed))])
    for seed in config.seeds:
        for name in mixture.recipes():
            path = runs / f"mixture_{name}_final_seed{seed}.json"
            finals.append([Run(name, path, partial(mixture.train, name, seed, config.mixture_cap))])
    return [sweeps, finals]


def chosen(config: AlignStudy, kind: str, arm: str) -> Setting:
    """The setting whose sweep ended with the highest reward."""
    files = sorted((config.out / "runs").glob(f"{kind}_{arm}_sweep-*.json"))
    tried = [json.loads(file.read_text()) for file in files]
    return dict(max(tried, key=lambda record: reward_of(record["trace"][-1], kind))["setting"])


def estimators_record(seed: int) -> Record:
    """The estimator figure at abar = 0.00985 and 0.994, and the bias of the Gaussian terminal gradient."""
    return {
        "low snr": mixture.estimators(seed, 389), "high snr": mixture.estimators(seed, 12),
        "gaussian terminal": mixture.gaussian_terminal_bias(seed),
    }  # fmt: skip


class Bench:
    """One process's zoo model and judges."""

    def __init__(self, config: AlignStudy):
        self.config = config
        self.prompts = tuple(caption(c) for c in concepts() if (c.colour, c.shape) != HELD_OUT)
        self.yardstick = replace(AlignConfig.preset_of("flow-grpo", "laptop", {}), prompts=self.prompts)

    @cached_property
    def model(self) -> Model:
        return load(self.config.model)

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        world = asked.load("shapes", self.model.resolution)  # type: ignore[attr-defined]
        return {name: load_reward(name, world) for name in WATCHED}

    def record(self, kind: str, arm: str, seed: int, cap: int, setting: Setting | None = None) -> Record:
        """One run of a recipe on a reward, its probes and its last images; at its sweep's choice without a setting."""
        setting = chosen(self.config, kind, arm) if setting is None else setting
        config = replace(
            AlignConfig.preset_of(arm, "laptop", {}), prompts=self.prompts, epochs=10**6, seed=seed, **setting
        )
        trace: list[dict[str, float]] = []
        began = time.monotonic()

        def callback(step: int, log: dict[str, float]) -> str | None:
            spent = log.get("nfe", 0.0)
            if trace and spent < min(1.35 * trace[-1]["forwards"] + 1000, cap):
                return None
            trace.append({"step": step, "forwards": spent, **self.measure(seed, 10, 10)})
            return "cap" if spent >= cap else None

        broke = ""
        try:
            verb.train(ALIGN, self.model, config, Inputs(self.rewards[TRAINED[kind]]), None, callback)
        except RunError as error:  # a recipe without a trust region may leave the numbers; that is a result
            broke = str(error)
        seconds = time.monotonic() - began
        final = self.measure(seed + 50_000, 16, 28)
        self.model.remove_training()
        return {
            "kind": kind, "arm": arm, "setting": setting, "seed": seed, "seconds": seconds, "broke": broke,
            "forward_equivalents": trace[-1]["forwards"], "trace": trace, "final": final,
        }  # fmt: skip

    @torch.no_grad()
    def measure(self, seed: int, each: int, steps: int) -> dict[str, float]:
        """Every watched reward, diversity within a prompt and KL to the reference, of `each` images a caption."""
        asked = [prompt for prompt in self.prompts for _ in range(each)]
        images = sampler(self.model, steps)(asked, 70_000 + seed)
        means = {name: float(reward(images, asked).mean()) for name, reward in self.rewards.items()}
        varied = diversity(pixel_features(8)(images), asked)
        return {**means, "diversity": float(varied.mean()), "kl": sum(path_kl(self.model, self.yardstick)[0])}


STUDY = Study("align", "RSM, arXiv 2604.17415", AlignStudy, stages, tables)
