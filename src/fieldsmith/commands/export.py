"""`fieldsmith export`: an adapter as a file that kohya's scripts, ComfyUI or plain diffusers read.

In: a run's folder, an adapter's folder or a LoRA file, in any of the formats. Out: one safetensors file.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.errors import InputError
from fieldsmith.models import denoiser_of, lora_file
from fieldsmith.read import read_toml
from fieldsmith.run import check_out

USE = "e.g. fieldsmith export runs/edit/adapter --format comfyui --out edit.safetensors"


@dataclass(frozen=True)
class ExportConfig:
    """Write an adapter under other tools' keys: fieldsmith export ADAPTER --format comfyui --out FILE.safetensors"""

    format: Literal["kohya", "comfyui", "diffusers"] = "kohya"
    """kohya: sd-scripts' and musubi-tuner's keys, which ComfyUI reads too; comfyui: its own, with dots; diffusers."""
    out: pathlib.Path | None = None
    """The safetensors file to write."""
    model: str | None = None
    """The pipeline that the adapter was trained on (its weights are not read); None: the one that its run names."""


def export(words: Sequence[str]) -> Answer:
    """fieldsmith export ADAPTER --format FORMAT --out FILE [--model M]"""
    rest = list(words)
    source = pathlib.Path(rest.pop(0)).expanduser() if rest and not rest[0].startswith("-") else None
    config = arguments.parse(ExportConfig(), rest, "export", "ADAPTER: a run's folder, its adapter/, or a LoRA file.")
    if source is None:
        raise InputError(f"no adapter given; name a run's folder or a LoRA file first, {USE}")
    if config.out is None:
        raise InputError(f"no out file given; add --out FILE.safetensors, {USE}")
    if config.out.suffix != ".safetensors":
        raise InputError(f"out '{config.out}' is no name of a safetensors file; call it {config.out}.safetensors")
    check_out(config.out, folder=False)
    file = lora_file(source / "adapter" if (source / "adapter").is_dir() else source)
    model = config.model or _trained_on(file)
    from fieldsmith.models.adapters import read  # import torch: once the words are good
    from fieldsmith.models.changes import low_rank
    from fieldsmith.models.export import check_format, write

    denoiser = denoiser_of(model)
    family = denoiser.family.name
    if not denoiser.family.adapters:
        raise InputError(f"family {family} has no adapter files: its models are saved whole, so '{model}' has no LoRA")
    check_format(family, config.format)
    contents = read(file, family, denoiser.sizes, model)
    adapter = low_rank(contents, denoiser.sizes)
    write(adapter, family, denoiser.sizes, config.format, config.out)
    left = "".join(f"; {len(changes)} layers of {part} left out" for part, changes in contents.encoders.items())
    print(f"{len(adapter)} layers of family {family} as {config.format}: {config.out}{left}")
    return answer(metrics={"layers": len(adapter), "family": family, "format": config.format}, files=[config.out])


def _trained_on(file: pathlib.Path) -> str:
    """The model that the run's own record names, of a single file the pipeline that its config is from.

    Raises InputError where there is none beside the adapter.
    """
    for folder in (file.absolute().parent, file.absolute().parent.parent):
        try:
            settings = read_toml(folder / "config.toml")
        except InputError:
            continue
        model = settings.get("config_from") or settings.get("model")
        if isinstance(model, str):
            return model
    raise InputError(f"nothing beside '{file}' says which model it was trained on; add --model M")
