"""What guidance a student kept of its teacher's (DASH notes, section 7): its gap's size and direction, its branches.

In: both branches of student and teacher at the same fixed states. Out: `Guidance`: fidelity by time, pooled, a verdict.
gap = conditional - unconditional, e = student - teacher; everything "per pixel" is a mean over a state's numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.measure.progress import track
from fieldsmith.models.branches import Branches, branches
from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import VariancePreserving, noised
from fieldsmith.pictures import Images, encoded
from fieldsmith.samplers import rollout

MATTERS = 0.05  # bins with less of the teacher's squared gap cannot decide a verdict
HEALTHY = (0.85, 1.15)  # of rho
ALIGNED = 0.8  # least healthy cosine
COLLAPSED, BLOWN_UP = 0.3, 1.5  # of rho
DRIFTED = 2.0  # E_c + E_u, in references
SCALES = (0, 1, 2, 3, 4, 5, 6)  # at which G(w) is recorded
ALIKE = 1.5  # ratio of E_u and E_c within which no one branch is to blame
VERDICTS = ("healthy", "drift", "distorted", "blow-up", "collapse")  # from the mildest to the worst

GuidedSampler = Callable[[Sequence[str], int, float], Tensor]  # prompts, seed, guidance -> images (n, ...)


# states


@dataclass(frozen=True)
class Tuples:
    """Fixed states at which both networks are asked: x_t (n, ...), t (n,), a condition of n rows."""

    x_t: Tensor
    t: Tensor
    condition: Condition

    def __len__(self) -> int:
        return len(self.t)


def noised_tuples(
    model: Model, images: Tensor | Images, labels_or_prompts: Tensor | Sequence[str], n: int, generator: torch.Generator
) -> Tuples:
    """n states of q(x_t | x_0), from images (m, c, h, w) in [0, 1] and what each shows: labels (m,) or m prompts.

    t is stratified: uniform over the path's discrete indices where it has them, over (0, 1) elsewhere. Images come in
    random order, again from the first once all were used. Raises InputError at a prompt that the model does not know.
    """
    if len(images) != len(labels_or_prompts) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels_or_prompts)} labels; each image needs one")
    names = _names(model, labels_or_prompts)
    rows = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(-(-n // len(images)))])[:n]
    t = _stratified(model, n, generator)
    x_0 = encoded(images, lambda some: model.encode_images(some.to(model.device)))[rows]
    eps = torch.randn(x_0.shape, generator=generator).to(x_0)
    t = t.to(x_0)
    return Tuples(noised(model.path, x_0, eps, t), t, _encoded(model, [names[i] for i in rows.tolist()]))


def _names(model: Model, given: Tensor | Sequence[str]) -> list[str]:
    if not isinstance(given, Tensor):
        return list(given)
    classes: Sequence[str] = getattr(model, "classes", ())
    if not classes:
        raise InputError(f"{model.name} knows no classes, so labels mean nothing to it; give prompts")
    return [classes[label] for label in given.tolist()]


def _stratified(model: Model, n: int, generator: torch.Generator) -> Tensor:
    """n times (n,), one in each n-th part of the path."""
    place = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    if isinstance(model.path, VariancePreserving):
        return model.path.time((place * model.path.length).long().clamp(max=model.path.length - 1))
    return place.clamp(1e-6, 1 - 1e-6)


def path_tuples(
    model: Model,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    generator: torch.Generator,
    n: int,
    batch: int = 256,
) -> Tuples:
    """n states along the model's own guided deterministic paths, all times but the last of ceil(n / steps) of them.

    Prompts are taken in turn. Not counted as training cost. Raises InputError at a prompt that the model does not know.
    """
    chains = -(-n // steps)
    condition = _encoded(model, [prompts[i % len(prompts)] for i in range(chains)])
    noise, grid = model.noise(chains, generator), model.grid(steps)
    parts = []
    with torch.no_grad(), model.uncounted():
        for rows in track(torch.arange(chains, device=model.device).split(batch), "following guided paths"):
            field = partial(model.predict, condition=condition[rows], guidance=guidance)
            parts.append(rollout(field, noise[rows], grid, clip=model.clip).states[:-1])
    states = torch.cat(parts, 1).transpose(0, 1).flatten(0, 1)  # path by path, so that n cuts off a path's end
    of = torch.arange(chains, device=model.device).repeat_interleave(steps)
    return Tuples(states[:n], grid[:-1].repeat(chains)[:n], condition[of[:n]])


def _encoded(model: Model, prompts: Sequence[str]) -> Condition:
    """One row a prompt, each different one encoded once."""
    names = sorted(set(prompts))
    rows = torch.tensor([names.index(prompt) for prompt in prompts], device=model.device)
    with torch.no_grad():
        return model.encode(names)[rows]


@torch.no_grad()
def ask(model: Model, tuples: Tuples, batch: int = 256) -> Branches:
    """Both branches at every state, each (n, ...), without gradient and without counting as training cost.

    Raises InputError where the model has no null condition.
    """
    output = []
    with model.uncounted():
        for rows in track(torch.arange(len(tuples), device=tuples.t.device).split(batch), "asking both branches"):
            output.append(branches(model, tuples.x_t[rows], tuples.t[rows], tuples.condition[rows]))
    return Branches(torch.cat([b.conditional for b in output]), torch.cat([b.unconditional for b in output]))


# fidelity


@dataclass(frozen=True)
class Fidelity:
    """Student against teacher over n states with t in (t_low, t_high]; E_c, E_u and the like are per pixel.

    Where the teacher has no gap: rho and the relative errors are 1 and 0 if the student has none either, else infinite.
    """

    n: int
    t_low: float
    t_high: float
    share: float  # of all states' E||gap_T||^2
    rho: float  # mean ||gap_S|| / mean ||gap_T||
    cosine: float  # of the gaps: mean over states
    weighted_cosine: float  # the same over all states at once, so that large gaps count more
    energy: float  # E||gap_T||^2
    gap_mse: float  # E||gap_S - gap_T||^2
    e_c: float  # E||e_c||^2
    e_u: float  # E||e_u||^2
    cross: float  # E<e_u, e_gap>, the third moment of G(w)
    common: float  # E||(e_c + e_u) / 2||^2
    correlation: float  # of e_c and e_u, about 0: E<e_c, e_u> / sqrt(E_c E_u); 0 where either is 0
    relative_gap_error: float  # E||gap_S - gap_T||^2 / E||gap_T||^2 = (1 - gain)^2 + residual
    gain: float  # a_T = E<gap_S, gap_T> / E||gap_T||^2
    residual: float  # what of gap_S is orthogonal to gap_T, in E||gap_T||^2
    recalibration: float  # a* = E<gap_S, gap_T> / E||gap_S||^2: guide with w a* instead of w

    @property
    def difference(self) -> float:
        """E||e_c - e_u||^2: the same thing as gap_mse, since e_c - e_u = gap_S - gap_T."""
        return self.gap_mse

    @property
    def healthy(self) -> bool:
        return HEALTHY[0] <= self.rho <= HEALTHY[1] and self.cosine >= ALIGNED

    def guided_error(self, w: float) -> float:
        """G(w) = E||e^w||^2 = E_u + 2 w E<e_u, e_gap> + w^2 E||e_gap||^2, per pixel."""
        return self.e_u + 2 * w * self.cross + w**2 * self.gap_mse

    def to_json(self) -> dict[str, float | None]:
        """Plain numbers; None where one is infinite."""
        numbers = {**dataclasses.asdict(self), "difference": self.difference}
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


@dataclass(frozen=True)
class Guidance:
    """Fidelity over all states and in equal bins of time (empty ones left out).

    `reference` is what E_c + E_u is compared with, `yardstick` its name.
    """

    pooled: Fidelity
    bins: tuple[Fidelity, ...]
    reference: float
    yardstick: str

    @property
    def matter(self) -> tuple[Fidelity, ...]:
        """The bins that decide: those with more than 5% of the teacher's squared gap."""
        return tuple(b for b in self.bins if b.share > MATTERS) or (self.pooled,)

    @property
    def worst(self) -> Fidelity:
        """The bin that matters whose rho is farthest from 1 in ratio."""
        return max(self.matter, key=lambda b: _off(b.rho))

    @property
    def worst_rho(self) -> float:
        return self.worst.rho

    @property
    def branch_error(self) -> float:
        """E_c + E_u over all states: what another student's `reference` is."""
        return self.pooled.e_c + self.pooled.e_u

    @property
    def verdict(self) -> str:
        """One of VERDICTS; 'distorted' is outside the healthy band without being collapsed or blown up."""
        if self.worst_rho < COLLAPSED:
            return "collapse"
        if self.worst_rho > BLOWN_UP:
            return "blow-up"
        if not all(b.healthy for b in self.matter):
            return "distorted"
        return "drift" if self.branch_error > DRIFTED * self.reference else "healthy"

    @property
    def words(self) -> str:
        """What is wrong and what to do, in one sentence."""
        worst, verdict = self.worst, self.verdict
        where = (
            f"at t from {worst.t_low:.2g} to {worst.t_high:.2g} the student's gap is {worst.rho:.2f} of the teacher's"
        )
        null = "as where no null branch was supervised: distil with --objective dash, or with matched label dropout"
        if worst.e_u < ALIKE * worst.e_c and worst.e_c < ALIKE * worst.e_u:
            null = "and both branches are about as far from the teacher's: train longer, at a higher rate"
        errors = f"E_c + E_u = {self.branch_error:.3g} against {self.reference:.3g}, {self.yardstick}"
        if verdict == "collapse":
            return f"Guidance collapsed: {where}, so raising the scale changes little, {null}."
        if verdict == "blow-up":
            return f"Guidance blew up: {where}, with cosine {worst.cosine:.2f}, {null}."
        if verdict == "distorted":
            odd = worst if not HEALTHY[0] <= worst.rho <= HEALTHY[1] else min(self.matter, key=lambda b: b.cosine)
            return (
                f"Guidance is distorted, though neither collapsed nor blown up: at t from {odd.t_low:.2g} to "
                f"{odd.t_high:.2g} the gap is {odd.rho:.2f} of the teacher's with cosine {odd.cosine:.2f}; "
                "train longer or add a gap term, and until then guide with w a*(t), which fixes size but not direction."
            )
        if verdict == "drift":
            return (
                f"The branches drifted: the gap matches, but both moved together ({errors}); "
                "add a conditional term, ||e_c||^2, to what is distilled."
            )
        return f"Guidance is healthy: rho and cosine are in their bands wherever the gap is large, and {errors}."

    def to_json(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return {
            "verdict": self.verdict,
            "words": self.words,
            "worst_rho": self.worst_rho if math.isfinite(self.worst_rho) else None,
            "reference": self.reference,
            "yardstick": self.yardstick,
            "guided_error": {str(w): self.pooled.guided_error(w) for w in SCALES},
            "pooled": self.pooled.to_json(),
            "bins": [b.to_json() for b in self.bins],
        }


def _off(rho: float) -> float:
    return abs(math.log(rho)) if 0 < rho < math.inf else math.inf


def measure(
    student: Branches, teacher: Branches, t: Tensor, bins: int = 10, reference: float | None = None
) -> Guidance:
    """Fidelity of the student's predictions to the teacher's at the same n states, at times t (n,) in (0, 1].

    `reference` is another student's E_c + E_u (`branch_error`), the yardstick of drift; None takes the teacher's own
    mean squared gap. Raises ValueError where shapes differ, InputError where a prediction is not finite.
    """
    shapes = [tuple(output.shape) for both in (student, teacher) for output in (both.conditional, both.unconditional)]
    if len(set(shapes)) > 1 or shapes[0][:1] != tuple(t.shape) or not len(t):
        raise ValueError(f"branches of shapes {shapes} at times of shape {tuple(t.shape)}; all need one n, above 0")
    for who, both in (("student", student), ("teacher", teacher)):
        if not bool(both.conditional.isfinite().all() and both.unconditional.isfinite().all()):
            raise InputError(f"the {who} says NaN or infinity, so it is broken; use an earlier checkpoint")
    rows = _products(student, teacher)
    t = t.double().cpu()
    total = float(rows["tt"].sum())
    # a time on an edge belongs to the bin below it, so that every bin holds as many discrete indices
    place = ((t * bins - 1e-6).ceil() - 1).clamp(0, bins - 1).long()
    parts = tuple(
        _fidelity({name: row[place == i] for name, row in rows.items()}, i / bins, (i + 1) / bins, total)
        for i in range(bins)
        if bool((place == i).any())
    )
    pooled = _fidelity(rows, 0.0, 1.0, total)
    if reference is None:
        return Guidance(pooled, parts, pooled.energy, "the teacher's own mean squared gap")
    return Guidance(pooled, parts, reference, "the reference given")


def _products(student: Branches, teacher: Branches) -> dict[str, Tensor]:
    """Inner products of each state's gaps (s, t) and errors (c, u, g = c - u), per pixel, and more; each (n,)."""

    def flat(x: Tensor) -> Tensor:
        return x.detach().cpu().double().flatten(1)

    s_c, s_u, t_c, t_u = map(flat, (student.conditional, student.unconditional, teacher.conditional,
                                    teacher.unconditional))  # fmt: skip
    s, t, c, u = s_c - s_u, t_c - t_u, s_c - t_c, s_u - t_u
    g, m = s - t, (c + u) / 2
    pairs = {"st": (s, t), "ss": (s, s), "tt": (t, t), "gg": (g, g), "cc": (c, c), "uu": (u, u), "cu": (c, u),
             "ug": (u, g), "mm": (m, m)}  # fmt: skip
    rows = {name: (a * b).mean(1) for name, (a, b) in pairs.items()}
    size = (rows["ss"] * rows["tt"]).sqrt()
    both_zero = ((rows["ss"] == 0) & (rows["tt"] == 0)).double()
    cosine = torch.where(size > 0, rows["st"] / size.clamp(min=torch.finfo(size.dtype).tiny), both_zero)
    return {**rows, "cosine": cosine, "s": rows["ss"].sqrt(), "t": rows["tt"].sqrt()}


def _fidelity(rows: dict[str, Tensor], low: float, high: float, total: float) -> Fidelity:
    E = {name: float(row.mean()) for name, row in rows.items()}
    n, tt, ss, st = len(rows["tt"]), E["tt"], E["ss"], E["st"]
    gain = _over(st, tt, 0.0 if ss else 1.0)
    return Fidelity(
        n=n,
        t_low=low,
        t_high=high,
        share=_over(n * tt, total, 0.0),
        rho=_over(E["s"], E["t"], math.inf if ss else 1.0),
        cosine=E["cosine"],
        weighted_cosine=_over(st, math.sqrt(ss * tt), 0.0 if ss or tt else 1.0),
        energy=tt,
        gap_mse=E["gg"],
        e_c=E["cc"],
        e_u=E["uu"],
        cross=E["ug"],
        common=E["mm"],
        correlation=_over(E["cu"], math.sqrt(E["cc"] * E["uu"]), 0.0),
        relative_gap_error=_over(E["gg"], tt, math.inf if ss else 0.0),
        gain=gain,
        residual=max(0.0, _over(ss, tt, math.inf if ss else 1.0) - gain**2),
        recalibration=_over(st, ss, 0.0 if tt else 1.0),
    )


def _over(above: float, below: float, otherwise: float) -> float:
    return above / below if below else otherwise


# the whole sampler


def liveness(
    student_sampler: GuidedSampler,
    teacher_sampler: GuidedSampler,
    prompts: Sequence[str],
    seed: int,
    scales: tuple[float, float] = (1.0, 3.0),
) -> float:
    """How far the scale moves the student's images, over how far it moves the teacher's, at equal seeds.

    mean ||x_0(w = high) - x_0(w = low)|| of each: 0 is a dead knob, 1 a faithful one; infinite where only the
    teacher's does nothing.
    """

    def moved(sampler: GuidedSampler) -> float:
        low, high = (sampler(prompts, seed, w) for w in scales)
        return float((high - low).double().flatten(1).norm(dim=1).mean())

    by_student, by_teacher = moved(student_sampler), moved(teacher_sampler)
    return _over(by_student, by_teacher, math.inf if by_student else 1.0)
