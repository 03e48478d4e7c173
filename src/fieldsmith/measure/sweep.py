"""Quality against guidance scale, teacher and student: distance to data, class accuracy, paired drift (DASH notes, 7).

In: data with classes, a teacher, students. Out: curves over the scales. Noise and classes are equal for all models, so
that drift is between pairs; the judge is a classifier trained on the data alone. Free captions name no classes, so that
nothing is judged, and distances are on 8 x 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fieldsmith.measure.classifier import Classifier, load_classifier, train_classifier
from fieldsmith.measure.distances import frechet_distance, pixel_features
from fieldsmith.measure.drawing import sampler
from fieldsmith.models.core import Model
from fieldsmith.paths import tag_schedule
from fieldsmith.pictures import Images

TAG = "tag"  # in place of a scale: TAG's schedule w(t), from 1 at noise to 4 at data
PIXELS = pixel_features(8)  # what distances are on where no classifier can be
REAL = 25_000  # images of the data, at most, that distances are to


class Classes(Protocol):
    """Images (n, c, h, w) in [0, 1] with labels (n,) into `names`, and held-out ones; `read` is an exact judge of
    classes where there is one, `classifier` the folder of a trained one; `free` labels name no classes."""

    @property
    def name(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> Tensor | Images: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def held_images(self) -> Tensor | Images: ...
    @property
    def held_labels(self) -> Tensor: ...
    @property
    def read(self) -> Callable[[Tensor], Tensor] | None: ...
    @property
    def classifier(self) -> Path | None: ...
    @property
    def free(self) -> bool: ...


@dataclass(frozen=True)
class Sweep:
    """What every model is asked to draw: `images` in all, `steps` deterministic steps, noise from `seed`."""

    data: Classes
    teacher: Model
    images: int = 800
    steps: int = 20
    seed: int = 0

    @cached_property
    def judge(self) -> Classifier | None:
        if self.data.free:
            return None
        if self.data.classifier:
            return load_classifier(self.data.classifier, self.data.name)
        steps = min(600, max(150, 2 * self.images))  # a quick look needs no sharp judge
        return train_classifier(self.data.images, self.data.labels, self.data.name, steps)

    @property
    def judge_name(self) -> str:
        return self.judge.name if self.judge else PIXELS.name

    def features(self, images: Tensor) -> Tensor:
        """What distances are measured on, (n, d)."""
        return self.judge(images) if self.judge else PIXELS(images)

    @cached_property
    def real(self) -> Tensor:
        """Features of the data, of every k-th image where there are more than REAL."""
        every = -(-(len(self.data.images) + len(self.data.held_images)) // REAL)
        parts = [
            self.features(some[rows])
            for some in (self.data.images, self.data.held_images)
            for rows in torch.arange(0, len(some), every).split(500)
        ]
        return torch.cat(parts)

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
        scores = {"distance": frechet_distance(self.features(images), self.real)}
        if self.judge:
            scores["accuracy"] = float((self.judge.read(images) == self.labels).float().mean())
        scores["drift"] = float((images - of_teacher).square().mean())
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
