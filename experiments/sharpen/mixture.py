"""The hallucination study on mixtures whose exact score is known: three modes on a line, 25 on a lattice.

Every arm is trained from nothing; within a seed all share data, start, batches and noise. On the line the generated law
is pushed forward exactly; on the lattice it is sampled. Sampling-time arms use the weights of 'plain'.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from experiments.oracles.perceptron import Head, Perceptron
from experiments.oracles.pushforward import Mass, gap_mass, last_steps, posterior_covariance, push_forward, wide_linear
from experiments.oracles.pushforward import smoothed_score_field as smoothed
from experiments.sharpen.claims import INDICES
from experiments.sharpen.laplacian import laplacian
from experiments.sharpen.training import Settings, Trained, fit, of_verb
from experiments.study import Record
from fieldsmith.methods.sharpen.config import NEEDS_HEAD
from fieldsmith.methods.sharpen.sampling import field_of, steered
from fieldsmith.models.jacobians import jvp
from fieldsmith.paths import VariancePreserving
from fieldsmith.samplers import Field, Variance, ancestral
from fieldsmith.worlds.mixtures import NOWHERE, Mixture, lattice, line

PREFIX = 300  # of the schedule's 1000 times: what lies beyond is N(0, I) to 1e-4
BEYOND = 6.0  # deviations
HEADS: Settings = {"method": "variance-learning"}

# what differs from plain DDPM; `points` of data, `of`: another arm's weights, sampled otherwise
ARMS: dict[str, Settings] = {
    "plain": {},
    "L2 0.005": {"l2": 0.005},
    "10k points": {"points": 10_000},
    "25k points": {"points": 25_000},
    "variance learning": HEADS,
    "VSM 0.005": {"method": "variance-penalty", "strength": 0.005},
    "VSM 0.01": {"method": "variance-penalty", "strength": 0.01},
    "VSM 0.1": {"method": "variance-penalty", "strength": 0.1},
    "VSM 1000": {"method": "variance-penalty", "strength": 1000.0},
    "jacobian-floor 0.01": {"method": "jacobian-floor", "strength": 0.01, "probes": 0.5},
    "jacobian-match 0.01": {"method": "jacobian-match", "strength": 0.01, "probes": 0.5},
    "input perturbation 0.1": {"perturbation": 0.1},
    "neighbours, off path": {"method": "neighbours", "bank": 2048, "off_path": 0.5},
    "laplacian 0.05": {"of": "plain", "laplacian": 0.05},
    "steered 2": {"of": "plain", "scale": 2.0},
}
PLANE = (
    "plain", "variance learning", "VSM 0.1", "jacobian-floor 0.01", "jacobian-match 0.01", "input perturbation 0.1",
    "neighbours, off path", "steered 2",
)  # fmt: skip
CURVES = ("plain", "L2 0.005", "VSM 0.1", "jacobian-floor 0.01", "neighbours, off path")  # whose scores are drawn


@dataclass(frozen=True)
class Study:
    """One mixture, and how long its networks train."""

    name: str
    steps: int
    width: int
    batch: int = 256
    points: int = 50_000
    chains: int = 20_000

    @cached_property
    def mixture(self) -> Mixture:
        return line() if self.name == "line" else lattice()

    @cached_property
    def path(self) -> VariancePreserving:
        return VariancePreserving(wide_linear().alphas_cumprod[:PREFIX])

    @cached_property
    def times(self) -> Tensor:
        return last_steps(self.path, PREFIX)

    @cached_property
    def exact(self) -> bool:
        return self.mixture.means.shape[1] == 1

    @cached_property
    def axis(self) -> Tensor:
        return torch.linspace(-5, 5.5, 841, dtype=torch.float64)


LINE = Study("line", steps=1_000, width=64)
LATTICE = Study("lattice", steps=1_000, width=64, points=100_000, chains=10_000)
STUDIES = {"line": LINE, "lattice": LATTICE}


def train(study: Study, settings: Settings, seed: int, steps: int | None = None, width: int | None = None) -> Trained:
    """A network of the study under these settings."""
    points = settings.get("points", study.points)
    data = study.mixture.sample(study.points, torch.Generator().manual_seed(seed)).float()[:points]
    own = of_verb(settings)
    head: Head | None = "range" if own.get("method") in NEEDS_HEAD else None
    model = Perceptron(study.mixture.means.shape[1], study.path, head, width or study.width, seed)
    shared = {"batch": study.batch, "lr": 3e-3, "warmup": 0, "clip": 1e9, "ema": 0}
    return fit(model, data, steps=steps or study.steps, seed=seed, **{**shared, **own})


class Seed:
    """All arms of one seed; 'plain' is trained once, however many arms sample from it."""

    def __init__(self, study: Study, seed: int):
        self.study, self.seed = study, seed
        self._kept: dict[str, Trained] = {}

    def trained(self, arm: str) -> Trained:
        if arm in self._kept:
            return self._kept[arm]
        if arm == "worse":
            trained = train(self.study, {}, self.seed, self.study.steps // 8, self.study.width // 4)
        else:
            trained = train(self.study, ARMS[arm], self.seed)
        if arm in ("plain", "worse"):
            self._kept[arm] = trained
        return trained

    def record(self, arm: str) -> Record:
        began = time.monotonic()
        settings = ARMS[arm]
        trained = self.trained(settings.get("of", arm))
        field = points_field(trained.model)
        if "laplacian" in settings:
            field = laplacian(
                field, settings["laplacian"], torch.Generator().manual_seed(self.seed), probes=1, reach=0.1
            )
        if "scale" in settings:
            field = steered(field, points_field(self.trained("worse").model), settings["scale"])
        learned = trained.model.learns_variance and "of" not in settings
        variance: Variance = "learned" if learned else "small"
        record: Record = {
            "study": self.study.name, "arm": arm, "seed": self.seed, "settings": settings,
            "training seconds": trained.seconds, "forward_equivalents": trained.forwards, "share": trained.share,
        }  # fmt: skip
        record |= self.law(field, variance)
        record |= errors(self.study, field)
        if self.study.exact and self.seed == 0 and arm in CURVES:
            record["score"] = score_curve(self.study, field)
        if arm == "variance learning":
            record["swap"] = {kind: self.law(field, kind)["beyond"] for kind in ("small", "large")}
        return record | {"seconds": time.monotonic() - began}

    def law(self, field: Field, variance: Variance) -> Record:
        """Exactly on the line, from chains on the lattice."""
        study = self.study
        if study.exact:
            modes = gap_mass(self.pushed(field, variance), study.mixture, BEYOND)
            return modes.to_json() | {"beyond": modes.beyond}
        places = self.chains(field, variance)
        return of_samples(study.mixture, places)

    def pushed(self, field: Field, variance: Variance) -> Mass:
        """On a finer axis where a variance was learned to be too small for the usual one."""
        for finer in (1, 2, 4):
            axis = torch.linspace(-5, 5.5, 840 * finer + 1, dtype=torch.float64)
            try:
                return push_forward(field, self.study.times, [axis], variance)
            except ValueError:
                if finer == 4:
                    raise
        raise AssertionError("an axis was tried")

    def chains(self, field: Field, variance: Variance = "small") -> Tensor:
        generator = torch.Generator().manual_seed(10_000 + self.seed)
        x = torch.randn(self.study.chains, self.study.mixture.means.shape[1], generator=generator, dtype=torch.float64)
        with torch.no_grad():
            return ancestral(field, x, self.study.times, generator, variance)


def of_samples(mixture: Mixture, places: Tensor) -> Record:
    mode = mixture.membership(places.to(mixture.means), BEYOND)
    inside = [places[mode == j] for j in range(len(mixture.weights))]
    deviations = [part.std(0).tolist() if len(part) > 1 else [0.0] * places.shape[1] for part in inside]
    beyond = float((mode == NOWHERE).double().mean())
    masses = [len(part) / len(places) for part in inside]
    return {"masses": masses, "deviations": deviations, "beyond": beyond, "chains": len(places)}


def points_field(model: Perceptron) -> Field:
    """The network's field, asked in float32 whatever the chain is in."""
    inner = field_of(model)
    return lambda x_t, t: inner(x_t.float(), t.double())


