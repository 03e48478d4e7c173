"""UNet: pixel-space DDPM and DDIM pipelines around a UNet2DModel, unconditional or of named classes.

States are images (batch, channels, height, width) in [-1, 1]. Our steps do not clip x_0: a scheduler with
`clip_sample=True` clips inside its own step, so its images agree with ours only where nothing is clipped.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fieldsmith.errors import InputError, check_word
from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import Kind, Prediction, VariancePreserving, expand, guide
from fieldsmith.samplers import ddim_grid

KINDS: dict[str, Kind] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v_prediction"}
CLASSES_FILE = "classes.json"  # a list of class names beside model_index.json, in the order of their embeddings


class UNet(Model):
    """`classes` are the class names; None reads as '0', '1', ... for every embedding row.

    One embedding row more than classes: the last one is the null class, which '' encodes to.
    """

    family = "unet"
    SUBSETS: ClassVar[dict[str, str]] = {
        "attention": r".*\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)",
        "all-linear": r".*",  # attention, and the projections of time; convolutions train only as full weights
    }
    path: VariancePreserving

    def __init__(
        self,
        pipeline: Any,  # DDPMPipeline or DDIMPipeline
        name: str,
        resolution: int | None = None,
        classes: Sequence[str] | None = None,
    ):
        super().__init__(pipeline, pipeline.unet, name)
        shape, scheduler = self.network.config, self.pipeline.scheduler.config
        self.channels = shape.in_channels
        sizes = shape.sample_size if isinstance(shape.sample_size, (tuple, list)) else (shape.sample_size,) * 2
        self.size = (resolution, resolution) if resolution else (int(sizes[0]), int(sizes[1]))
        least = 2 ** (len(shape.block_out_channels) - 1)
        if any(side % least for side in self.size):
            raise InputError(f"resolution {self.size[0]} is not a multiple of {least} for {name}")
        if bool((self.pipeline.scheduler.alphas_cumprod <= 0).any()):
            raise InputError(f"the schedule of {name} ends without any signal, where eps says nothing of x_0; "
                             "set rescale_betas_zero_snr=False in its scheduler")  # fmt: skip
        self.path = VariancePreserving(self.pipeline.scheduler.alphas_cumprod)
        self.kind = KINDS[scheduler.prediction_type]
        self.variance = scheduler.get("variance_type", "fixed_small")
        self.learns_variance = shape.out_channels == 2 * shape.in_channels
        if self.learns_variance and self.variance not in ("learned", "learned_range"):
            raise InputError(
                f"{name} has twice as many output as input channels but its scheduler's variance_type is "
                f"'{self.variance}'; set it to 'learned_range' or 'learned'"
            )
        rows = shape.num_class_embeds or 0
        self.classes = tuple(str(i) for i in range(rows)) if classes is None else tuple(classes)
        if len(self.classes) not in (rows, rows - 1):
            raise InputError(
                f"{CLASSES_FILE} of {name} names {len(self.classes)} classes but its network embeds {rows}"
            )
        self.conditional = rows > 0
        self.null_class = rows - 1 if len(self.classes) == rows - 1 else None

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_1, drawn as the pipelines draw them so that equal seeds give equal images."""
        return torch.randn(n, self.channels, *self.size, generator=generator).to(self.device)

    def grid(self, steps: int) -> Tensor:
        """Times for `steps` steps in the scheduler's own spacing, from noise to clean data at 0; (steps + 1,)."""
        config = self.pipeline.scheduler.config
        if config.timestep_spacing == "linspace":
            raise InputError(
                f"the scheduler of {self.name} spaces its steps as 'linspace', where diffusers' own steps miss their "
                "next time; set timestep_spacing to 'trailing' or 'leading'"
            )
        trailing = config.timestep_spacing == "trailing"
        grid = ddim_grid(self.path, steps, trailing)
        if not trailing:
            grid[:-1] += config.get("steps_offset", 0) / self.path.length
        return grid.to(self.device)

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """One row a prompt: a class name, its number, or '' for no class.

        Raises InputError at an unknown class, or at '' where the network knows classes but no null class.
        """
        return Condition({"label": torch.tensor([self._label(p) for p in prompts], device=self.device)})

    def _label(self, prompt: str) -> int:
        if not self.conditional:
            if prompt:
                raise InputError(f"{self.name} is unconditional, so '{prompt}' means nothing to it; use the prompt ''")
            return 0
        if not prompt:
            return self._null_label("the prompt ''")
        if prompt in self.classes:
            return self.classes.index(prompt)
        if prompt.isdecimal() and int(prompt) < len(self.classes):
            return int(prompt)
        check_word(prompt, self.classes, self.name)
        raise AssertionError("check_word raises")

    def _null_label(self, wish: str) -> int:
        if self.null_class is None:
            raise InputError(
                f"{wish} needs a null class, which {self.name} lacks; leave it out, or use a model with one embedding "
                f"row more than {CLASSES_FILE} has names"
            )
        return self.null_class

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        """What the network says at x_t (batch, channels, height, width) and t (batch,) or ().

        guidance None or 1 is off. Both its branches go through the network at once; log_variance, where learned, is the
        conditional's.
        """
        t = t.to(x_t).expand(len(x_t))
        label = condition.repeat(len(x_t)).parts["label"]
        if guidance is None or guidance == 1.0:
            value, raw = self._say(x_t, t, label)
        else:
            null = torch.full_like(label, self._null_label(f"guidance={guidance}"))
            value, raw = self._say(torch.cat((x_t, x_t)), torch.cat((t, t)), torch.cat((label, null)))
            conditional, unconditional = value.chunk(2)
            value = guide(conditional, unconditional, guidance)
            raw = None if raw is None else raw[: len(x_t)]
        log_variance = None if raw is None else self._log_variance(raw, t)
        return Prediction(self.kind, value, x_t, t, self.path, log_variance)

    def _say(self, x_t: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = self.network.dtype
        said: Tensor = self.network(
            x_t.to(dtype), self._index(t), class_labels=label if self.conditional else None, return_dict=False
        )[0].to(x_t.dtype)
        self.spend(len(x_t), said)
        if self.learns_variance:
            return said[:, : self.channels], said[:, self.channels :]
        return said, None

    def _index(self, t: Tensor) -> Tensor:
        """The discrete index of t, in t's type; whole where t = (index + 1) / T only missed it by rounding."""
        index = self.path.index(t)
        off = (index.round() - index).detach()
        return index + torch.where(off.abs() < 1e-3, off, torch.zeros_like(off))

    def _log_variance(self, raw: Tensor, t: Tensor) -> Tensor:
        """Log-variance of the reverse step from t to t - 1/T, as DDPMScheduler takes the network's second half.

        'learned_range': (v + 1) / 2 goes from the log of the posterior's variance to log beta. 'learned': v is the
        variance itself (the scheduler takes its root, whatever the paper says of logs), so this is its log.
        """
        if self.variance == "learned":
            return raw.clamp(min=1e-20).log()
        t = self.path.time(self._index(t.double()))
        alpha2 = self.path.alpha(t) ** 2
        before2 = self.path.alpha((t - 1 / self.path.length).clamp(min=0)) ** 2
        beta = 1 - alpha2 / before2
        low = ((1 - before2) / (1 - alpha2) * beta).clamp(min=1e-20).log()  # 0 at the first index: clamped as there
        fraction = (raw + 1) / 2
        return fraction * expand(beta.log().to(raw), raw) + (1 - fraction) * expand(low.to(raw), raw)

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        """Images (batch, channels, height, width) in [0, 1]; `grad` lets a reward's gradient through."""
        with torch.set_grad_enabled(grad):
            return (latents / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """States of images in [0, 1]."""
        return images * 2 - 1

    def _save_pipeline(self, folder: pathlib.Path) -> None:
        super()._save_pipeline(folder)
        if self.conditional:
            (folder / CLASSES_FILE).write_text(json.dumps(self.classes) + "\n", encoding="utf-8")
