"""What every family shares: conditions, what a model is asked, the count of its evaluations. Training: weights.py.

A family (flux.py, unet.py) adds encode, predict, decode and the time grid over its diffusers pipeline's own parts.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor, nn

from fieldsmith.errors import InputError, NotFiniteError
from fieldsmith.models.autoencoder import decoded, encoded
from fieldsmith.models.weights import LoraSpec as LoraSpec  # a model is adapted by it, so it is had from here too
from fieldsmith.models.weights import Trainable
from fieldsmith.paths import Kind, Path, Prediction

FEW = 4  # prompts or times that a message names
STATES = 2**18  # numbers in the states that a network is asked for at once where nothing else was said: 4 at 512 pixels


@dataclass(frozen=True)
class Condition:
    """What a prompt (or class) became: named tensors that share their first dimension, one row a sample.

    `words` are the rows' prompts, for messages alone; () where they are not known.
    """

    parts: dict[str, Tensor]
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: Any) -> Condition:
        """The rows picked by an index tensor, slice or list."""
        return Condition({name: part[rows] for name, part in self.parts.items()}, picked(self.words, rows))

    def repeat(self, n: int) -> Condition:
        """A condition of one row as n rows that share memory; n rows stay as they are."""
        if len(self) == n:
            return self
        if len(self) != 1:
            raise ValueError(f"a condition of {len(self)} rows cannot serve a batch of {n}; encode 1 or {n} prompts")
        return Condition({name: part.expand(n, *part.shape[1:]) for name, part in self.parts.items()}, self.words * n)


def picked(words: tuple[str, ...], rows: Any) -> tuple[str, ...]:
    """The words of rows that an index tensor, slice or list picks."""
    if isinstance(rows, slice) or not words:
        return words[rows] if words else ()
    if isinstance(rows, Tensor):
        rows = (rows.nonzero().flatten() if rows.dtype is torch.bool else rows).tolist()
    return tuple(words[row] for row in rows)


def stack(conditions: Sequence[Condition]) -> Condition:
    """Conditions one below the other; prompts of fewer tokens are padded with zeros, in their masks too."""
    words = [c.words for c in conditions]
    return Condition(
        {name: _rows([c.parts[name] for c in conditions]) for name in conditions[0].parts},
        tuple(word for some in words for word in some) if all(words) else (),
    )


def _rows(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim == 1 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    padded = [part.new_zeros(len(part), longest, *part.shape[2:]) for part in parts]
    for wide, part in zip(padded, parts, strict=True):
        wide[:, : part.shape[1]] = part
    return torch.cat(padded)


def _rows_of(value: Tensor | Condition) -> int:
    return 0 if isinstance(value, Tensor) and not value.ndim else len(value)


def check_resolution(model: Model, resolution: int | None) -> None:
    """Raises InputError where a config asks for another resolution than the model was loaded with."""
    if resolution not in (None, model.resolution):
        raise InputError(
            f"resolution={resolution}: {model.name} was loaded at {model.resolution} pixels; leave it out, or load the "
            f"model with resolution={resolution}"
        )


def predict_rows(
    model: Model, x: Tensor, t: Tensor, conditions: Any, rows: Tensor, guidance: float | None
) -> Prediction:
    """The network's prediction at x (n, ...) and t (n,) or () under rows (n,) of `conditions` (a Condition, Prompts).

    Without gradients at most `model.chunk` rows are looked up and asked for at once: an embedding may be larger than
    the state that it goes with.
    """
    t = t.to(x).expand(len(x))
    if torch.is_grad_enabled() or len(x) <= model.chunk:
        return model.predict(x, t, conditions[rows], guidance)
    parts = [
        model.predict(x[at], t[at], conditions[rows[at]], guidance) for at in torch.arange(len(x)).split(model.chunk)
    ]
    return Prediction(parts[0].kind, torch.cat([part.value for part in parts]), x, t, parts[0].path)


def check_finite(what: str, output: Tensor, given: Mapping[str, Tensor], about: Callable[[Tensor], str]) -> None:
    """Raises NotFiniteError where an output (n, ...) holds NaN or infinity, which names the first of `given` that does
    already, and what `about` says of the rows (k,) at fault."""
    if bool(output.detach().isfinite().all()):
        return
    name, wrong = next(((n, x) for n, x in given.items() if not bool(x.detach().isfinite().all())), (what, output))
    fine = wrong.detach().isfinite().reshape(len(wrong), -1)
    rows = (~fine.all(1)).nonzero().flatten()
    value = wrong.detach().reshape(len(wrong), -1)[~fine][0].item()
    raise NotFiniteError(f"the {name} holds {value} in {len(rows)} of {len(wrong)} rows{about(rows.cpu())}")


def _some(values: Sequence[Any]) -> str:
    """The first few different ones."""
    different = list(dict.fromkeys(values))
    return ", ".join(map(str, different[:FEW])) + (f" and {len(different) - FEW} more" if len(different) > FEW else "")


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def check_size(model: Model, decodes: bool = True) -> None:
    """Raises InputError where not even one state and (`decodes`) its image fit the device's memory.

    Before either is allocated: a system without memory may end the process instead of saying so.
    """
    pixels = (model.resolution or 0) ** 2
    channels = getattr(getattr(model.pipeline, "vae", None), "config", {}).get("block_out_channels", (3,))
    need = 4 * (math.prod(model.latent_shape) + (pixels * max(3, channels[0]) if decodes else 0))
    free = free_memory(model.device)
    if need > free:
        size = f"resolution {model.resolution}" if model.resolution else f"states {tuple(model.latent_shape)}"
        raise InputError(
            f"{size} of {model.name}: one image alone takes {need / 1e9:,.0f} GB or more, and {free / 1e9:,.1f} GB are "
            "free; lower the resolution"
        )


def check_kept(model: Model, states: Mapping[str, int]) -> None:
    """Raises InputError where as many states as a setting asks for, by its name, are more than the memory that is free.

    Nothing is allocated yet; what a network needs beside its states is the preflight's matter.
    """
    free = model.free_memory()
    for name, n in states.items():
        need = 4 * n * math.prod(model.latent_shape)
        if need > free:
            raise InputError(
                f"{name} ask for {n:,} states of {model.name} at once, which alone take {need / 1e9:,.1f} GB, and "
                f"{free / 1e9:,.1f} GB are free; lower {'one of them' if ' x ' in name else 'it'}"
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
        self._chunk: int | None = None
        self._asked: tuple[Tensor, Any] | None = None  # times of the last forward, and what tells its prompts
        self.precision: torch.dtype | None = None  # in which the network computes where it is not that of its weights

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

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises InputError at what the model does not know."""
        self.encode(prompts)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        """The network's prediction at x_t (batch, ...) and t (batch,) or (); guidance None or 1 is off."""
        raise NotImplementedError

    def _forward(self, x_t: Tensor, t: Tensor, *condition: Any) -> Any:
        """The raw network at x_t (batch, ...), one row of t and condition each: a Tensor, or a tuple of them and None.

        `predict` asks it through `forward`, which counts the rows and keeps to `chunk`.
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
        """The raw network at x_t (batch, ...), one row of t and condition each; its evaluations are counted.

        Without gradients it is asked for at most `chunk` rows at once.
        """
        self._asked = t, next((one.words if isinstance(one, Condition) else one for one in condition), ())
        lower = torch.autocast(self.device.type, self.precision) if self.precision else contextlib.nullcontext()
        with lower:
            output = self._by_chunks(self._forward, x_t, t, *condition)
        parts = output if isinstance(output, tuple) else (output,)
        first = parts[0]
        given = {"network's state x_t": x_t}
        for one in condition:
            if isinstance(one, Condition):
                given |= {f"prompts' part '{name}'": part for name, part in one.parts.items()}
        for part in parts:
            if part is not None:
                check_finite("network's output", part, given, self.asked)
        self.add_nfe(len(x_t) * (3 if first.requires_grad else 1))
        return output

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        """Images (batch, 3, height, width) in [0, 1] of latents; `grad` lets a reward's gradient through."""
        with torch.set_grad_enabled(grad):
            images: Tensor = self._by_chunks(self._decode, latents)
        check_finite("autoencoder's image", images, {"latent to decode": latents}, lambda _: self.asked())
        return images

    def encode_images(self, images: Tensor, grad: bool = False) -> Tensor:
        """Latents (posterior modes) of images (batch, 3, height, width) in [0, 1]."""
        with torch.set_grad_enabled(grad):
            latents: Tensor = self._by_chunks(self._encode_images, images)
        check_finite("autoencoder's latent", latents, {"image to encode": images}, lambda rows: "")
        return latents

    def asked(self, rows: Tensor | None = None) -> str:
        """At which times and under which prompts the network was asked last, or in some rows (k,) of that; '' where it
        was not."""
        if self._asked is None:
            return ""
        t, words = self._asked[0].detach().flatten().cpu(), self.prompts_of(self._asked[1])
        if rows is not None:
            t, words = t[rows] if len(t) > int(rows.max()) else t, picked(words, rows)
        prompts = f" under {_some([repr(word[:80]) for word in words])}" if words else ""
        return f", at t={_some([f'{time:.4g}' for time in t.tolist()])}{prompts}"

    def prompts_of(self, rows: Any) -> tuple[str, ...]:
        """The prompts of what `forward` is given beside states and times: their words, or a family's own rows (n,)."""
        return rows if isinstance(rows, tuple) else ()

    def _by_chunks(self, function: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
        """function(x, *rest), which treats rows apart; without gradients at most `chunk` rows at once.

        Arguments with as many rows as x are split with it, all others are given as they are.
        """
        n = len(x)
        if torch.is_grad_enabled() or n <= self.chunk:
            return function(x, *rest)
        along = [isinstance(value, (Tensor, Condition)) and _rows_of(value) == n for value in rest]
        outputs = []
        for start in range(0, n, self.chunk):
            rows = slice(start, start + self.chunk)
            some = [value[rows] if split else value for value, split in zip(rest, along, strict=True)]
            outputs.append(function(x[rows], *some))
        if isinstance(outputs[0], tuple):
            return tuple(None if part[0] is None else torch.cat(part) for part in zip(*outputs, strict=True))
        return torch.cat(outputs)

    @property
    def dim(self) -> int:
        """Numbers in one state."""
        return self.noise(1, torch.Generator().manual_seed(0)).numel()

    @property
    def chunk(self) -> int:
        """The most states that are asked for at once: what was set, or fewer the larger a state is."""
        return self._chunk or min(256, max(1, STATES // self.dim))

    @chunk.setter
    def chunk(self, states: int | None) -> None:
        self._chunk = states

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

    @property
    def null(self) -> Condition:
        """What guidance leads away from, one row. Raises InputError where the model knows no such condition."""
        return self.encode([""])

    def make_network(self, fields: dict[str, Any]) -> Any:
        """Another network of the same class, with these config fields and fresh weights of the global generator."""
        return type(self.network)(**fields)

    @property
    def device(self) -> torch.device:
        first: Tensor = next(self.network.parameters())
        return first.device

    def free_memory(self) -> float:
        """Bytes that are free on the network's device."""
        return free_memory(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's frozen weights; diffusers' own property walks over all of them at every call."""
        first: Tensor = next(self.network.parameters())
        return first.dtype
