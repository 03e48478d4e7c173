"""Do the zoo's models of prompts draw what they are asked for? Judged by their worlds from pixels alone.

A run is one model at one guidance and one seed: pictures of every kind of prompt, how many are right and how many are
valid. The guidance that is reported is chosen on a seed of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from experiments.study import Claim, Record, Records, Run, Stage, Study, StudyConfig, Tables, slug, verdict
from fieldsmith.errors import InputError
from fieldsmith.measure.detection import ask
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.intervals import Interval, wilson
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.worlds.asked import Asked
from fieldsmith.worlds.emoji import KINDS, prompts
from fieldsmith.worlds.emoji_groups import UNSEEN
from fieldsmith.worlds.model_cards import world_of

STEPS = 28
PLACED = "position, never together"
AIMS = {  # of zoo:emoji-flux: claim -> what it says, the kinds that it pools, the least share
    "emoji_single_right": ("single objects", ("single object", "background"), 0.99),
    "emoji_pairs_and_counting_right": ("two objects, and two or three of one", ("two objects", "counting"), 0.97),
    "emoji_positions_right": ("left of, right of, above, below", ("position",), 0.90),
    "emoji_unseen_pairs_right": ("two objects that no training picture shows together", (UNSEEN,), 0.90),
}


@dataclass(frozen=True)
class ZooStudy(StudyConfig):
    """Judge the zoo's models of prompts, by kind of prompt."""

    out: Path = Path("results/zoo")
    """Where runs/, summary.json and README.md go; finished runs are not repeated."""
    models: tuple[str, ...] = ("zoo:emoji-flux", "zoo:emoji-flux-small", "zoo:shapes-flux", "zoo:shapes-flux-small")
    """Zoo names, or folders with a card.json; the claims are of the first."""
    guidances: tuple[float, ...] = (1.0, 1.5, 2.5, 4.0)
    """Scales of classifier-free guidance; models of shapes are asked without any."""
    each: int = 48
    """Prompts of each kind and seed, one picture each."""


def stages(config: ZooStudy) -> list[Stage]:
    """Every run. Raises InputError at a model whose world is unknown."""
    groups = []
    for model in config.models:
        arm = arm_of(model)
        scales = config.guidances if world_for(model).name == "emoji" else (1.0,)
        for seed in (*config.seeds, validation(config)):
            groups.append(
                [
                    Run(
                        arm, config.out / "runs" / f"{arm}_{scale:g}_seed{seed}.json",
                        partial(record, model, scale, seed, config.each), {"each": config.each},
                    )
                    for scale in scales
                ]
            )  # fmt: skip
    return [groups]


def arm_of(model: str) -> str:
    return slug(model.removeprefix("zoo:"))


def validation(config: ZooStudy) -> int:
    """The seed on which the guidance is chosen."""
    return max(config.seeds) + 1


def world_for(model: str) -> Asked:
    """The world that judges the model. Raises InputError where there is none."""
    world = world_of(model)
    if world is None:
        raise InputError(f"'{model}' has no card.json that names a world of prompts; give zoo models or their folders")
    return world


def scenes(world: Asked, each: int, seed: int) -> dict[str, list[Any]]:
    """What is asked of a model, by kind: different prompts for each seed in the emoji world."""
    if world.name != "emoji":
        return {kind: [c for c in found for _ in range(max(1, each // 8))] for kind, found in world.kinds().items()}
    asked = {kind: prompts(kind, each, seed + 1000) for kind in KINDS}
    asked[UNSEEN] = prompts("two objects", each, seed + 1000, held_out=True)
    asked[PLACED] = prompts("position", each, seed + 1000, held_out=True)
    return {kind: [world.parse(prompt) for prompt in found] for kind, found in asked.items()}


@cache
def loaded(model: str) -> Model:
    return load(model)


def record(model: str, scale: float, seed: int, each: int) -> Record:
    """How many pictures of each kind of prompt are right, and valid."""
    world = world_for(model)
    asked = scenes(world, each, seed)
    every = [concept for concepts in asked.values() for concept in concepts]
    judged = ask(sampler(loaded(model), STEPS, scale), world.world, every, 1, seed)
    sizes = [len(concepts) for concepts in asked.values()]
    parts = zip(asked, judged.right().split(sizes), judged.seen.valid.split(sizes), strict=True)
    kinds = {
        kind: {"right": int(right.sum()), "valid": int(valid.sum()), "n": len(right)} for kind, right, valid in parts
    }
    return {"model": model, "guidance": scale, "seed": seed, "steps": STEPS, "kinds": kinds}


def pooled(runs: list[Record], kinds: tuple[str, ...], count: str = "right") -> Interval:
    """The share of pictures of these kinds over runs, by Wilson."""
    found = [run["kinds"][kind] for run in runs for kind in kinds]
    return wilson(sum(one[count] for one in found), sum(one["n"] for one in found))


def tables(config: ZooStudy, records: Records) -> Tables:
    models, claims = [], []
    for model in config.models:
        arm = arm_of(model)
        own = [one for one in records.values() if one["model"] == model]
        scales = sorted({one["guidance"] for one in own})
        runs = {
            scale: [one for one in own if one["guidance"] == scale and one["seed"] in config.seeds] for scale in scales
        }
        kinds = tuple(own[0]["kinds"])
        best = max(
            scales,
            key=lambda scale: pooled([records[f"{arm}_{scale:g}_seed{validation(config)}"]], kinds).value,
        )
        rows = [[kind, *(pooled(runs[scale], (kind,)).short() for scale in scales)] for kind in kinds]
        rows.append(["valid", *(pooled(runs[scale], kinds, "valid").short() for scale in scales)])
        headers = ["prompts", *(f"guidance {scale:g}" for scale in scales)]
        models.append({"name": model, "scales": scales, "best": best, "rows": rows, "headers": headers})
        if model == config.models[0] and set(AIMS[next(iter(AIMS))][1]) <= set(kinds):
            for name, (words, of, aim) in AIMS.items():
                found = pooled(runs[best], of)
                claims.append(
                    Claim(
                        f"zoo.{name}",
                        f"{model}, guidance {best:g}: {words}, share of pictures that show what was asked, by "
                        f"the exact judge (aim: at least {aim:g})",
                        found, "share", verdict(found.low >= aim, found.value >= aim), None,
                    )
                )  # fmt: skip
    summary = {
        "models": {one["name"]: {"guidance": one["best"], "right": [one["headers"], *one["rows"]]} for one in models}
    }
    return Tables(claims, summary, {"models": models, "steps": STEPS, "seeds": len(config.seeds)}, {})


STUDY = Study("zoo", "", ZooStudy, stages, tables)
