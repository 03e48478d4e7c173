"""`fieldsmith reproduce erase`: GEM and every baseline on zoo:shapes-flux, at equal erasure and equal largest cost.

Protocol: every run trains until a probe of 32 plain target prompts shows the concept in none, or until the cost cap.
So methods meet at (nearly) equal erasure, and what differs is what else broke and what it cost. Each arm's setting is
the cheapest within a hundredth of the best composite
of a small sweep, on one concept and a seed that no result uses.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.erase_summary import choice, summarise
from fieldsmith.diagnose import attacks
from fieldsmith.diagnose.concepts import (
    Asked,
    Sampler,
    ask_groups,
    detected,
    erasure,
    groups,
    paraphrases,
    plain_prompts,
    sampler,
)
from fieldsmith.errors import InputError
from fieldsmith.methods.erase import loop
from fieldsmith.methods.erase.config import preset
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.run import plain, write_atomically
from fieldsmith.worlds.shapes import COLOURS, SHAPES, Concept, ShapesWorld, caption, parse

SWEEP_SEED = 100
ANCHORS = {"triangle": "circle", "red": "blue", "red triangle": "red circle"}
PROBE = 32  # images per probe

Settings = dict[str, float]
# the iterative arms' sweep: the number of steps decides an erasure, so a batch of 1 (as published) can be far cheaper
SWEEP: tuple[Settings, ...] = tuple({"lr": lr, "batch": batch} for batch in (1, 8) for lr in (1e-3, 3e-3, 1e-2))
# arm -> (method, what it changes, what its sweep tries). All train the same layers, where text enters, but for the
# paper's own choice (q and k of the dual-stream blocks), which is swept to show what it does on a model this small.
ARMS: dict[str, tuple[str, dict[str, Any], tuple[Settings, ...]]] = {
    "gem": ("gem", {}, SWEEP),
    "gem+margin+retain": ("gem", {"margin": 1.0, "retain": 3.0}, SWEEP),
    "esd": ("esd", {}, SWEEP),
    "concept-ablation": ("concept-ablation", {}, SWEEP),
    "eraseflow": ("eraseflow", {}, SWEEP),
    "eraseanything": ("eraseanything", {}, SWEEP),
    "uce": ("uce", {}, tuple({"uce_lambda": x} for x in (0.01, 0.1, 0.5))),
    "projection": ("projection", {}, ({},)),  # has nothing to set
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "gem+margin": {"margin": 1.0},
    "gem+retain": {"retain": 3.0},
}  # at gem's setting
QK = "gem, q and k"
ARMS[QK] = ("gem", {"subset": "qk_dual"}, tuple({"lr": lr, "batch": 8} for lr in (3e-4, 1e-3, 3e-3)))


@dataclass(frozen=True)
class ReproduceErase:
    """Repeat the erasure claims on zoo:shapes-flux."""

    out: Path = Path("results/erase")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    model: str = "zoo:shapes-flux"
    """The model to erase from."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; evaluation noise follows them."""
    cap: int = 25_000
    """Largest cost of a run in forward-equivalents."""
    images: int = 16
    """Images per prompt in the final evaluation."""
    part: tuple[int, int] = (0, 1)
    """This process takes runs K, K + N, ... of the list: `--part 0 2` and `--part 1 2` share the work."""


def main(config: ReproduceErase) -> None:
    """Run what is missing, then write the summary (once all of it is there)."""
    if config.images < 1 or config.cap < 1:
        raise InputError(f"images={config.images} and cap={config.cap} must be at least 1")
    torch.set_num_threads(1)
    bench = Bench(config)
    tries = [(arm, setting) for arm in ARMS for setting in ARMS[arm][2]]
    for arm, setting in tries[config.part[0] :: config.part[1]]:
        bench.run(arm, "triangle", SWEEP_SEED, setting, sweep=True)
    while not all(_file(config, arm, "triangle", SWEEP_SEED, setting).exists() for arm, setting in tries):
        time.sleep(5)  # another process is still sweeping its part
    jobs = [
        (concept, seed, arm)
        for concept in ANCHORS
        for seed in config.seeds
        for arm in (*ARMS, *ABLATIONS)
        if arm != QK and (concept == "triangle" or arm not in ABLATIONS)
    ]
    for concept, seed, arm in jobs[config.part[0] :: config.part[1]]:
        bench.run(arm, concept, seed, chosen(config, "gem" if arm in ABLATIONS else arm), sweep=False)
    if all(_file(config, arm, concept, seed, None).exists() for concept, seed, arm in jobs):
        summarise(config.out, config.seeds, f"fieldsmith reproduce erase --seeds {' '.join(map(str, config.seeds))}")


def chosen(config: ReproduceErase, arm: str) -> Settings:
    """The cheapest swept setting whose composite is within a hundredth of the best."""
    runs = [json.loads(_file(config, arm, "triangle", SWEEP_SEED, s).read_text()) for s in ARMS[arm][2]]
    return dict(choice(runs)["setting"])