def errors(study: Study, field: Field) -> Record:
    """How far eps is off, and how high ridges are, at some times: on data's states and evenly between the modes."""
    generator = torch.Generator().manual_seed(30_000)
    by_index: Record = {}
    for index in INDICES:
        t = study.path.time(torch.tensor(float(index), dtype=torch.float64))
        alpha, sigma = study.path.alpha(t), study.path.sigma(t)
        at_data = study.mixture.marginal(t, study.path).sample(2_000, generator)
        low, high = alpha * study.mixture.means.min(0).values, alpha * study.mixture.means.max(0).values
        evenly = low + (high - low) * torch.rand(4_000, len(low), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            off = [
                float((field(x, t).eps.double() - study.mixture.eps(x, t, study.path)).square().sum(1).mean())
                for x in (at_data, evenly)
            ]
        ridge = float(_bends(field, evenly, t, sigma).max()) if study.exact else None
        by_index[str(index)] = {"eps error at data": off[0], "eps error between": off[1], "ridge": ridge}
    return {"errors": by_index}


def _bends(field: Field, x: Tensor, t: Tensor, sigma: Tensor) -> Tensor:
    x = x.float()
    with torch.no_grad():
        return -sigma * jvp(lambda y: field(y, t).eps, x, torch.ones_like(x)).along.double()


def score_curve(study: Study, field: Field, index: int = 10) -> Record:
    """The learned score against the exact one, over the modes and the gaps, for the figure."""
    t = study.path.time(torch.tensor(float(index), dtype=torch.float64))
    x = torch.linspace(0.7, 3.3, 131, dtype=torch.float64)[:, None] * study.path.alpha(t)
    with torch.no_grad():
        learned = field(x, t).eps.double() / -study.path.sigma(t)
    exact = study.mixture.score(x, t, study.path)
    return {"x": x[:, 0].tolist(), "learned": learned[:, 0].tolist(), "exact": exact[:, 0].tolist()}


SMOOTHINGS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.12)


