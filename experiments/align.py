"""`fieldsmith reproduce align`: estimators and recipes on the exact mixture, then recipes on zoo:shapes-flux-small.

Protocol on the zoo: the half-trained model draws what a caption asks in about half of its images, so that a reward has
room. Every recipe trains on the same captions with the same adapter until it has spent the cap; a probe at equal ratios
of cost reads its reward, the rewards that it never sees, KL and diversity. Each recipe's learning rate and batch (or
temperature) is the one with the best reward at half the cap in a sweep on a seed that no result uses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments import align_mixture as mixture
from experiments.align_summary import reward_of, summarise
from fieldsmith.diagnose.concepts import sampler
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.align.config import preset
from fieldsmith.methods.align.loop import align
from fieldsmith.methods.align.measures import path_kl
from fieldsmith.metrics.distances import diversity, pixel_features
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.rewards import load as load_reward
from fieldsmith.run import write_atomically
from fieldsmith.worlds.shapes import HELD_OUT, ShapesWorld, caption, concepts

SWEEP_SEED = 100
Settings = dict[str, Any]
REWARDS = {"black-box": "right", "differentiable": "classifier"}
WATCHED = ("right", "classifier", "classifier-heldout", "valid")
# what each sweep tries: learning rate with the size of a collection, or with the temperature
ZEROTH: tuple[Settings, ...] = tuple(
    {"lr": lr, "rollouts": n} for lr, n in ((3e-4, 24), (1e-3, 24), (1e-3, 8), (3e-3, 8))
)
BRANCH: tuple[Settings, ...] = tuple(
    {"lr": lr, "rollouts": n} for lr, n in ((3e-4, 2), (1e-3, 2), (1e-3, 1), (3e-3, 1))
)
FIRST: tuple[Settings, ...] = tuple(
    {"lr": lr, "temperature": a} for lr, a in ((1e-3, 0.003), (1e-3, 0.01), (3e-3, 0.01))
)
PATHWISE: tuple[Settings, ...] = tuple({"lr": lr} for lr in (3e-4, 1e-3, 3e-3))
ARMS: dict[str, dict[str, tuple[Settings, ...]]] = {
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
class ReproduceAlign:
    """Repeat the alignment claims: the exact mixture, then zoo:shapes-flux-small."""

    out: Path = Path("results/align")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    model: str = "zoo:shapes-flux-small"
    """The model to align; the shapes world must judge it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; evaluation noise follows them."""
    cap: int = 120_000
    """Cost of a black-box run in forward-equivalents; half with the other reward; sweeps spend half of either."""
    mixture_cap: int = 800_000
    """Cost of a run on the mixture."""
    part: tuple[int, int] = (0, 1)
    """This process takes runs K, K + N, ... of the list: `--part 0 2` and `--part 1 2` share the work."""


Job = tuple[Path, Callable[[], dict[str, Any]]]


def main(config: ReproduceAlign) -> None:
    """Run what is missing, then write the summary once all of it is there."""
    if config.cap < 1 or config.mixture_cap < 1:
        raise InputError(f"cap={config.cap} and mixture_cap={config.mixture_cap} must be at least 1")
    torch.set_num_threads(1)
    bench = Bench(config)
    sweeps, finals = jobs(config, bench, sweep=True), jobs(config, bench, sweep=False)
    run(sweeps, config.part)
    while not all(path.exists() for path, _ in sweeps):
        time.sleep(5)  # another process is still sweeping its part
    run(finals, config.part)
    if all(path.exists() for path, _ in finals):
        summarise(config.out, config.seeds, f"fieldsmith reproduce align --seeds {' '.join(map(str, config.seeds))}")


def run(todo: list[Job], part: tuple[int, int]) -> None:
    for path, work in todo[part[0] :: part[1]]:
        if not path.exists():
            record = work()
            write_atomically(path, json.dumps(record, indent=1) + "\n")
            print(path.stem, flush=True)


def jobs(config: ReproduceAlign, bench: Bench, sweep: bool) -> list[Job]:
    """The runs of one stage, as (file, work)."""
    folder = config.out / "runs"
    found: list[Job] = []
    if sweep:
        for kind, arms in ARMS.items():
            for arm, settings in arms.items():
                for setting in settings:
                    path = folder / f"{kind}_{arm}_sweep-{_said(setting)}.json"
                    found.append((path, partial(bench.train, kind, arm, setting, SWEEP_SEED, _cap(config, kind) // 2)))
        return found
    for seed in config.seeds:
        for kind, arms in ARMS.items():
            for arm in arms:
                work = partial(_chosen, bench.train, folder, kind, arm, seed, _cap(config, kind))
                found.append((folder / f"{kind}_{arm}_final_seed{seed}.json", work))
        found.append((folder / f"estimators_seed{seed}.json", partial(_estimators, seed)))
    for seed in config.seeds:
        for name in mixture.recipes():
            work = partial(mixture.train, name, seed, config.mixture_cap)
            found.append((folder / f"mixture_{name}_final_seed{seed}.json", work))
    return found


def _cap(config: ReproduceAlign, kind: str) -> int:
    return config.cap if kind == "black-box" else config.cap // 2


def _said(setting: Settings) -> str:
    return "-".join(f"{key}{value:g}" for key, value in setting.items())


def _chosen(
    train: Callable[..., dict[str, Any]], folder: Path, kind: str, arm: str, seed: int, cap: int
) -> dict[str, Any]:
    """A final run at the setting whose sweep ended with the highest reward."""
    tried = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}_{arm}_sweep-*.json"))]
    best = max(tried, key=lambda record: reward_of(record["trace"][-1], kind))
    return train(kind, arm, best["setting"], seed, cap)


def _estimators(seed: int) -> dict[str, Any]:
    """The estimator figure at abar = 0.00985 and 0.994, and the bias of the Gaussian terminal gradient."""
    return {
        "low snr": mixture.estimators(seed, 389), "high snr": mixture.estimators(seed, 12),
        "gaussian terminal": mixture.gaussian_terminal_bias(seed),
    }  # fmt: skip


class Bench:
    """One process's zoo model and judges."""

    def __init__(self, config: ReproduceAlign):
        self.model: Model = load(config.model)
        self.world = ShapesWorld(self.model.resolution)  # type: ignore[attr-defined]
        self.rewards = {name: load_reward(name, self.world) for name in WATCHED}
        self.prompts = tuple(caption(c) for c in concepts() if (c.colour, c.shape) != HELD_OUT)
        self.yardstick = replace(preset("flow-grpo"), prompts=self.prompts)

    def train(self, kind: str, arm: str, setting: Settings, seed: int, cap: int) -> dict[str, Any]:
        """One run of a recipe on a reward, its probes and its last images."""
        config = replace(preset(arm), prompts=self.prompts, epochs=10**6, seed=seed, **setting)
        trace: list[dict[str, float]] = []
        began = time.monotonic()

        def callback(step: int, log: dict[str, float]) -> str | None:
            spent = log.get("forwards", 0.0)
            if trace and spent < min(1.35 * trace[-1]["forwards"] + 1000, cap):
                return None
            trace.append({"step": step, "forwards": spent, **self.measure(seed, 10, 10)})
            return "cap" if spent >= cap else None

        broke = ""
        try:
            align(self.model, config, self.rewards[REWARDS[kind]], None, callback)
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
        found = {name: float(reward(images, asked).mean()) for name, reward in self.rewards.items()}
        varied = diversity(pixel_features(8)(images), asked)
        return {**found, "diversity": float(varied.mean()), "kl": sum(path_kl(self.model, self.yardstick)[0])}
