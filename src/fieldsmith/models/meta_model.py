"""A model from its JSON configs alone: whole in shape and type, without one weight.

In: what `models.load` takes. Out: a `Model` whose weights are fake tensors, which cost nothing; of a hub id only JSON
is fetched. Inside its `rehearsal` a run's own Python works on it; prompts become `Model.dummy_condition`.
"""

from __future__ import annotations

import importlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fieldsmith import models
from fieldsmith.errors import InputError
from fieldsmith.models import folders
from fieldsmith.models.core import Condition, LoraSpec, Model, check_size, stack
from fieldsmith.models.export import Adapter
from fieldsmith.models.prompted import Prompted
from fieldsmith.models.rehearsal import Rehearsal

FETCHED = ("model_index.json", "*.json", "*/config.json", "*/*_config.json", "*/*.index.json")


@dataclass(frozen=True)
class MetaModel:
    """A model without weights, what rehearses with it, and the bytes of weights that loading it would download."""

    model: Model
    rehearsal: Rehearsal
    downloads: int


@dataclass(frozen=True)
class Words:
    """What is asked of a tokenizer: the length of a prompt, and a token a word with a mark of the end."""

    model_max_length: int
    bos_token_id: int = 0
    eos_token_id: int = 0
    pad_token_id: int = 0

    def __call__(self, prompts: list[str], **_: Any) -> Any:
        return Tokens([[*range(1, len(prompt.split()) + 1), 0] for prompt in prompts])


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer gives."""

    input_ids: list[list[int]]


class Meta(Model):
    """What a model's class does otherwise where its weights are shapes alone."""

    rehearsal: ClassVar[Rehearsal]
    _drops = False

    @property
    def _state(self) -> Any:
        checkpointed = getattr(self.network, "gradient_checkpointing", False)
        return id(self.network), self.spec, len(self._base), self._off, self._drops, checkpointed

    def dropout(self, on: bool) -> None:
        super().dropout(on)
        self._drops = on

    def free_memory(self) -> float:
        return math.inf  # a plan says what is needed, whatever this machine has

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        one = super().noise(1, generator)
        return self.rehearsal.fake(one).new_empty(n, *one.shape[1:])

    def adapt(self, spec: LoraSpec) -> None:
        """peft moves its layers about, which tensors on the meta device bear and fake ones do not."""
        with _disable_current_modes():
            _replace(self.network, _on_meta)
            with torch.device("meta"):
                super().adapt(spec)
            faked(self.network, self.rehearsal.mode)

    def attach(self, adapter: Adapter, start: bool = False) -> None:
        """Its numbers stay where they are; those that the reference would keep are too few to count."""
        with _disable_current_modes():
            _replace(self.network, _on_meta)
            with torch.device("meta"):
                super().attach(adapter)
            faked(self.network, self.rehearsal.mode)

    def make_network(self, fields: dict[str, Any]) -> Any:
        with _disable_current_modes(), torch.device("meta"):
            network = super().make_network(fields)
        return _ready(network, self.rehearsal)

    def _forward(self, x_t: Tensor, t: Tensor, *condition: Any) -> Any:
        return self.rehearsal.call(super()._forward, self.network, (x_t, t, *condition), state=self._state)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.rehearsal.call(super()._decode, self.network, (latents,), state=self._state)

    def _encode_images(self, images: Tensor) -> Tensor:
        return self.rehearsal.call(super()._encode_images, self.network, (images,), state=self._state)


