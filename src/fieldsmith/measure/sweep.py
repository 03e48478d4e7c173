"""Quality against guidance scale, teacher and student: distance to data, class accuracy, paired drift (DASH notes, 7).

In: data with classes, a teacher, students. Out: curves over the scales. Noise and classes are equal for all models, so
that drift is between pairs; the judge is a classifier trained on the data alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fieldsmith.measure.classifier import Classifier, train_classifier
from fieldsmith.measure.distances import frechet_distance
from fieldsmith.measure.drawing import sampler
from fieldsmith.models.core import Model
from fieldsmith.paths import tag_schedule

TAG = "tag"  # in place of a scale: TAG's schedule w(t), from 1 at noise to 4 at data


class Classes(Protocol):
    """Images (n, c, h, w) in [0, 1] with labels (n,) into `names`, and held-out ones; `read` is an exact judge of
    classes where there is one."""

    @property
    def name(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def held_images(self) -> Tensor: ...
    @property
    def held_labels(self) -> Tensor: ...
    @property
    def read(self) -> Callable[[Tensor], Tensor] | None: ...


@dataclass(frozen=True)
class Sweep:
    """What every model is asked to draw: `images` in all, `steps` deterministic steps, noise from `seed`."""

    data: Classes
    teacher: Model
    images: int = 800
    steps: int = 20
    seed: int = 0

    @cached_property
    def judge(self) -> Classifier:
        steps = min(600, max(150, 2 * self.images))  # a quick look needs no sharp judge
        return train_classifier(self.data.images, self.data.labels, self.data.name, steps)

    @cached_property
    def real(self) -> Tensor:
        """Features of all the data."""
        return self.judge(torch.cat((self.data.images, self.data.held_images)))

    @cached_property
    def labels(self) -> Tensor:
        """The class of each image, (images,)."""
        return torch.arange(self.images) % len(self.data.names)

    @cached_property
    def _teacher_drew(self) -> dict[str, Tensor]:
        return {}

    def of_teacher(self, scale: float | str) -> Tensor:
        """The teacher's images at a scale, drawn once."""
        if str(scale) not in self._teacher_drew:
            self._teacher_drew[str(scale)] = self.draw(self.teacher, scale)
        return self._teacher_drew[str(scale)]

    def draw(self, model: Model, scale: float | str) -> Tensor:
        """The same noise and classes for every model; (images, c, h, w) in [0, 1]."""
        prompts = [self.data.names[i] for i in self.labels.tolist()]
        return sampler(model, self.steps, self._schedule(scale))(prompts, 10_000 + self.seed)

    def _schedule(self, scale: float | str) -> Any:
        if scale != TAG:
            return float(scale)
        return tag_schedule(self.teacher.path)

    def scores(self, images: Tensor, of_teacher: Tensor) -> dict[str, float]:
        """Frechet distance to the data, share of images whose class is the one asked for, drift from the teacher's."""
        scores = {
            "distance": frechet_distance(self.judge(images), self.real),
            "accuracy": float((self.judge.read(images) == self.labels).float().mean()),
            "drift": float((images - of_teacher).square().mean()),
        }
        if self.data.read:
            scores["judged right"] = float((self.data.read(images) == self.labels).float().mean())
        return scores

    def curve(self, model: Model, scales: Sequence[float | str]) -> dict[str, dict[str, float]]:
        """Scores by scale; a student that takes the scale itself is asked for those that it knows."""
        known = getattr(model, "scales", None)
        some = [w for w in scales if not known or w in known]
        same = model is self.teacher
        return {
            str(w): self.scores(self.of_teacher(w) if same else self.draw(model, w), self.of_teacher(w)) for w in some
        }


def best(curve: dict[str, dict[str, float]]) -> str:
    """The scale of the smallest distance."""
    return min(curve, key=lambda w: curve[w]["distance"])
