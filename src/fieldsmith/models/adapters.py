"""Adapters as people have them: files of any trainer, read by their keys, as changes of named layers.

In: a safetensors file, and the layers of a denoiser. Out: `Contents` of changes.py, or one sentence by the key. Keys
have any of the prefixes and separators that trainers give them, so a layer is found by its name with underscores for
dots, under diffusers' name or its checkpoint's own.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fieldsmith.errors import InputError
from fieldsmith.models.changes import Change, Contents, misfit, plain
from fieldsmith.models.export import Sizes, layout, part_of, swaps
from fieldsmith.models.families import family_of_lora, same_family

real = _disable_current_modes  # inside, tensors of files have numbers, also where a plan rehearses with shapes alone

# how a key ends -> what the tensor is; `.default` is the name that peft gives an adapter
_ENDS = tuple(
    (re.compile(rf"(?:{pattern})$"), what)
    for pattern, what in (
        (r"\.lora_(?:down|A)(?:\.default)?\.weight|\.lora\.down\.weight", "down"),
        (r"\.lora_(?:up|B)(?:\.default)?\.weight|\.lora\.up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.lora_(?:up|B)(?:\.default)?\.bias", "bias"),
        (r"\.alpha", "alpha"),
        (r"\.scalar", "scalar"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", "magnitude"),
        (r"\.diff", "diff"),
        (r"\.diff_b", "diff_b"),
        *((rf"\.{name}", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
        *((rf"\.lokr_{name}", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    )
)
_PREFIX = re.compile(
    r"base_model\.model\.|(?:model\.)?diffusion_model\.|transformer\.|unet\.|lycoris_|lora_(?:unet_|transformer_)?"
)
_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te(?P<number>\d?)_|text_encoder(?:_(?P<place>\d))?\.|"
    r"text_encoders\.(?P<name>clip_l|clip_g|t5xxl)\.(?:transformer\.)?)(?P<layer>.+)"
)
_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
_OTHERS = {"oft_": "OFT", "boft_": "BOFT", ".on_input": "IA3", "vera_lambda": "VeRA", ".a1.weight": "GLoRA"}


def parse(words: str | pathlib.Path) -> tuple[pathlib.Path, float]:
    """A file or folder, and how strongly it acts, of `FILE` or `FILE:scale`. Raises InputError at a bad scale."""
    path, (head, colon, tail) = pathlib.Path(words), str(words).rpartition(":")
    if not colon or path.exists():
        return path, 1.0
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise InputError(f"the scale '{tail}' of adapter '{head}' is no number; write it as {head}:0.8")
    return pathlib.Path(head), scale


def read_file(file: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and header. Raises InputError where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{file}' could not be read as a LoRA ({error}); give a safetensors file") from error


def read(
    file: pathlib.Path, family: str, sizes: Sizes, name: str,
    convert: Callable[[pathlib.Path], Mapping[str, Tensor]] | None = None,
) -> Contents:  # fmt: skip
    """The changes in a file, every one of which fits its layer of the denoiser that `name` names.

    `convert` gives the tensors under diffusers' keys, where the file's own say nothing here. Raises InputError, by the
    key, at what is no adapter, is of another family or does not fit, is not whole or not finite.
    """
    tensors, header = read_file(file)
    fields = _fields(file, header)
    return read_tensors(tensors, family, sizes, name, file, fields, convert)


def read_tensors(
    tensors: Mapping[str, Tensor], family: str, sizes: Sizes, name: str, file: pathlib.Path,
    fields: Mapping[str, Any] | None = None,
    convert: Callable[[pathlib.Path], Mapping[str, Tensor]] | None = None,
) -> Contents:  # fmt: skip
    """As `read`, of tensors by key; `fields`: peft's settings of the file, by the pipeline's part."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"'{key}' in '{file}' holds NaN or infinite numbers; the training broke, take another file"
            )
    known = names_of(family, sizes)
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        end = next(((match.start(), what) for pattern, what in _ENDS if (match := pattern.search(key))), None)
        stem = key[: end[0]] if end else key
        if end is None or not (_ENCODER.fullmatch(stem) or _found(stem, known)):
            unknown.append(key)
        else:
            groups.setdefault(stem, {})[end[1]] = tensor
    if unknown:
        if convert and not any(mark in key for key in unknown for mark in _OTHERS):
            try:
                tensors = convert(file)
            except Exception:  # diffusers' converters have assertions, KeyErrors and more for what they do not know
                tensors = {}
            if tensors:
                return read_tensors(tensors, family, sizes, name, file, fields)
        raise InputError(_refusal(unknown[0], tensors or read_file(file)[0], family, name, file))
    if not groups:
        raise InputError(f"'{file}' holds no LoRA; give an adapter folder of a run, or a LoRA's safetensors file")
    contents = Contents(file, [])
    for stem, group in groups.items():
        _check_whole(stem, group, file)
        encoder = _ENCODER.fullmatch(stem)
        if encoder:
            number = encoder["number"] or encoder["place"] or "1"
            part = _PARTS.get(encoder["name"] or "", f"text_encoder_{number}" if number != "1" else "text_encoder")
            scale = _scale_of(group, (fields or {}).get(part, {}), encoder["layer"])
            contents.encoders.setdefault(part, []).append(Change(stem, (encoder["layer"],), group, scale))
            continue
        found = _found(stem, known)
        assert found
        parts, swapped = found
        scale = _scale_of(group, (fields or {}).get(part_of(family)) or (fields or {}).get("", {}), parts[0])
        change = Change(stem, parts, group, scale, swapped)
        rows, inputs = sum(sizes[part][1] for part in parts), (sizes[parts[0]][0], *sizes[parts[0]][2:])
        fault = misfit(change, (rows, *inputs))
        if fault:
            foreign = of_another_family(tensors, family, name, file)
            raise InputError(
                foreign
                or f"the LoRA in '{file}' does not fit {name}: '{stem}' is {fault}, its layer {rows} x "
                f"{' x '.join(map(str, inputs))}; use the model that it was trained on"
            )
        contents.changes.append(change)
    return contents


