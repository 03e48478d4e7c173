"""What every family shares: conditions, LoRA and full-weight training, the frozen reference, saving.

A family (flux.py, unet.py) adds encode, predict, decode and the time grid over its diffusers pipeline's own parts.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import psutil
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models.autoencoder import decoded, encoded
from fieldsmith.models.parts import by_rows
from fieldsmith.paths import Kind, Path, Prediction


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


@dataclass(frozen=True)
class LoraSpec:
    """A low-rank adapter on a named subset of a family's layers."""

    subset: str = "attention"  # a name from the family's SUBSETS
    rank: int = 16
    alpha: float | None = None  # scale = alpha / rank; None is alpha = rank
    dropout: float = 0.0
    seed: int = 0  # of the adapter's random half; the other half starts at zero


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


class Model:
    """A diffusers pipeline as one field. `network` is the denoiser; everything else of the pipeline stays frozen."""

    family: ClassVar[str]
    SUBSETS: ClassVar[dict[str, str]]  # name -> regular expression over the network's module names
    PART: ClassVar[str] = "transformer"  # the network's name in its pipeline, and so in the keys of its LoRA files
    DEFAULT_SUBSET: ClassVar[str] = "attention"  # what trains where a config names no subset
    ERASE_SUBSET: ClassVar[str] = "attention"  # and what erase trains then
    UNREAD: ClassVar[str] = ""  # regular expression of names whose results nothing reads; LAST: the last block's index
    DORMANT: ClassVar[str] = "lora_A"  # in the names of parameters without gradient at the start, where B is 0
    resolution: int | None = None  # pixels a side of an image; None where images are not square
    clip: float | None = None  # radius to which predicted x_0 is clipped while sampling
    path: Path
    kind: Kind  # what the network predicts
    pipeline: Any
    network: Any  # an nn.Module with diffusers' config, whose fields no checker knows

    def __init__(self, pipeline: Any, network: nn.Module, name: str):
        self.pipeline, self.network, self.name = pipeline, network, name
        self._counters: list[Nfe] = []  # those that are open now
        self.spec: LoraSpec | None = None
        self._off = False
        self._scale = 1.0  # of the adapter's effect
        self._base: dict[str, nn.Parameter] = {}  # the originals of unfrozen weights
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)

    @classmethod
    def of_folder(cls, pipeline: Any, name: str, resolution: int | None, folder: pathlib.Path | None) -> Model:
        """The model over a pipeline that was loaded from a folder, which may say more than diffusers reads."""
        return cls(pipeline, name, resolution)  # type: ignore[call-arg, arg-type]

    @classmethod
    def components(cls, source: str, **options: Any) -> dict[str, Any]:
        """Parts of the pipeline at `source` that diffusers cannot load by itself here, by name."""
        return {}

    # what a family must say

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

    # what it must say only where it differs

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

    # training

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

    def _modules(self, subset: str) -> list[str]:
        if subset not in self.SUBSETS:
            known = ", ".join(self.SUBSETS)
            raise InputError(
                f"layer subset '{subset}' is unknown for family {self.family}; "
                f"known: {known} (and 'all' for training full weights)"
            )
        pattern = re.compile(self.SUBSETS[subset])
        linear = [n for n, m in self.network.named_modules() if isinstance(m, nn.Linear) and not self._unread(n)]
        found = [n for n in linear if pattern.fullmatch(n)]
        if not found:
            raise InputError(f"layer subset '{subset}' matches no layer of {self.name}")
        return found

    def _unread(self, name: str) -> bool:
        """Whether what a layer or parameter of that name makes is read by nothing, so that it could never learn."""
        last = len(getattr(self.network, "transformer_blocks", ())) - 1
        return re.fullmatch(self.UNREAD.replace("LAST", str(last)), name) is not None

    def adapt(self, spec: LoraSpec) -> None:
        """Inject a LoRA that starts as zero; only its weights train from here on.

        Raises InputError at an unknown subset, ValueError where training is under way already.
        """
        self._refuse_second_training()
        config = LoraConfig(
            r=spec.rank, lora_alpha=spec.rank if spec.alpha is None else spec.alpha,  # type: ignore[arg-type]
            lora_dropout=spec.dropout, target_modules=self._modules(spec.subset),
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)  # peft draws from the global generator
            inject_adapter_in_model(config, self.network)
        self._adapter_attached(spec)

    def _adapter_attached(self, spec: LoraSpec) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = parameter.data.float()  # peft gives an adapter its layer's type, such as bf16
        self.network.eval()
        self.spec, self._scale = spec, 1.0
        if processes.sharded():
            _shard(self.network)

    @property
    def trains(self) -> bool:
        """Whether an adapter or unfrozen weights are attached."""
        return bool(self.spec or self._base)

    def _refuse_second_training(self) -> None:
        if self.trains:
            raise ValueError(f"{self.name} is being trained already; call remove_training() or load a fresh model")

    def unfreeze(self, subset: str) -> None:
        """Train the full weights of a subset, or all that are read with 'all'; the originals stay for `reference`.

        Raises InputError at an unknown subset, ValueError where training is under way already.
        """
        self._refuse_second_training()
        if processes.sharded():
            raise InputError("FSDP holds parts of weights here, so that full weights cannot train; train a LoRA")
        if subset == "all":
            names = [name for name, _ in self.network.named_parameters() if not self._unread(name)]
        else:
            names = [
                f"{name}.{key}"
                for name in self._modules(subset)
                for key, _ in self.network.get_submodule(name).named_parameters(recurse=False)
            ]
        self._base = self._swap({n: nn.Parameter(self.network.get_parameter(n).detach().clone()) for n in names})

    def _swap(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Put parameters into the network by name; returns those that they displace.

        Whole objects move, never their data: a graph keeps the weights that it was built with.
        """
        displaced = {name: self.network.get_parameter(name) for name in parameters}
        for name, parameter in parameters.items():
            owner, _, key = name.rpartition(".")
            setattr(self.network.get_submodule(owner), key, parameter)
        return displaced

    def remove_training(self) -> None:
        """Back to the model as loaded, to the last bit: adapter taken out, original weights put back."""
        for name, layer in self._tuners().items():
            self.network.set_submodule(name, layer.get_base_layer())
        self.network.__dict__.pop("peft_config", None)
        self.network.__dict__.pop("_hf_peft_config_loaded", None)  # diffusers' own mark of an adapter
        self._swap(self._base)
        self.spec, self._scale, self._base = None, 1.0, {}
        self.network.requires_grad_(False)

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that training moves, by name. Ask outside `reference`, where unfrozen weights are away."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def dropout(self, on: bool) -> None:
        """Switch the adapter's dropout; the network itself always stays in eval mode."""
        for name, module in self.network.named_modules():
            if "lora_dropout" in name:
                module.train(on)

    def _tuners(self) -> dict[str, Any]:
        return {name: module for name, module in self.network.named_modules() if isinstance(module, BaseTunerLayer)}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen model, inside `with`: adapter off, or the original weights in place; re-entrant.

        Graphs built before, inside and after each keep their own weights, so a backward may run anywhere.
        """
        with self._turned(off=True):
            yield

    @contextlib.contextmanager
    def _turned(self, off: bool) -> Iterator[None]:
        """What was trained off or on, inside `with`, whatever it is outside; for a forward that is run again too."""
        if self._off == off:
            yield
            return
        layers = list(self._tuners().values())

        def turn(off: bool) -> None:
            self._base = self._swap(self._base)  # which holds the trained weights while the originals are in place
            # peft's enable_adapters would switch requires_grad too, and so lose the gradients of a backward in here
            for layer in layers:
                layer._disable_adapters = off
            self._off = off

        turn(off)
        try:
            yield
        finally:
            turn(not off)

    def scale_adapter(self, scale: float) -> None:
        """Multiply the adapter's effect: 0 is the base model, 1 what was trained."""
        for layer in self._tuners().values():
            layer.set_scale("default", scale)
        self._scale = scale

    # what the user ships

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's weights under peft's names, without the adapter's own name in them."""
        state = get_peft_model_state_dict(self.network)
        return {k: processes.full(v.detach()).contiguous() for k, v in state.items()}

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `adapter_state` gave. Raises InputError where names or shapes differ."""
        here = {k: tuple(v.shape) for k, v in self.adapter_state().items()}
        there = {k: tuple(v.shape) for k, v in state.items()}
        if here != there:
            odd = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))[0]
            raise InputError(
                f"the adapter's weights do not fit {self.name} at '{odd}'; use the subset and rank it was trained with"
            )
        set_peft_model_state_dict(self.network, state)

    def save(self, folder: str | pathlib.Path, merged: bool = False) -> None:
        """Write what diffusers loads as it is; the live model stays as it was.

        An adapter on a family that diffusers loads LoRA for: the LoRA alone. Everything else, and anything with
        `merged`: the whole pipeline, with the adapter's effect at its present scale inside the weights. Of several
        processes all call this and one writes.
        """
        state = self.adapter_state() if self.spec else {}
        if processes.is_main():
            self._write(pathlib.Path(folder), state, merged)
        processes.wait()

    def _write(self, folder: pathlib.Path, state: dict[str, Tensor], merged: bool) -> None:
        if self.spec and not merged and hasattr(self.pipeline, "save_lora_weights"):
            lora: dict[str, Any] = {
                f"{self.PART}_lora_layers": state,
                f"{self.PART}_lora_adapter_metadata": self._adapter_metadata(),
            }
            self.pipeline.save_lora_weights(folder, **lora)
            return
        if processes.sharded():
            raise InputError(
                "FSDP holds parts of weights here, so that no pipeline can be written; save the adapter alone"
            )
        with self._merged():
            self._save_pipeline(folder)

    def _save_pipeline(self, folder: pathlib.Path) -> None:
        self.pipeline.save_pretrained(folder)

    @contextlib.contextmanager
    def _merged(self) -> Iterator[None]:
        """Inside: plain layers with merged weights, as diffusers names them; afterwards the adapter is back.

        The base weights are set aside instead of merged in place, because subtracting again would not be exact.
        """
        tuners = self._tuners()
        aside = {name: layer.get_base_layer().weight for name, layer in tuners.items()}
        marks = {k: self.network.__dict__.pop(k) for k in ("peft_config", "_hf_peft_config_loaded")
                 if k in self.network.__dict__}  # fmt: skip
        try:
            for name, layer in tuners.items():
                plain = layer.get_base_layer()
                with torch.no_grad():
                    sum_ = aside[name] + layer.get_delta_weight("default").to(aside[name])
                plain.weight = nn.Parameter(sum_, requires_grad=False)
                self.network.set_submodule(name, plain)
            yield
        finally:
            for name, layer in tuners.items():
                layer.get_base_layer().weight = aside[name]
                self.network.set_submodule(name, layer)
            self.network.__dict__.update(marks)

    def _adapter_metadata(self) -> dict[str, Any]:
        """The LoraConfig fields that decide what the weights mean, at the adapter's present scale."""
        config: LoraConfig = self.network.peft_config["default"]
        metadata: dict[str, Any] = {
            "r": config.r,
            "lora_alpha": config.lora_alpha * self._scale,
            "target_modules": sorted(self._tuners()),
        }
        if config.rank_pattern:
            metadata["rank_pattern"] = dict(config.rank_pattern)
        if config.alpha_pattern:
            metadata["alpha_pattern"] = {k: v * self._scale for k, v in config.alpha_pattern.items()}
        if config.use_rslora:
            metadata["use_rslora"] = True
        return metadata


def _shard(network: nn.Module) -> None:
    """Each process keeps a part of every weight, and gathers a block's whole weights while the block runs."""
    from torch.distributed.fsdp import fully_shard

    for blocks in (part for part in network.children() if isinstance(part, nn.ModuleList)):
        for block in blocks:
            fully_shard(block)
    fully_shard(network)
