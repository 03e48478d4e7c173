"""What every family shares: conditions, what a model is asked, the count of its evaluations. Training: weights.py.

A family (flux.py, unet.py) adds encode, predict, decode and the time grid over its diffusers pipeline's own parts.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor, nn

from fieldsmith.errors import InputError
from fieldsmith.models.autoencoder import decoded, encoded
from fieldsmith.models.parts import by_rows
from fieldsmith.models.weights import LoraSpec as LoraSpec  # a model is adapted by it, so it is had from here too
from fieldsmith.models.weights import Trainable
from fieldsmith.paths import Kind, Path, Prediction

MANY = 256  # prompts whose encodings stay in memory


@dataclass(frozen=True)
class Condition:
    """What a prompt (or class) became: named tensors that share their first dimension, one row a sample."""

    parts: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: Any) -> Condition:
        """The rows picked by an index tensor, slice or list."""
        return Condition({name: part[rows] for name, part in self.parts.items()})

    def repeat(self, n: int) -> Condition:
        """A condition of one row as n rows that share memory; n rows stay as they are."""
        if len(self) == n:
            return self
        if len(self) != 1:
            raise ValueError(f"a condition of {len(self)} rows cannot serve a batch of {n}; encode 1 or {n} prompts")
        return Condition({name: part.expand(n, *part.shape[1:]) for name, part in self.parts.items()})


def stack(conditions: Sequence[Condition]) -> Condition:
    """Conditions one below the other; prompts of fewer tokens are padded with zeros, in their masks too."""
    return Condition({name: _rows([c.parts[name] for c in conditions]) for name in conditions[0].parts})


def _rows(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim == 1 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    padded = [part.new_zeros(len(part), longest, *part.shape[2:]) for part in parts]
    for wide, part in zip(padded, parts, strict=True):
        wide[:, : part.shape[1]] = part
    return torch.cat(padded)


class Prompts:
    """What a model encodes of many prompts when rows of them are asked for: prompts[rows] is a Condition."""

    def __init__(self, model: Model, prompts: Sequence[str]):
        self._model, self._prompts = model, prompts

    @torch.no_grad()
    def __getitem__(self, rows: Tensor | list[int]) -> Condition:
        asked, place = torch.as_tensor(rows).cpu().unique(return_inverse=True)
        return self._model.encode([self._prompts[i] for i in asked.tolist()])[place]


def encoded_prompts(model: Model, prompts: Sequence[str]) -> Condition | Prompts:
    """Prompts as rows; where there are more than MANY of a text model, they are encoded only when they are asked for.

    Raises InputError at a word that the model does not know, of the first MANY then.
    """
    if len(prompts) <= MANY or getattr(model, "classes", None):
        return model.encode(prompts)
    model.encode(prompts[:MANY])
    return Prompts(model, prompts)


def check_resolution(model: Model, resolution: int | None) -> None:
    """Raises InputError where a config asks for another resolution than the model was loaded with."""
    if resolution not in (None, model.resolution):
        raise InputError(
            f"resolution={resolution}: {model.name} was loaded at {model.resolution} pixels; leave it out, or load the "
            f"model with resolution={resolution}"
        )


@dataclass(eq=False)
class Nfe:
    """Network function evaluations: a forward of one state is 1, its backward 2 more."""

    total: int = 0


class Model(Trainable):
    """A diffusers pipeline as one field. `network` is the denoiser; everything else of the pipeline stays frozen."""

    DORMANT: ClassVar[str] = "lora_A"  # in the names of parameters without gradient at the start, where B is 0
    resolution: int | None = None  # pixels a side of an image; None where images are not square
    clip: float | None = None  # radius to which predicted x_0 is clipped while sampling
    path: Path
    kind: Kind  # what the network predicts

    def __init__(self, pipeline: Any, network: nn.Module, name: str):
        super().__init__(pipeline, network, name)
        self._counters: list[Nfe] = []  # those that are open now

    @classmethod
    def of_folder(cls, pipeline: Any, name: str, resolution: int | None, folder: pathlib.Path | None) -> Model:
        """The model over a pipeline that was loaded from a folder, which may hold more than diffusers reads."""
        return cls(pipeline, name, resolution)  # type: ignore[call-arg, arg-type]

    @classmethod
    def components(cls, source: str, **options: Any) -> dict[str, Any]:
        """Parts of the pipeline at `source` that diffusers cannot load by itself here, by name."""
        return {}

    # what a family must define

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one state."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """One row a prompt. Raises InputError at what the model does not know."""
        raise NotImplementedError

    def dummy_condition(self) -> Condition:
        """One row of what `encode` gives, in shape alone: for planning, where no text encoder has weights.

        Raises InputError where that depends on more than words.
        """
        raise InputError(f"what prompts of family {self.family} become is not known without its weights; no plan")

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        """The network's prediction at x_t (batch, ...) and t (batch,) or (); guidance None or 1 is off."""
        raise NotImplementedError

    def _forward(self, x_t: Tensor, t: Tensor, *condition: Any) -> Any:
        """The raw network at x_t (batch, ...), one row of t and condition each: a Tensor, or a tuple of them and None.

        `predict` asks it through `forward`, which shares the rows out among processes and counts them.
        """
        raise NotImplementedError

    def grid(self, steps: int) -> Tensor:
        """Times for `steps` steps in the pipeline's own spacing, from noise to clean data; (steps + 1,)."""
        raise NotImplementedError

    # what it defines only where it differs

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_1, drawn as the pipeline draws them so that equal seeds give equal images."""
        return torch.randn(n, *self.latent_shape, generator=generator).to(self.device)

    def _decode(self, latents: Tensor) -> Tensor:
        return decoded(self.pipeline.vae, latents)

    def _encode_images(self, images: Tensor) -> Tensor:
        return encoded(self.pipeline.vae, images)

    # what every family does alike

    def forward(self, x_t: Tensor, t: Tensor, *condition: Any) -> Any:
        """The raw network at x_t (batch, ...), one row of t and condition each; its evaluations are counted."""
        output = by_rows(self._forward, x_t, t, *condition)
        first = output[0] if isinstance(output, tuple) else output
        self.add_nfe(len(x_t) * (3 if first.requires_grad else 1))
        return output

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        """Images (batch, 3, height, width) in [0, 1] of latents; `grad` lets a reward's gradient through."""
        with torch.set_grad_enabled(grad):
            images: Tensor = by_rows(self._decode, latents)
        return images

    def encode_images(self, images: Tensor, grad: bool = False) -> Tensor:
        """Latents (posterior modes) of images (batch, 3, height, width) in [0, 1]."""
        with torch.set_grad_enabled(grad):
            latents: Tensor = by_rows(self._encode_images, images)
        return latents

    @contextlib.contextmanager
    def count_nfe(self) -> Iterator[Nfe]:
        """Count network evaluations inside `with`. Several counters may be open at once, and each counts."""
        counter = Nfe()
        self._counters.append(counter)
        try:
            yield counter
        finally:
            self._counters.remove(counter)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Counters opened before this `with` count nothing inside it: for checks and diagnostics."""
        before, self._counters = self._counters, []
        try:
            yield
        finally:
            self._counters = before

    def add_nfe(self, n: int) -> None:
        """Add n network evaluations to every open counter."""
        for counter in self._counters:
            counter.total += n

    def make_network(self, fields: dict[str, Any]) -> Any:
        """Another network of the same class, with these config fields and fresh weights of the global generator."""
        return type(self.network)(**fields)

    @property
    def device(self) -> torch.device:
        first: Tensor = next(self.network.parameters())
        return first.device

    def free_memory(self) -> float:
        """Bytes that are free on the network's device."""
        if self.device.type == "cuda":
            return float(torch.cuda.mem_get_info(self.device)[0])
        return float(psutil.virtual_memory().available)

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's frozen weights; diffusers' own property walks over all of them at every call."""
        first: Tensor = next(self.network.parameters())
        return first.dtype