def _refusal(key: str, tensors: Mapping[str, Tensor], family: str, name: str, file: pathlib.Path) -> str:
    """The message for a key that names no layer here."""
    foreign = of_another_family(tensors, family, name, file)
    if foreign:
        return foreign
    kind = next((kind for mark, kind in _OTHERS.items() if mark in key), None)
    if kind:
        return f"'{file}' is an adapter of kind {kind} ('{key}'), which fieldsmith does not read; give a LoRA"
    shape = tuple(tensors[key].shape) if key in tensors else ""
    return (
        f"the LoRA in '{file}' does not fit {name}: '{key}' {shape} is no layer of a {family} denoiser; load it on the "
        "model that it was trained on"
    )


def of_another_family(keys: Iterable[str], family: str, name: str, file: pathlib.Path) -> str | None:
    """The message for a file whose keys name layers of another family; None where they do not."""
    other = family_of_lora(keys)
    if other is None or same_family(family, other):
        return None  # an editing family takes the LoRAs of the one that it is made from
    return (
        f"the LoRA in '{file}' seems to be made for family {other}, not for {family} as {name} is; "
        "load it on a model of its own family"
    )


def names_of(family: str, sizes: Sizes) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Every name that a layer may have in a file, with underscores -> diffusers' layers, and whether halves swap."""
    known: dict[str, tuple[tuple[str, ...], bool]] = {plain(layer): ((layer,), False) for layer in sizes}
    known |= {plain(name): (parts, swaps(name, parts, sizes)) for name, parts in layout(family, sizes).items()}
    return known


def _found(stem: str, known: Mapping[str, tuple[tuple[str, ...], bool]]) -> tuple[tuple[str, ...], bool] | None:
    """The layers that a key names, under as many prefixes as it has."""
    while plain(stem) not in known:
        prefix = _PREFIX.match(stem)
        if not prefix:
            return None
        stem = stem[prefix.end() :]
    return known[plain(stem)]


def _check_whole(stem: str, group: Mapping[str, Tensor], file: pathlib.Path) -> None:
    """Raises InputError where a change lacks one of its tensors."""
    halves = [("down", "up"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("hada_w1_a", "hada_w2_a"),
              ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")]  # fmt: skip
    whole = all((one in group) == (other in group) for one, other in halves)
    whole = whole and any(name in group for name in ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b"))
    if any(name.startswith("lokr_") for name in group):
        whole = (
            whole and bool({"lokr_w1", "lokr_w1_a"} & group.keys()) and bool({"lokr_w2", "lokr_w2_a"} & group.keys())
        )
    if not whole:
        raise InputError(
            f"the LoRA in '{file}' is not whole: '{stem}' has one of its two weights ({', '.join(sorted(group))}); "
            "export it again"
        )


def _fields(file: pathlib.Path, header: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings of a file, by the pipeline's part: of its header, as diffusers writes them, or of the
    adapter_config.json that peft itself writes beside it, whose part is ''."""
    try:
        flat = json.loads(header.get("lora_adapter_metadata", "{}"))
        beside = file.parent / "adapter_config.json"
        if not flat and file.name == "adapter_model.safetensors" and beside.is_file():
            return {"": json.loads(beside.read_text(encoding="utf-8"))}
    except (ValueError, OSError) as error:
        raise InputError(f"the settings of the LoRA in '{file}' are not JSON ({error}); save it again") from error
    by_part: dict[str, Any] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        by_part.setdefault(part, {})[name] = value
    return by_part


def _scale_of(group: Mapping[str, Tensor], fields: Mapping[str, Any], layer: str) -> float:
    """alpha / rank. No alpha, and kohya's alpha of 0, are alpha = rank."""
    ranked = next((group[name] for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if name in group), None)
    if ranked is None:
        return 1.0
    rank = len(ranked)
    alpha = float(group["alpha"].item()) if "alpha" in group else 0.0
    if not alpha and fields.get("lora_alpha"):
        alphas: dict[str, float] = fields.get("alpha_pattern") or {}
        alpha = float(alphas.get(get_pattern_key(list(alphas), layer), fields["lora_alpha"]))
        return alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank
    return alpha / rank if alpha else 1.0