def _file(config: ReproduceErase, arm: str, concept: str, seed: int, setting: Settings | None) -> Path:
    said = "-".join(f"{key}{value:g}" for key, value in (setting or {}).items())
    kind = "final" if setting is None else f"sweep-{said}"
    name = f"{concept}_{arm}_{kind}_seed{seed}.json".replace(", ", "-").replace(" ", "-")
    return config.out / "runs" / name


def training_pairs(target: Concept, anchor: Concept) -> list[tuple[str, str]]:
    """The bare concept and each plain caption of it, with the anchor's words in the target's place."""
    pairs = [(str(target), str(anchor))]
    for shown in groups(target)["target"]:
        pairs.append((caption(shown), caption(Concept(anchor.colour or shown.colour, anchor.shape or shown.shape))))
    return list(dict.fromkeys(pairs))


def kept_prompts(target: Concept) -> tuple[str, ...]:
    """Prompts to keep that no evaluation uses: each other colour or shape alone, and the empty prompt."""
    colours = [caption(Concept(colour)) for colour in COLOURS if colour != target.colour or target.shape]
    shapes = [caption(Concept(shape=shape)) for shape in SHAPES if shape != target.shape or target.colour]
    return (*colours, *shapes, "")


class Bench:
    """One process's model, with the base's images cached per concept and seed."""

    def __init__(self, config: ReproduceErase):
        self.config = config
        self.model: Model = load(config.model)
        self.world = ShapesWorld(self.model.resolution)  # type: ignore[attr-defined]
        self.base: dict[tuple[str, int, int], dict[str, Asked]] = {}

    def run(self, arm: str, concept: str, seed: int, setting: Settings, sweep: bool) -> None:
        """Train, judge and write one run, unless its file is there."""
        path = _file(self.config, arm, concept, seed, setting if sweep else None)
        if path.exists():
            return
        method, changes = ("gem", ABLATIONS[arm]) if arm in ABLATIONS else ARMS[arm][:2]
        target, anchor = parse(concept), parse(ANCHORS[concept])
        pairs = training_pairs(target, anchor)
        fixed: dict[str, Any] = {**changes, **setting}
        if "batch" in fixed:
            fixed["batch"] = int(fixed["batch"])
        settings = replace(
            preset("tiny", method), targets=tuple(t for t, _ in pairs), anchors=tuple(a for _, a in pairs),
            keep=kept_prompts(target), model=self.config.model, seed=seed, budget=10**9, **fixed,
        )  # fmt: skip
        trace: list[dict[str, float]] = []
        began = time.monotonic()
        result = loop.erase(self.model, settings, None, self._probe(target, trace))
        trained = time.monotonic() - began
        images = 8 if sweep else self.config.images
        draw: Sampler = sampler(self.model)
        if method == "projection":
            draw = sampler(loop.Projected(self.model, settings))  # type: ignore[arg-type]
        found = erasure(self._before(concept, target, seed, images), draw, self.world, target, images, 10_000 + seed)
        record: dict[str, Any] = {
            "arm": arm, "concept": concept, "seed": seed, "setting": setting,
            "forward_equivalents": result.forward_equivalents, "seconds": trained, "steps": result.steps,
            "stopped": result.stopped, "trace": trace, "evaluation": found.to_json(),
            "settings": plain(asdict(settings)),
        }  # fmt: skip
        if not sweep:
            words = detected(draw, self.world, target, paraphrases(target), 8, 20_000 + seed)
            record["paraphrases"] = asdict(words)
            if concept == "triangle" and method != "projection":
                record["attacks"] = attacks.battery(self.model, self.world, target, seed)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        self.model.remove_training()
        print(f"{path.stem}: {json.dumps({k: round(v.value, 3) for k, v in found.numbers.items()})}", flush=True)

    def _before(self, concept: str, target: Concept, seed: int, images: int) -> dict[str, Asked]:
        key = (concept, seed, images)
        if key not in self.base:
            self.base.clear()
            with self.model.reference():
                self.base[key] = ask_groups(sampler(self.model), self.world, groups(target), images, 10_000 + seed)
        return self.base[key]

    def _probe(self, target: Concept, trace: list[dict[str, float]]) -> loop.Callback:
        prompts = plain_prompts(target)
        each = -(-PROBE // len(prompts))

        def callback(step: int, log: dict[str, float]) -> str | None:
            spent = log.get("forwards", 0.0)
            if trace and spent < min(1.15 * trace[-1]["forwards"] + 150, self.config.cap):
                return None  # probes at equal ratios of cost, so that ratios of cost are known equally well
            seen = detected(sampler(self.model), self.world, target, prompts, each, 30_000)
            trace.append({"step": step, "forwards": spent, "detected": seen.value, **_finite(log)})
            if seen.value == 0:
                return "erased"
            return "cost cap" if spent >= self.config.cap else None

        return callback


def _finite(log: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 5) for k, v in log.items() if k in ("lambda", "active", "drift", "loss", "d_plus", "d_minus")}
