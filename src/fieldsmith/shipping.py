"""What a run ships, and how others load it: a LoRA or a whole pipeline, and lines for the page."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from fieldsmith.models.adapters import parse
from fieldsmith.models.core import Model


def ship(model: Model, folder: pathlib.Path) -> str:
    """Save the adapter, or the whole model where no adapter trained; the folder's name."""
    name = "adapter" if model.spec else "model"
    model.save(folder / name)
    return name


def _fuse(words: str) -> list[str]:
    """How diffusers makes an adapter of the base part of it."""
    path, scale = parse(words)
    return [f'pipe.load_lora_weights("{path}")', f"pipe.fuse_lora(lora_scale={scale:g})", "pipe.unload_lora_weights()"]


def repeat(verb: str, source: str, adapters: Sequence[str], folder: pathlib.Path, shipped: str) -> list[str]:
    """How to repeat a run and, where it made an adapter, how plain diffusers loads it."""
    lines = [f"fieldsmith {verb} --config {folder / 'config.toml'} --out ANOTHER-FOLDER"]
    if shipped == "adapter":
        lines += [
            "",
            "# in Python, with diffusers alone",
            f'pipe = DiffusionPipeline.from_pretrained("{source}")',
            *(line for words in adapters for line in _fuse(words)),
            f'pipe.load_lora_weights("{folder / "adapter"}")',
        ]
    if shipped == "model":
        model = folder / "model"
        lines += ["", "# in Python, with diffusers alone", f'pipe = DiffusionPipeline.from_pretrained("{model}")']
    return lines
