"""A model from its JSON configs alone: whole in shape and type, without one weight.

In: what `models.load` takes. Out: a `Model` whose weights are fake tensors, which cost nothing; of a hub id only JSON
is fetched. It predicts and decodes fake states of the right shapes; prompts become `Model.dummy_condition`.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fieldsmith import models
from fieldsmith.errors import InputError
from fieldsmith.models import shrink, variance_head
from fieldsmith.models.core import Condition, LoraSpec, Model, stack
from fieldsmith.models.ddpm import ClassDDPM
from fieldsmith.models.prompted import Prompted

FETCHED = ("model_index.json", "*.json", "*/config.json", "*/*_config.json", "*/*.index.json")


@dataclass(frozen=True)
class Blueprint:
    """A model without weights, and the bytes of those that loading it would download."""

    model: Model
    downloads: int


@dataclass(frozen=True)
class Words:
    """All that a pipeline asks of a tokenizer when it is put together."""

    model_max_length: int


def blueprint(name: str | pathlib.Path, resolution: int | None = None, dtype: torch.dtype | None = None) -> Blueprint:
    """As `models.load`, in seconds and without memory. Raises InputError in the same words."""
    name = str(name)
    folder = models.pipeline_folder(name)
    with models._quiet():
        index = models._index(name, folder)
        family = models._family(name, index)
        if folder:
            models._check_components(name, folder, index)
        inside = folder or _fetched(name)
        try:
            parts, downloads = _parts(inside, index, dtype or torch.float32)
            pipeline = _pipeline(index, parts)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"'{name}' could not be read, is it whole? ({models._first_line(error)})") from error
    model: Model = family.model_class().of_folder(pipeline, name, resolution, inside)
    if isinstance(model, Prompted):
        mode = next(model.network.parameters()).fake_mode
        row = Condition(
            {
                key: mode.from_tensor(part) if part.is_floating_point() else part
                for key, part in model.dummy_condition().parts.items()
            }
        )
        model.dummy_condition = lambda: row  # type: ignore[method-assign]
        model.encode = lambda prompts, grad=False: stack([row] * len(prompts))  # type: ignore[method-assign]
    return Blueprint(model, 0 if folder else downloads)


def _fetched(name: str) -> pathlib.Path:
    """The JSON files of a hub id. Raises InputError where they cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:
        raise InputError(f"the configs of '{name}' could not be fetched from the hub ({models._first_line(error)}); "
                         "check the network, or give a folder") from error  # fmt: skip


def _parts(folder: pathlib.Path, index: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """Every component by name, and the bytes of their weights on the hub."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # schedulers and tables of ids are real
    found: dict[str, Any] = {}
    downloads = 0
    for name, made_by in index.items():
        if name.startswith("_") or not isinstance(made_by, list):
            continue
        library, kind = made_by
        if kind is None:
            found[name] = None
            continue
        inside = folder / name
        if (inside / "config.json").is_file():
            config = json.loads((inside / "config.json").read_text(encoding="utf-8"))
            with torch.device("meta"):
                part = _network(getattr(importlib.import_module(library), kind), config)
            found[name] = faked(part.to(dtype), mode)
            downloads += _on_the_hub(inside, config, part)
        elif "Scheduler" in kind:
            import diffusers

            found[name] = getattr(diffusers, kind).from_pretrained(inside, local_files_only=True)
        else:  # a tokenizer or processor, of which only the length of a prompt is asked
            found[name] = Words(_text_length(inside))
    return found, downloads


def _network(kind: Any, config: dict[str, Any]) -> Any:
    if hasattr(kind, "from_config"):  # diffusers
        return kind.from_config(config)
    return kind(kind.config_class.from_dict(config))


def adapt(model: Model, spec: LoraSpec) -> None:
    """`Model.adapt` of a blueprint: peft moves its layers about, which shapes bear and fake tensors do not."""
    mode = next(model.network.parameters()).fake_mode
    _replace(model.network, lambda p: torch.empty_like(p, device="meta"))
    with torch.device("meta"):
        model.adapt(spec)
    faked(model.network, mode)


def learner(model: Model, fields: dict[str, Any], scales: tuple[float, ...] | None = None) -> Model:
    """A student of a blueprint with these config fields (`shrink.fields_for`), in float32."""
    mode = next(model.network.parameters()).fake_mode
    with torch.device("meta"):
        network = type(model.network)(**fields)
    return shrink.student_of(model, faked(network, mode), scales)


def headed(model: ClassDDPM) -> ClassDDPM:
    """A blueprint with the variance head that `variance_head.with_variance_head` would give it."""
    mode = next(model.network.parameters()).fake_mode
    fields = {k: v for k, v in model.network.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        network = type(model.network)(**fields | {"out_channels": 2 * model.channels})
    return model.of(variance_head.pipeline_with(model, faked(network, mode)))


def faked(part: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with its shapes on the meta device as fake tensors of the CPU, where attention has a fused kernel."""
    _replace(part, lambda p: FakeTensor(mode, p, torch.device("cpu")))
    return part


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
    output = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return int(min(output.get("model_max_length", 512), 1_000_000))


def _pipeline(index: dict[str, Any], parts: dict[str, Any]) -> Any:
    """A pipeline of the index's class, with its settings."""
    import diffusers

    kind = getattr(diffusers, index["_class_name"])
    known, _ = kind._get_signature_keys(kind)
    settings = {k: v for k, v in index.items() if k in known and k not in parts and not k.startswith("_")}
    optional = {k: v for k, v in index.items() if k not in parts and not k.startswith("_") and not isinstance(v, list)}
    return kind(**parts, **{**optional, **settings})