class MetaPrompted(Meta, Prompted):
    """A model of words without its text encoders' weights."""

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        parts = {
            name: self.rehearsal.fake(part) if part.is_floating_point() else part
            for name, part in self.dummy_condition().parts.items()
        }
        return stack([Condition(parts)] * len(prompts))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Whatever the words are: a plan reads no vocabulary."""


def meta_model(name: str | pathlib.Path, resolution: int | None = None, dtype: torch.dtype | None = None) -> MetaModel:
    """As `models.load`, in seconds and without memory. Raises InputError in the same words."""
    name = str(name)
    folder = models.pipeline_folder(name) or models.offline_copy(name)
    rehearsal = Rehearsal()
    with models._quiet():
        index = models._index(name, folder)
        family = models._family(name, index)
        folders.check_index(name, index)
        if folder:
            folders.check_components(name, folder, index)
        inside = folder or _fetched(name)
        try:
            parts, downloads = _parts(inside, index, dtype or torch.float32, rehearsal)
            pipeline = _pipeline(index, parts)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"'{name}' could not be read, is it whole? ({models._first_line(error)})") from error
    made_by = family.model_class()
    base = MetaPrompted if issubclass(made_by, Prompted) else Meta
    shapes: Any = type(made_by.__name__, (base, made_by), {"rehearsal": rehearsal})
    try:
        model: Model = shapes.of_folder(pipeline, name, resolution, inside)
    except InputError:
        raise
    except Exception as error:  # as in models.load
        raise InputError(
            f"the configs of '{name}' make no model ({models._first_line(error)}); save it again"
        ) from error
    check_size(model, decodes=False)  # a plan needs one state, and no image
    return MetaModel(model, rehearsal, 0 if folder else downloads)


def _fetched(name: str) -> pathlib.Path:
    """The JSON files of a hub id. Raises InputError where they cannot be had."""
    from huggingface_hub import snapshot_download  # needs the network, so only where it is used

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:
        raise InputError(f"the configs of '{name}' could not be fetched from the hub ({models._first_line(error)}); "
                         "check the network, or give a folder") from error  # fmt: skip


def _parts(
    folder: pathlib.Path, index: dict[str, Any], dtype: torch.dtype, rehearsal: Rehearsal
) -> tuple[dict[str, Any], int]:
    """Every component by name, and the bytes of their weights on the hub."""
    parts: dict[str, Any] = {}
    downloads = 0
    for name, made_by in index.items():
        if name.startswith("_") or not isinstance(made_by, list):
            continue
        library, kind = made_by
        inside = folder / name
        if kind is None:
            parts[name] = None
        elif (inside / "config.json").is_file():
            config = json.loads((inside / "config.json").read_text(encoding="utf-8"))
            with torch.device("meta"):
                part = _network(getattr(importlib.import_module(library), kind), config)
            parts[name] = _ready(part.to(dtype), rehearsal)
            downloads += _on_the_hub(inside, config, part)
        elif "Scheduler" in kind:
            made = getattr(importlib.import_module("diffusers"), kind)
            parts[name] = made.from_pretrained(inside, local_files_only=True)
        else:  # a tokenizer or processor
            parts[name] = Words(_text_length(inside))
    return parts, downloads


def _network(kind: Any, config: dict[str, Any]) -> Any:
    if hasattr(kind, "from_config"):  # diffusers
        return kind.from_config(config)
    return kind(kind.config_class.from_dict(config))


def _ready(part: nn.Module, rehearsal: Rehearsal) -> nn.Module:
    """A module on the meta device as one of fake tensors, to be rehearsed on."""

    def apply(function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        _replace(part, function)  # torch's own exchanges tensors in place, which fake ones do not bear
        return part

    faked(part, rehearsal.mode)._apply = apply  # type: ignore[method-assign]
    return rehearsal.watch(part)


def faked(part: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with its shapes on the meta device as fake tensors of the CPU, where attention has a fused kernel."""
    _replace(part, lambda p: p if isinstance(p, FakeTensor) else FakeTensor(mode, p, torch.device("cpu")))
    return part


def _on_meta(fake: Tensor) -> Tensor:
    """A fake tensor's shape on the meta device, with the same storage, so that its bytes go on being counted as they
    were."""
    empty = torch.empty(0, dtype=fake.dtype, device="meta")
    return empty.set_(fake.untyped_storage(), fake.storage_offset(), fake.shape, fake.stride())  # type: ignore[call-overload,no-any-return]


def _replace(part: nn.Module, by: Callable[[Tensor], Tensor]) -> None:
    """Every weight and buffer replaced; shared ones stay shared."""
    done: dict[int, Tensor] = {}
    for module in part.modules():
        for key, loose in list(vars(module).items()):  # tables that are no buffers, such as Qwen-Image's of angles
            if isinstance(loose, Tensor) and loose.device.type == "meta" and not isinstance(loose, FakeTensor):
                setattr(module, key, by(loose))
        for table, kind in ((module._parameters, True), (module._buffers, False)):
            for key, old in table.items():
                if old is None or (old.device.type != "meta" and not isinstance(old, FakeTensor)):
                    continue
                if id(old) not in done:
                    new = by(old.detach())
                    done[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if kind else new
                table[key] = done[id(old)]  # type: ignore[assignment]


def _on_the_hub(folder: pathlib.Path, config: dict[str, Any], part: Any) -> int:
    """What an index of shards says, else the parameters in the type that the config names, else in float32."""
    for file in folder.glob("*.safetensors.index.json"):
        return int(json.loads(file.read_text(encoding="utf-8"))["metadata"]["total_size"])
    half = str(config.get("torch_dtype", config.get("dtype"))) in ("bfloat16", "float16")
    return sum(p.numel() for p in part.parameters()) * (2 if half else 4)


def _text_length(folder: pathlib.Path) -> int:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return int(min(config.get("model_max_length", 512), 1_000_000))


def _pipeline(index: dict[str, Any], parts: dict[str, Any]) -> Any:
    """A pipeline of the index's class, with its settings."""
    made = getattr(importlib.import_module("diffusers"), index["_class_name"])
    known, _ = made._get_signature_keys(made)
    settings = {k: v for k, v in index.items() if k in known and k not in parts and not k.startswith("_")}
    optional = {k: v for k, v in index.items() if k not in parts and not k.startswith("_") and not isinstance(v, list)}
    return made(**parts, **{**optional, **settings})