def oracle_record() -> Record:
    """The smoothed exact score (VSM notes, 8.6 test 9), and the exact one under every variance: nothing is trained."""
    study, began = LINE, time.monotonic()
    rows = []
    for h in SMOOTHINGS:
        field = smoothed(study.mixture, study.path, h)
        law = gap_mass(push_forward(field, study.times, [study.axis]), study.mixture, BEYOND)
        ridges = {}
        for index in INDICES:
            t = study.path.time(torch.tensor(float(index), dtype=torch.float64))
            x = study.path.alpha(t) * torch.linspace(0.9, 3.1, 4401, dtype=torch.float64)[:, None]
            along = jvp(lambda y, t=t, field=field: field(y, t).eps, x, torch.ones_like(x)).along  # type: ignore[misc]
            ridges[str(index)] = float((-study.path.sigma(t) * along).max())
        rows.append({"h": h, "beyond": law.beyond, "ridge": ridges, "law": law.to_json()})
    exact, variances = smoothed(study.mixture, study.path, 0.0), {}
    for kind in ("small", "large", "optimal"):
        covariance = posterior_covariance(study.mixture, study.path) if kind == "optimal" else None
        mass = push_forward(exact, study.times, [study.axis], kind, covariance)  # type: ignore[arg-type]
        variances[kind] = {
            "beyond 4": gap_mass(mass, study.mixture, 4.0).beyond,
            "beyond 6": gap_mass(mass, study.mixture, 6.0).beyond,
            "deviation": float(gap_mass(mass, study.mixture, 6.0).deviations.mean()),
        }
    return {"smoothed": rows, "variances": variances, "seconds": time.monotonic() - began}
