"""GEM and every baseline on zoo:shapes-flux, at equal erasure and equal largest cost.

Every run trains until a probe of 32 plain target prompts shows the concept in none, or until the cost cap. So methods
meet at (nearly) equal erasure, and what differs is what else broke and what it cost. Each arm's setting is the cheapest
within a hundredth of the best composite of a small sweep, on one concept and a seed that no result uses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from experiments.erase.tables import choice, tables
from experiments.study import Record, Run, Stage, Study, StudyConfig, in_words
from fieldsmith import verb
from fieldsmith.measure import attacks
from fieldsmith.measure.detection import Asked, ask_groups, detected, erasure
from fieldsmith.measure.drawing import sampler
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.pairs import encoded
from fieldsmith.methods.erase.step import Inputs, Projected
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.run import plain
from fieldsmith.worlds.shapes import COLOURS, SHAPES, Concept, ShapesWorld, caption, parse
from fieldsmith.worlds.shapes_groups import groups, paraphrases

SWEEP_SEED = 100
ANCHORS = {"triangle": "circle", "red": "blue", "red triangle": "red circle"}
PROBE = 32  # images per probe
SHOWN = ("lambda", "active", "drift", "loss", "d_plus", "d_minus")  # of a step's log, in the trace

Setting = dict[str, float]
# the iterative arms' sweep: the number of steps decides an erasure, so a batch of 1 (as published) can be far cheaper
SWEEP: tuple[Setting, ...] = tuple({"lr": lr, "batch": batch} for batch in (1, 8) for lr in (1e-3, 3e-3, 1e-2))


@dataclass(frozen=True)
class Arm:
    """A method, what it changes of its preset, what its sweep tries; `like`: the arm whose setting it takes instead."""

    method: str
    changes: dict[str, Any]
    sweep: tuple[Setting, ...] = ()
    like: str = ""


# All train the same layers, where text enters, but for the paper's own choice (q and k of the dual-stream blocks),
# which is swept to show what it does on a model this small.
ARMS = {
    "gem": Arm("gem", {}, SWEEP),
    "gem+margin+retain": Arm("gem", {"margin": 1.0, "retain": 3.0}, SWEEP),
    "esd": Arm("esd", {}, SWEEP),
    "concept-ablation": Arm("concept-ablation", {}, SWEEP),
    "eraseflow": Arm("eraseflow", {}, SWEEP),
    "eraseanything": Arm("eraseanything", {}, SWEEP),
    "uce": Arm("uce", {}, tuple({"uce_lambda": x} for x in (0.01, 0.1, 0.5))),
    "projection": Arm("projection", {}, ({},)),  # has nothing to set
    "gem, q and k": Arm("gem", {"subset": "qk_dual"}, tuple({"lr": lr, "batch": 8} for lr in (3e-4, 1e-3, 3e-3))),
    "gem+margin": Arm("gem", {"margin": 1.0}, like="gem"),
    "gem+retain": Arm("gem", {"retain": 3.0}, like="gem"),
}
SWEPT_ONLY = "gem, q and k"


@dataclass(frozen=True)
class EraseStudy(StudyConfig):
    """Repeat the erasure claims on zoo:shapes-flux."""

    out: Path = Path("results/erase")
    """Where runs/, summary.json, plots and README.md go; finished runs are not repeated."""
    model: str = "zoo:shapes-flux"
    """The model to erase from."""
    cap: int = 25_000
    """Largest cost of a run in forward-equivalents."""
    images: int = 16
    """Images per prompt in the final evaluation."""


def stages(config: EraseStudy) -> list[Stage]:
    """The sweeps, then the final runs at the settings that they chose."""
    bench, sweeps, finals = Bench(config), [], []
    for name, arm in ARMS.items():
        for setting in arm.sweep:
            work = partial(bench.record, name, "triangle", SWEEP_SEED, setting)
            sweeps.append([Run(name, _file(config, name, "triangle", SWEEP_SEED, setting), work, {"setting": setting})])
    for concept in ANCHORS:
        for seed in config.seeds:
            for name, arm in ARMS.items():
                if name != SWEPT_ONLY and (concept == "triangle" or not arm.like):
                    work = partial(bench.record, name, concept, seed)
                    finals.append([Run(name, _file(config, name, concept, seed), work)])
    return [sweeps, finals]


def _file(config: EraseStudy, arm: str, concept: str, seed: int, setting: Setting | None = None) -> Path:
    kind = "final" if setting is None else f"sweep-{in_words(setting, '-', '')}"
    name = f"{concept}_{arm}_{kind}_seed{seed}.json".replace(", ", "-").replace(" ", "-")
    return config.out / "runs" / name


def chosen(config: EraseStudy, arm: str) -> Setting:
    """The swept setting that the arm's final runs take."""
    files = [_file(config, arm, "triangle", SWEEP_SEED, setting) for setting in ARMS[arm].sweep]
    return dict(choice([json.loads(file.read_text()) for file in files])["setting"])


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
    """One process's model, with the base's images of the last concept and seed."""

    def __init__(self, config: EraseStudy):
        self.config = config
        self.base: dict[tuple[str, int, int], dict[str, Asked]] = {}

    @cached_property
    def model(self) -> Model:
        return load(self.config.model)

    @cached_property
    def world(self) -> ShapesWorld:
        return ShapesWorld(self.model.resolution)  # type: ignore[attr-defined]

    def settings(self, name: str, concept: str, seed: int, setting: Setting) -> EraseConfig:
        arm, pairs = ARMS[name], training_pairs(parse(concept), parse(ANCHORS[concept]))
        fixed: dict[str, Any] = {**arm.changes, **setting}
        if "batch" in fixed:
            fixed["batch"] = int(fixed["batch"])
        return EraseConfig.preset_of("tiny", None, {"method": arm.method}).replace(
            targets=tuple(t for t, _ in pairs), anchors=tuple(a for _, a in pairs), keep=kept_prompts(parse(concept)),
            model=self.config.model, seed=seed, budget=10**9, **fixed,
        )  # fmt: skip

    def record(self, name: str, concept: str, seed: int, setting: Setting | None = None) -> Record:
        """Train and judge: briefly at a sweep's `setting`; in full, with attacks, at the chosen one (None)."""
        sweep, target, arm = setting is not None, parse(concept), ARMS[name]
        setting = chosen(self.config, arm.like or name) if setting is None else setting
        settings = self.settings(name, concept, seed, setting)
        trace: list[dict[str, float]] = []
        began = time.monotonic()
        _, result = verb.train(ERASE, self.model, settings, Inputs(), None, self.probe(target, trace))
        trained = time.monotonic() - began
        pairs = encoded(self.model, settings.pairs)
        projected: Any = Projected(self.model, settings, pairs) if arm.method == "projection" else self.model
        draw, images = sampler(projected), 8 if sweep else self.config.images
        before = self.before(concept, target, seed, images)
        after = ask_groups(draw, self.world, groups(target), images, 10_000 + seed)
        change = erasure(before, after, target)
        record: Record = {
            "arm": name, "concept": concept, "seed": seed, "setting": setting,
            "forward_equivalents": result.nfe, "seconds": trained, "steps": result.steps,
            "stopped": result.stopped, "trace": trace, "evaluation": change.to_json(),
            "settings": plain(asdict(settings)),
        }  # fmt: skip
        if not sweep:
            words = detected(draw, self.world, target, paraphrases(target), 8, 20_000 + seed)
            record["paraphrases"] = asdict(words)
            if concept == "triangle" and arm.method != "projection":
                record["attacks"] = attacks.battery(self.model, self.world, target, groups(target)["target"], seed)
        self.model.remove_training()
        return record

    def before(self, concept: str, target: Concept, seed: int, images: int) -> dict[str, Asked]:
        key = (concept, seed, images)
        if key not in self.base:
            self.base.clear()
            with self.model.reference():
                self.base[key] = ask_groups(sampler(self.model), self.world, groups(target), images, 10_000 + seed)
        return self.base[key]

    def probe(self, target: Concept, trace: list[dict[str, float]]) -> Callable[[int, dict[str, float]], str | None]:
        """At equal ratios of cost, so that ratios of cost are known equally well; also when a run is to end."""
        prompts = [caption(concept) for concept in groups(target)["target"]]
        each = -(-PROBE // len(prompts))

        def callback(step: int, log: dict[str, float]) -> str | None:
            spent = log.get("nfe", 0.0)
            if trace and spent < min(1.15 * trace[-1]["forwards"] + 150, self.config.cap):
                return None
            seen = detected(sampler(self.model), self.world, target, prompts, each, 30_000)
            shown = {key: round(value, 5) for key, value in log.items() if key in SHOWN}
            trace.append({"step": step, "forwards": spent, "detected": seen.value, **shown})
            if seen.value == 0:
                return "erased"
            return "cost cap" if spent >= self.config.cap else None

        return callback


STUDY = Study("erase", "GEM, arXiv 2606.00140", EraseStudy, stages, tables)
