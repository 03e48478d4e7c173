"""What a pipeline's folder promises, checked before a weight is read: parts, configs, and the shapes in their files.

A folder may come from anybody. Its index names classes of diffusers and transformers alone, so that no code of its own
is imported; its weights are safetensors; its configs and weights agree, by the headers of their files. Then
`check_sound` looks for NaN and infinity in what was loaded.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from fieldsmith.errors import InputError
from fieldsmith.read import read_json

LIBRARIES = ("diffusers", "transformers")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
LARGEST = 2**40  # of a number in a config
LIMITS = {
    "layers": (0, 1_000),
    "num_train_timesteps": (1, 100_000),
    "lambda_min": (-math.inf, LARGEST),
}  # of entries with such words in their names
OLD_ATTENTION = r"\.(query|key|value|proj_attn)\.weight$"  # which diffusers renames as it loads
SAVE_AGAIN = "download or save it again"

Shapes = Mapping[str, tuple[int, ...]]


def read_index(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """model_index.json. Raises InputError where there is none."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise InputError(f"'{name}' is not a diffusers pipeline folder: it has no model_index.json")
    index = read_json(file, "pipeline's index")
    return index if isinstance(index, dict) else {}


def check_index(name: str, index: Mapping[str, Any]) -> None:
    """Raises InputError at a part that is no class of diffusers or transformers: it would be code of somebody's own."""
    for part, made_by in index.items():
        if part.startswith("_") or not isinstance(made_by, list) or not any(made_by):
            continue  # a setting, or a component that the pipeline does without
        library, kind = made_by if len(made_by) == 2 else ("", "")
        known = library in LIBRARIES and isinstance(kind, str) and kind.isidentifier()
        if not (known and inspect.isclass(getattr(importlib.import_module(library), kind, None))):
            raise InputError(
                f"model_index.json of '{name}' makes its {part} by {_short(made_by)}; parts must be classes of "
                f"{' or '.join(LIBRARIES)}, since code that comes with a model is never run"
            )


def check_components(name: str, folder: pathlib.Path, index: Mapping[str, Any]) -> None:
    """Raises InputError where a component is missing, or its config and its weights, in safetensors, disagree."""
    for part, made_by in index.items():
        if part.startswith("_") or not isinstance(made_by, list) or not all(made_by):
            continue
        inside = folder / part
        if not inside.is_dir() or not any(inside.iterdir()):
            raise InputError(f"'{name}' is not whole: its component '{part}' is missing; {SAVE_AGAIN}")
        for file in inside.glob("scheduler_config.json"):
            _config(file)
        if not (inside / "config.json").is_file():
            if any(inside.glob("*.safetensors")):
                raise InputError(f"'{name}' is not whole: '{part}' has weights and no config.json; {SAVE_AGAIN}")
            continue  # schedulers and tokenizers hold no weights
        if not any(inside.glob("*.safetensors")):
            pickled = next((file for file in inside.iterdir() if file.suffix in PICKLES), None)
            if pickled:
                raise InputError(
                    f"'{name}' holds {part}/{pickled.name}, which is not safetensors and could run code; convert it "
                    "where you trust it: pipe.save_pretrained(folder, safe_serialization=True)"
                )
            raise InputError(f"'{name}' is not whole: '{part}' has no weights; {SAVE_AGAIN}")
        _check_shapes(inside, getattr(importlib.import_module(made_by[0]), made_by[1]))


def _config(file: pathlib.Path, kind: Any = None) -> dict[str, Any]:
    """A config's entries. Raises InputError where it holds none, or numbers that no network or scheduler has."""
    config = read_json(file, "config")
    if not isinstance(config, dict):
        raise InputError(f"config '{file}' holds {_short(config)} and no entries; {SAVE_AGAIN}")
    usual = inspect.signature(kind.__init__).parameters if kind else {}
    for entry, value in config.items():
        default = usual[entry].default if entry in usual else None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        word = isinstance(default, (int, float)) and not isinstance(default, bool) and isinstance(value, (str, dict))
        limits = next((limits for words, limits in LIMITS.items() if words in entry), (-LARGEST, LARGEST))
        if word or (number and not limits[0] <= value <= limits[1]):
            raise InputError(f"config '{file}' has {entry} = {_short(value)}, which cannot be meant; {SAVE_AGAIN}")
    return config


