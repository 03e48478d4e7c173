"""What malformed inputs are made from: the smallest whole pipelines, an adapter, images, sessions, a finished run."""

from __future__ import annotations

import functools
import json
import pathlib
from dataclasses import dataclass

import torch
from PIL import Image

import fieldsmith as fs
from experiments.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
from fieldsmith.models.unet import UNet

WORDS = ("a", "red", "blue", "square", "circle")
CLASSES = ("cat", "dog", "owl")


@dataclass(frozen=True)
class Bases:
    """Folders that are whole. Each is made when it is first asked for."""

    folder: pathlib.Path

    @functools.cached_property
    def flux(self) -> pathlib.Path:
        place = self.folder / "flux"
        flux_pipeline(WORDS, layers=1, single_layers=1, heads=1, vae_channels=(8, 8, 8)).save_pretrained(place)
        return place

    @functools.cached_property
    def kontext(self) -> pathlib.Path:
        place = self.folder / "kontext"
        kontext_pipeline(
            WORDS, layers=1, single_layers=1, heads=1, vae_channels=(8, 8, 8), latent_channels=4, size=24
        ).save_pretrained(place)
        return place

    @functools.cached_property
    def unet(self) -> pathlib.Path:
        place = self.folder / "unet"
        UNet(unet_pipeline(class_rows=4, widths=(8, 16), attention=False), "tiny", classes=CLASSES).save(place)
        return place

    @functools.cached_property
    def adapter(self) -> pathlib.Path:
        """A LoRA folder for `flux`."""
        return self.run / "adapter"

    @functools.cached_property
    def run(self) -> pathlib.Path:
        """A finished run of erase on `flux`."""
        place = self.folder / "run"
        fs.erase(
            str(self.flux), "red circle", "blue circle", preset="tiny", steps=4, window=(1, 2), batch=1, budget=4,
            evaluate=2, rank=2, subset="attention", out=place,
        )  # fmt: skip
        return place

    @functools.cached_property
    def images(self) -> pathlib.Path:
        """Twelve 16-pixel images of each class."""
        place = self.folder / "images"
        draw = torch.Generator().manual_seed(0)
        for name in CLASSES:
            (place / name).mkdir(parents=True)
            for row in range(12):
                pixels = torch.randint(256, (16, 16, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / name / f"{row}.png")
        return place

    @functools.cached_property
    def sessions(self) -> pathlib.Path:
        """A folder with sessions.jsonl of two turns and its images."""
        place = self.folder / "sessions"
        place.mkdir()
        lines = []
        for row in range(3):
            Image.new("RGB", (24, 24), (60 * row, 20, 200)).save(place / f"{row}.png")
            lines.append(json.dumps({"image": f"{row}.png", "instructions": ["a red circle", "a blue square"]}))
        (place / "sessions.jsonl").write_text("\n".join(lines) + "\n")
        return place

    def make_all(self) -> None:
        """Before anything is forked."""
        for name in ("flux", "kontext", "unet", "adapter", "run", "images", "sessions"):
            getattr(self, name)
