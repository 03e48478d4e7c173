"""What the class-conditional DDPM families share: class names, guidance, the discrete time, learned variances.

In: a pipeline of a network (states, index, class rows) and a DDPM scheduler. unet.py and dit.py define what states are.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fieldsmith.errors import InputError, check_word
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.schedulers import KINDS, check_discrete, network_index, path_of, scheduled_grid
from fieldsmith.paths import Prediction, VariancePreserving, expand, guide

# beside model_index.json: a list of class names in the order of their embeddings, or
# {"classes": [...], "guidance_scales": [...]} for a network that takes the guidance scale itself
CLASSES_FILE = "classes.json"


class ClassDDPM(Model):
    """States (batch, channels, *size) on a variance-preserving path, under a class or none.

    `rows` are the network's usable class embeddings, 0 for an unconditional one; `classes` their names, where None
    reads as '0', '1', ... for every row. One row more than classes: the last is the null class, which '' encodes to.
    With `scales` the network takes the guidance scale itself: the row of (class, scale) is
    class * len(scales) + index of the scale, there is no null row, and guidance costs one forward.
    """

    path: VariancePreserving
    aliases: Mapping[str, int] = {}  # other words for a class

    def __init__(
        self,
        pipeline: Any,
        network: nn.Module,
        name: str,
        size: tuple[int, int],
        rows: int,
        classes: Sequence[str] | None,
        scales: Sequence[float] | None,
    ):
        super().__init__(pipeline, network, name)
        self.size, self.rows = size, rows
        self._read_scheduler()
        self.scales = tuple(scales) if scales else None
        self.classes = tuple(str(i) for i in range(rows)) if classes is None else tuple(classes)
        self._check_rows()
        self.conditional = rows > 0
        self.null_class = rows - 1 if not self.scales and len(self.classes) == rows - 1 else None

    def _read_scheduler(self) -> None:
        shape, scheduler = self.network.config, self.pipeline.scheduler.config
        check_discrete(self.pipeline.scheduler, self.name)
        self.path = path_of(self.pipeline.scheduler, self.name)
        self.kind = KINDS[scheduler.prediction_type]
        self.clip = float(scheduler.get("clip_sample_range", 1.0)) if scheduler.get("clip_sample", False) else None
        self.channels = shape.in_channels
        self.variance = scheduler.get("variance_type", "fixed_small")
        self.learns_variance = shape.out_channels == 2 * shape.in_channels

    def _check_rows(self) -> None:
        named, rows = len(self.classes), self.rows
        if self.scales and named * len(self.scales) != rows:
            raise InputError(
                f"{CLASSES_FILE} of {self.name} names {named} classes and {len(self.scales)} guidance scales but its "
                f"network embeds {rows}; it should have a row for each pair"
            )
        if not self.scales and named not in (rows, rows - 1):
            raise InputError(f"{CLASSES_FILE} of {self.name} names {named} classes but its network embeds {rows}")

    @classmethod
    def of_folder(cls, pipeline: Any, name: str, resolution: int | None, folder: pathlib.Path | None) -> ClassDDPM:
        return cls(pipeline, name, resolution, *class_names(name, folder))  # type: ignore[arg-type, call-arg]

    def of(self, pipeline: Any, name: str | None = None, scales: Sequence[float] | None = None) -> Self:
        """The same kind of model, with the same classes and size, over another pipeline of its kind."""
        kind: Any = type(self)  # a family, whose constructor is another than this class's
        classes = self.classes if self.conditional else None
        made: Self = kind(pipeline, name or self.name, None, classes, scales or self.scales, **self._options())
        made.size, made.resolution = self.size, self.resolution
        return made

    def _options(self) -> dict[str, Any]:
        """What else the family's constructor takes."""
        return {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.channels, *self.size

    def grid(self, steps: int) -> Tensor:
        return scheduled_grid(self.path, self.pipeline.scheduler.config, steps, self.name).to(self.device)

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """One row a prompt: a class name, its number, or '' for no class.

        Raises InputError at an unknown class, or at '' where the network knows classes but no null class.
        """
        labels = torch.tensor([self._label(p) for p in prompts], device=self.device)
        return Condition({"label": labels}, tuple(prompts))

    def dummy_condition(self) -> Condition:
        return self.condition(torch.zeros(1, dtype=torch.long))

    def condition(self, labels: Tensor) -> Condition:
        """Class numbers (n,) as a condition; `null_class` is that of no class."""
        return Condition({"label": labels.to(self.device)})

    def _label(self, prompt: str) -> int:
        if not self.conditional:
            if prompt:
                raise InputError(f"{self.name} is unconditional, so '{prompt}' means nothing to it; use the prompt ''")
            return 0
        if not prompt:
            return self._null_label("the prompt ''")
        if prompt in self.classes:
            return self.classes.index(prompt)
        if prompt in self.aliases:
            return self.aliases[prompt]
        if prompt.isdecimal() and int(prompt) < len(self.classes):
            return int(prompt)
        check_word(prompt, (*self.classes, *self.aliases), self.name)
        raise AssertionError("check_word raises")

    def _null_label(self, wish: str) -> int:
        if self.null_class is None:
            raise InputError(
                f"{wish} needs a null class, which {self.name} lacks; leave it out, or use a model with one embedding "
                f"row more than {CLASSES_FILE} has names"
            )
        return self.null_class

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        """The network's prediction at x_t (batch, channels, height, width) and t (batch,) or ().

        guidance None or 1 is off. Both its branches go through the network at once; log_variance, where learned, is the
        conditional's. A network that takes the scale itself (`scales`) answers in one forward, and raises InputError at
        a scale that it does not know.
        """
        t = t.to(x_t).expand(len(x_t))
        label = condition.repeat(len(x_t)).parts["label"]
        if self.scales:
            value, raw = self.forward(x_t, t, label * len(self.scales) + self._scale_index(guidance))
        elif guidance is None or guidance == 1.0:
            value, raw = self.forward(x_t, t, label)
        else:
            null = torch.full_like(label, self._null_label(f"guidance={guidance}"))
            value, raw = self.forward(torch.cat((x_t, x_t)), torch.cat((t, t)), torch.cat((label, null)))
            conditional, unconditional = value.chunk(2)
            value = guide(conditional, unconditional, guidance)
            raw = None if raw is None else raw[: len(x_t)]
        log_variance = None if raw is None else self._log_variance(raw, t)
        fraction = (raw + 1) / 2 if raw is not None and self.variance == "learned_range" else None
        return Prediction(self.kind, value, x_t, t, self.path, log_variance, fraction)

    def prompts_of(self, rows: Any) -> tuple[str, ...]:
        numbers = (rows // len(self.scales) if self.scales else rows).tolist()
        return tuple(self.classes[i] if i < len(self.classes) else "" for i in numbers)

    def _scale_index(self, guidance: float | None) -> int:
        """Which of the network's own scales this is; None reads as 1."""
        known = self.scales or ()
        wanted = 1.0 if guidance is None else float(guidance)
        for i, scale in enumerate(known):
            if math.isclose(scale, wanted, abs_tol=1e-6):
                return i
        listed = ", ".join(f"{scale:g}" for scale in known)
        output = "no guidance, which reads as guidance=1," if guidance is None else f"guidance={guidance:g}"
        raise InputError(f"{output} is no scale that {self.name} was made for; use one of {listed}")

    def _forward(self, x_t: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = self.dtype
        output: Tensor = self.network(
            x_t.to(dtype), self._index(t), class_labels=rows if self.conditional else None, return_dict=False
        )[0].to(x_t.dtype)
        if self.learns_variance:
            return output[:, : self.channels], output[:, self.channels :]
        return output, None

    def _index(self, t: Tensor) -> Tensor:
        return network_index(self.path, t)

    def _log_variance(self, raw: Tensor, t: Tensor) -> Tensor | None:
        """Log-variance of the reverse step from t to t - 1/T, as DDPMScheduler reads the network's second half.

        'learned_range': (v + 1) / 2 goes from the log of the posterior's variance to log beta. 'learned': v is the
        variance itself (the scheduler takes its root, whatever the paper says of logs), so this is its log. None where
        the scheduler has a variance of its own, so that nobody knows how to read the network's.
        """
        if self.variance not in ("learned", "learned_range"):
            return None
        if self.variance == "learned":
            return raw.clamp(min=1e-20).log()
        t = self.path.time(self._index(t.double()))
        alpha2 = self.path.alpha(t) ** 2
        before2 = self.path.alpha((t - 1 / self.path.length).clamp(min=0)) ** 2
        beta = 1 - alpha2 / before2
        low = ((1 - before2) / (1 - alpha2) * beta).clamp(min=1e-20).log()  # 0 at the first index: clamped as there
        fraction = (raw + 1) / 2
        return fraction * expand(beta.log().to(raw), raw) + (1 - fraction) * expand(low.to(raw), raw)

    def _save_pipeline(self, folder: pathlib.Path) -> None:
        super()._save_pipeline(folder)
        if self.scales:
            output: Any = {"classes": self.classes, "guidance_scales": self.scales}
        else:
            output = self.classes
        if self.conditional:
            (folder / CLASSES_FILE).write_text(json.dumps(output) + "\n", encoding="utf-8")


def class_names(name: str, folder: pathlib.Path | None) -> tuple[list[str] | None, list[float] | None]:
    """Class names, and the guidance scales that the network takes itself; None for each that is not written."""
    file = folder / CLASSES_FILE if folder else None
    if file is None or not file.is_file():
        return None, None
    try:
        output = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        output = None
    both = isinstance(output, dict)
    classes, scales = (output.get("classes"), output.get("guidance_scales")) if both else (output, None)
    if not isinstance(classes, list) or not all(isinstance(word, str) for word in classes):
        raise InputError(f"classes.json in '{name}' is not a list of class names")
    twice = next((word for word in classes if classes.count(word) > 1), None)
    if twice is not None:
        raise InputError(f"classes.json in '{name}' has the class '{twice}' twice; give each class a name of its own")
    if both and not (isinstance(scales, list) and scales and all(type(scale) in (int, float) for scale in scales)):
        raise InputError(f"classes.json in '{name}' holds no list of numbers under 'guidance_scales'")
    return classes, scales