def _check_shapes(folder: pathlib.Path, kind: Any) -> None:
    """Raises InputError where the config of a component makes another network than its files hold."""
    file = folder / "config.json"
    ours = hasattr(kind, "from_config")  # diffusers' kind of network, whose files have the network's own names
    config = _config(file, kind if ours else None)
    if config.get("quantization_config"):
        return  # packed numbers have shapes of their own
    stored = {name: (shape, part) for part in sorted(folder.glob("*.safetensors")) for name, shape in shapes_in(part)}
    made, own = _made(file, kind, config)
    base = getattr(kind, "base_model_prefix", "")
    known = {}
    for name, (shape, part) in stored.items():
        spelt = next((one for one in (name, f"{base}.{name}", name.removeprefix(f"{base}.")) if one in made), None)
        if spelt:
            known[spelt] = name
        if spelt and made[spelt] != shape:
            raise InputError(
                f"'{file}' and '{part}' disagree: by the config {name} is {_size(made[spelt])}, in the weights "
                f"{_size(shape)}; {SAVE_AGAIN}"
            )
    if not known:
        raise InputError(f"the weights in '{folder}' are of another network than its config.json; {SAVE_AGAIN}")
    # transformers renames what older versions wrote, but leaves the ends of names; diffusers did so with attention
    ends = set() if ours else {_end(name) for name in stored}
    old = ours and any(re.search(OLD_ATTENTION, name) for name in stored)
    for name in () if old else own:
        if name not in known and _end(name) not in ends:
            raise InputError(
                f"'{file}' asks for {name} {_size(made[name])}, which the weights in '{folder}' lack; {SAVE_AGAIN}"
            )
    blocks, layers = {name.partition(".")[0] for name in made}, {_layer(name) for name in made}
    spare = "|".join(getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()) or r"(?!)"
    for name in stored if ours else ():
        read = name.partition(".")[0] in blocks and _layer(name) in layers | {""}
        if not read and not re.search(spare, name):
            raise InputError(
                f"the weights in '{folder}' hold {name}, for which its config.json makes no layer; {SAVE_AGAIN}"
            )


def _made(file: pathlib.Path, kind: Any, config: dict[str, Any]) -> tuple[Shapes, set[str]]:
    """Shapes by name of what the config makes, without memory, and the names that a file of its weights must hold."""
    import torch  # late, as in models

    try:
        with torch.device("meta"):
            network = (
                kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class.from_dict(config))
            )
    except Exception as error:  # whatever a constructor makes of entries that it does not expect
        raise InputError(f"config '{file}' makes no {kind.__name__}: {first_sentence(error)}; {SAVE_AGAIN}") from error
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    shared = [str(key) for key in getattr(network, "_tied_weights_keys", None) or ()]  # with another weight
    own = {name for name, _ in network.named_parameters() if not any(re.search(key, name) for key in shared)}
    return shapes, own & shapes.keys()


def shapes_in(file: pathlib.Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a safetensors file, from its header. Raises InputError where it is none."""
    from safetensors import safe_open  # late

    try:
        with file.open("rb") as start:
            length = struct.unpack("<Q", start.read(8))[0] if file.stat().st_size >= 8 else 0
        if not 0 < length <= file.stat().st_size:
            raise InputError(f"'{file}' is no safetensors file, or was cut short; {SAVE_AGAIN}")
        with safe_open(file, "pt") as weights:  # type: ignore[no-untyped-call]
            for name in weights.keys():  # noqa: SIM118
                yield name, tuple(weights.get_slice(name).get_shape())
    except InputError:
        raise
    except Exception as error:  # safetensors has its own
        raise InputError(f"'{file}' is no whole safetensors file ({first_sentence(error)}); {SAVE_AGAIN}") from error


def check_sound(name: str, parts: Mapping[str, Any]) -> None:
    """Raises InputError at NaN or infinity in a component's weights, with its name, and at weights that are not there.

    `parts`: modules by name, as a pipeline has them.
    """
    import torch  # late

    for part, module in parts.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for key, weight in (*module.named_parameters(), *module.named_buffers()):
            own = weight.to_local() if hasattr(weight, "to_local") else weight
            if own.is_meta:
                raise InputError(f"'{name}' is not whole: the weights of its {part} lack {key}; {SAVE_AGAIN}")
            # a sum is NaN or infinite if a number is; only then is it worth a look at each
            if own.is_floating_point() and own.numel() and not torch.isfinite(own.sum(dtype=torch.float32)):
                bad = own.numel() - int(torch.isfinite(own).sum())
                if bad:
                    raise InputError(
                        f"{bad} of {own.numel()} numbers of {key} in the {part} of '{name}' are NaN or infinite; "
                        f"{SAVE_AGAIN}"
                    )


def first_sentence(error: Exception) -> str:
    """What another library says, up to its first full stop, in one line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return re.split(r"[.!?]\s+(?=[A-Z\"'`(])", lines[0])[0][:200].rstrip(".:")


def _end(name: str) -> str:
    """A weight's name from its layer's number on, or its last two words."""
    match = re.search(r"\w+\.\d+\.(?:[^.]*[^\d.][^.]*\.?)+$", name)
    return match[0] if match else ".".join(name.split(".")[-2:])


def _layer(name: str) -> str:
    """'blocks.3' of 'blocks.3.norm.weight'."""
    match = re.match(r"\w+\.\d+(?=\.)", name)
    return match[0] if match else ""


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
