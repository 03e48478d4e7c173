"""The hallucination study on images whose rules are known: columns of shapes, hands of cards, chess positions.

One base a seed is trained from nothing. Every arm goes on from it for as many updates, with equal batches and noise, so
that arms are paired; 'plain' goes on as it began and is what all are held against. Sampling-time arms use its weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

from experiments.oracles.chess import ChessWorld
from experiments.oracles.likelihood import feature_likelihood
from experiments.sharpen.hallucination import threshold
from experiments.sharpen.laplacian import laplacian
from experiments.sharpen.training import Settings, Trained, fit, of_verb
from experiments.study import Record
from experiments.zoo.judged_ddpm import JudgedDDPM, untrained
from fieldsmith.measure.classifier import Classifier, train_classifier
from fieldsmith.measure.distances import frechet_distance, precision_recall
from fieldsmith.measure.hallucination import auroc, coverage
from fieldsmith.measure.smoothness import SharpestJacobian, TrajectoryVariance
from fieldsmith.methods.sharpen.config import NEEDS_HEAD
from fieldsmith.methods.sharpen.sampling import field_of, steered
from fieldsmith.models.shrink import shrink
from fieldsmith.models.unet import UNet
from fieldsmith.models.variance_head import with_variance_head
from fieldsmith.samplers import Field, Variance, ancestral
from fieldsmith.worlds.catalogue import load
from fieldsmith.worlds.judged import JudgedWorld

POOL = 20_000  # training images
REAL = 2_000  # images that distances are measured to, none of them trained on
LEVEL = 0.2  # share of valid images that a filter may throw away


@dataclass(frozen=True)
class ImageStudy:
    """A world at a size that trains here, and for how long."""

    name: str
    size: int
    fold: int
    widths: tuple[int, ...]
    steps: int  # of the base
    more: int  # of every arm
    lr: float = 3e-3
    batch: int = 32
    images: int = 400
    sampler_steps: int = 30
    plies: tuple[int, int] | None = None  # of chess games: openings alone, since whole games do not train here


STUDIES = {
    "columns": ImageStudy("columns", 64, 4, (16, 32), 3_000, 200),
    "cards": ImageStudy("cards", 32, 4, (32, 64), 1_600, 150, images=250),
    "chess": ImageStudy("chess", 64, 8, (32, 64), 1_500, 150, images=250, plies=(1, 4)),
}

# what differs from plain DDPM; `of`: another arm's weights, sampled otherwise
ARMS: dict[str, Settings] = {
    "plain": {},
    "twice the updates": {"times more": 2.0},
    "variance learning": {"method": "variance-learning"},
    "VSM 0.1": {"method": "variance-penalty", "strength": 0.1},
    "VSM 10000": {"method": "variance-penalty", "strength": 1e4},
    "jacobian-floor 0.01": {"method": "jacobian-floor", "strength": 0.01},
    "jacobian-match 0.01": {"method": "jacobian-match", "strength": 0.01},
    "input perturbation 0.1": {"perturbation": 0.1},
    "neighbours": {"method": "neighbours", "bank": 1024},
    "a quarter more steps": {"of": "plain", "times steps": 1.26},
    "laplacian 0.02": {"of": "plain", "laplacian": 0.02},
    "trajectory filter": {"of": "plain", "filter": "variance"},
    "Jacobian filter": {"of": "plain", "filter": "jacobian"},
    "steered 1.5": {"of": "plain", "scale": 1.5},
    "steered 2": {"of": "plain", "scale": 2.0},
}

# on the first world alone: controls of what steering costs, and what did not help there
FIRST_ONLY = ("twice the updates", "a quarter more steps", "neighbours", "Jacobian filter")


class Bench:
    """What all seeds of a world share: images, the judge, features of real images."""

    def __init__(self, study: ImageStudy):
        self.study = study

    @cached_property
    def world(self) -> JudgedWorld:
        if self.study.plies:
            return ChessWorld(self.study.size, self.study.plies)
        return load(self.study.name, self.study.size)

    @cached_property
    def pool(self) -> Tensor:
        return self.world.sample(POOL, 0)

    @cached_property
    def features(self) -> Classifier:
        images = self.pool[:4_000]
        return train_classifier(_small(images), self._labels(images), self.study.name, steps=300, batch=64)

    def seen(self, images: Tensor) -> Tensor:
        """Features of images, of which the classifier sees 32 pixels a side."""
        return self.features(_small(images))

    def _labels(self, images: Tensor) -> Tensor:
        """What the classifier learns to tell apart: patterns, the first card, the number of pieces in eights."""
        contents = self.world.judge(images).contents
        if self.study.name == "columns":
            return torch.tensor([sum(2**k for k in range(3) if c[k]) for c in contents])  # type: ignore[index]
        if self.study.name == "cards":
            return torch.tensor([c[0] for c in contents])  # type: ignore[index]
        return torch.tensor([sum(x.isalpha() for x in str(c)) // 8 for c in contents])

    @cached_property
    def real(self) -> Tensor:
        return self.seen(self.world.sample(REAL, 1))

    @cached_property
    def trained_on(self) -> Tensor:
        return self.seen(self.pool[:REAL])


@cache
def bench(world: str) -> Bench:
    return Bench(STUDIES[world])


def _small(images: Tensor) -> Tensor:
    return avg_pool2d(images.nan_to_num(0.0), max(1, images.shape[-1] // 32))


class Seed:
    """All arms of one seed."""

    def __init__(self, bench: Bench, seed: int, cache: Path):
        self.bench, self.study, self.seed, self.cache = bench, bench.study, seed, cache
        self._plain: Trained | None = None

    def fresh(self) -> UNet:
        study = self.study
        recipe = JudgedDDPM(study.name, study.size, study.fold, study.widths, study.name != "columns", seed=self.seed)
        return untrained(self.bench.world, recipe, learned_variance=False)

    def fit(self, model: Any, steps: int, seed: int, **own: Any) -> Trained:
        """Train a model in place and let go of its former weights."""
        shared = {"batch": self.study.batch, "lr": self.study.lr, "min_snr": 5.0, "ema": 0.995}
        trained = fit(model, model.encode_images(self.bench.pool), steps=steps, seed=seed, **{**shared, **own})
        model._base = {}
        return trained

    @cached_property
    def base(self) -> Trained:
        return self._once("base", self.fresh(), self.study.steps)

    @cached_property
    def worse(self) -> Trained:
        return self._once("worse", shrink(self.fresh(), 4.0, seed=self.seed), self.study.steps // 4)

    def _once(self, name: str, model: Any, steps: int) -> Trained:
        """A network from nothing, kept on disk for a run that is taken up again."""
        marks = hashlib.sha256(json.dumps([asdict(self.study), self.seed, name, steps]).encode()).hexdigest()[:8]
        file = self.cache / f"{self.study.name}-{name}-{self.seed}-{marks}.safetensors"
        if file.exists():
            model.network.load_state_dict(load_file(file))
            return Trained(model, 0.0, 0, None)
        trained = self.fit(model, steps, self.seed, warmup=100)
        self.cache.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        save_file({k: v.contiguous() for k, v in model.network.state_dict().items()}, beside)
        os.replace(beside, file)
        return trained

    def trained(self, arm: str) -> Trained:
        if arm == "plain" and self._plain:
            return self._plain
        settings = ARMS[arm]
        own = of_verb(settings)
        model: Any = copy.deepcopy(self.base.model)
        if own.get("method") in NEEDS_HEAD:
            model = with_variance_head(model)
        steps = round(self.study.more * settings.get("times more", 1.0))
        trained = self.fit(model, steps, 1_000 + self.seed, lr=self.study.lr / 4, **own)
        if arm == "plain":
            self._plain = trained
        return trained

    def record(self, arm: str) -> Record:
        began = time.monotonic()
        settings = ARMS[arm]
        trained = self.trained(settings.get("of", arm))
        record: Record = {
            "world": self.study.name, "arm": arm, "seed": self.seed, "settings": settings,
            "training seconds": trained.seconds, "forward_equivalents": trained.forwards, "share": trained.share,
            "parameters": sum(p.numel() for p in trained.model.network.parameters()),
        }  # fmt: skip
        field, evaluations = self.field(trained, settings)
        learned = getattr(trained.model, "learns_variance", False)
        variance: Variance = "learned" if learned else "small"
        if "filter" in settings:
            images, cost, more = self.filtered(trained, settings["filter"])
            record |= more
            evaluations = cost
        else:
            images = self.images(trained, field, variance, more=settings.get("times steps", 1.0))
        record |= self.measured(images) | {"evaluations a step": evaluations}
        if arm == "variance learning":
            kinds: tuple[Variance, ...] = ("small", "large")
            record["swap"] = {
                kind: float(1 - self.bench.world.judge(self.images(trained, field, kind)).valid.double().mean())
                for kind in kinds
            }
        return record | {"seconds": time.monotonic() - began}

    def field(self, trained: Trained, settings: Settings) -> tuple[Field, float]:
        """How the arm is sampled, and what a step costs in forwards of its network."""
        field = field_of(trained.model)
        if "laplacian" in settings:
            return laplacian(field, settings["laplacian"], torch.Generator().manual_seed(self.seed)), 3.0
        if "scale" in settings:
            small = sum(p.numel() for p in self.worse.model.network.parameters())
            own = sum(p.numel() for p in trained.model.network.parameters())
            return steered(field, field_of(self.worse.model), settings["scale"]), 1 + small / own
        return field, settings.get("times steps", 1.0)

    @torch.no_grad()
    def images(
        self, trained: Trained, field: Field, variance: Variance = "small", n: int | None = None, seed: int = 0,
        watches: list[Any] | None = None, more: float = 1.0,
    ) -> Tensor:  # fmt: skip
        model, generator = trained.model, torch.Generator().manual_seed(50_000 + 1_000 * seed + self.seed)
        batches: list[Tensor] = []
        for part in torch.arange(n or self.study.images).split(250):
            watch = watches[len(batches)] if watches else None
            x = model.noise(len(part), generator)
            grid = model.grid(round(more * self.study.sampler_steps))
            batches.append(model.decode(ancestral(field, x, grid, generator, variance, model.clip, watch)))
        return torch.cat(batches)

    def measured(self, images: Tensor) -> Record:
        """Rules, fidelity, diversity, novelty."""
        world, judged = self.bench.world, self.bench.world.judge(images)
        features = self.bench.seen(images)
        contents = [c for c, good in zip(judged.contents, judged.valid.tolist(), strict=True) if good]
        reach = precision_recall(self.bench.real, features)
        generator = torch.Generator().manual_seed(0)
        numbers: Record = {
            "flags": "".join("01"[not good] for good in judged.valid.tolist()),
            "unreadable": float(1 - judged.readable.double().mean()),
            "rate": float(1 - judged.valid.double().mean()), "images": len(images),
            "distance": frechet_distance(features, self.bench.real),
            "precision": reach.precision, "recall": reach.recall,
            "fld": feature_likelihood(self.bench.trained_on, self.bench.real, features, generator).value,
            "reasons": tally(judged.reasons),
        }  # fmt: skip
        if contents and world.support:
            numbers["coverage"] = coverage(contents, world.support).relative
        if contents:
            numbers["different"] = len(set(contents)) / len(contents)
            numbers["novel"] = sum(world.novel(c) for c in contents) / len(contents)
        return numbers

    def watchers(self, trained: Trained, kind: str, n: int) -> list[Any]:
        steps = self.study.sampler_steps
        if kind == "variance":
            return [TrajectoryVariance(steps, 0.5, 1.0) for _ in range(0, n, 250)]
        generator, field = torch.Generator().manual_seed(self.seed), field_of(trained.model)
        return [SharpestJacobian(field, steps, 0.5, 0.8, generator, norm="frobenius") for _ in range(0, n, 250)]

    def filtered(self, trained: Trained, kind: str) -> tuple[Tensor, float, Record]:
        """As many images as any arm, chosen among twice as many by a threshold that other valid samples set."""
        n, world = self.study.images, self.bench.world
        watches = self.watchers(trained, kind, n)
        others = self.images(trained, field_of(trained.model), seed=1, watches=watches)
        valid = world.judge(others).valid
        scores = torch.cat([w.scores for w in watches])
        watches = self.watchers(trained, kind, 2 * n)
        images = self.images(trained, field_of(trained.model), n=2 * n, watches=watches)
        own = torch.cat([w.scores for w in watches])
        bad = ~world.judge(images).valid
        separation = {} if bool(bad.all()) or not bool(bad.any()) else {"auroc": auroc(own, bad)}
        if int(valid.sum()) < 10:
            return images[:n], 1.0, separation
        kept = own <= threshold(scores[valid], LEVEL)
        share = max(float(kept.double().mean()), 1 / len(kept))
        product = 1.0 + 0.3 * 4 if kind == "jacobian" else 1.0  # in 0.3 of the steps a product, of about 4 forwards
        return images[kept][:n], product / share, separation | {"kept": share}


def tally(reasons: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    """How often each of the commonest reasons was given, places left out."""
    counts: dict[str, int] = {}
    for words in reasons:
        for word in set(words):
            counts[word] = counts.get(word, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:6])
