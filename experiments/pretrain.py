"""`python -m experiments pretrain RECIPE --out DIR`: the recipes behind fieldsmith/zoo's models; resumable."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from experiments.study import check_numbers
from experiments.zoo import (
    class_unet,
    emoji_flux,
    fashion_classifier,
    judged_ddpm,
    scenes_kontext,
    shapes_classifier,
    shapes_flux,
)
from fieldsmith.errors import InputError, check_word

Train = Callable[[Any, pathlib.Path, str], object]  # settings, the folder to write, the recipe's name

RECIPES: dict[str, tuple[Any, Train]] = {
    "shapes-flux": (shapes_flux.ShapesFlux(), shapes_flux.train),
    # right in half of its images, which leaves a reward something to do
    "shapes-flux-small": (shapes_flux.ShapesFlux(heads=1, steps=6_000), shapes_flux.train),
    "emoji-flux": (emoji_flux.EmojiFlux(), emoji_flux.train),
    # a narrower network, stopped early, that a reward has something to teach
    "emoji-flux-small": (emoji_flux.EmojiFlux(autoencoder="zoo:emoji-flux", heads=3, steps=(3_000,)), emoji_flux.train),
    "digits-unet": (class_unet.ClassUNet(), class_unet.train),
    "shapes-unet": (class_unet.ClassUNet(data="shapes", widths=(24, 48, 64), steps=5_500), class_unet.train),
    "fashion-unet": (
        class_unet.ClassUNet(data="fashion", widths=(24, 48, 64), steps=6_000, batch=48),
        class_unet.train,
    ),
    "columns-ddpm": (judged_ddpm.JudgedDDPM(), judged_ddpm.train),
    "scenes-kontext": (scenes_kontext.ScenesKontext(), scenes_kontext.train),
    # narrower and stopped early: an editor that its own sessions can still teach
    "scenes-kontext-small": (
        scenes_kontext.ScenesKontext(autoencoder="zoo:scenes-kontext", heads=2, steps=2_000, decay=2_000),
        scenes_kontext.train,
    ),
    "shapes-classifier": (shapes_classifier.Classifiers(), shapes_classifier.train),
    "fashion-classifier": (fashion_classifier.FashionClassifier(), fashion_classifier.train),
}


def main(words: Sequence[str]) -> None:
    """Train one recipe. Raises InputError at an unknown name or an impossible number."""
    if not words or words[0].startswith("-"):
        raise InputError(f"no recipe named after `pretrain`; recipes: {', '.join(RECIPES)}")
    name = words[0]
    check_word(name, tuple(RECIPES), "the recipes")
    default, train = RECIPES[name]
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=pathlib.Path)
    place, flags = parser.parse_known_args(words[1:])
    about = f"{type(default).__doc__}\n\nAlso: --out DIR, the folder to write."
    config = tyro.cli(
        type(default), default=default, args=flags, prog=f"python -m experiments pretrain {name}", description=about
    )
    check_numbers(config)
    if place.out is None:
        raise InputError(f"no out folder given; add --out DIR, e.g. --out runs/{name}")
    train(config, place.out, name)
