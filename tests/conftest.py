"""What all tests share: one quiet thread, and tiny pipelines on disk as users have them."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read once, when torch is imported; spinning threads starve a busy machine

import contextlib
import ctypes
import gc
import pathlib

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("busy", deadline=None)  # an example takes as long as the machine lets it
hypothesis.settings.load_profile("busy")
gc.disable()  # while test files import what they want, of which nothing is garbage: a tenth of that time
WORDS = ("a", "red", "blue", "square", "circle")


def pytest_collection_finish() -> None:
    """From here on garbage is collected among what tests make; what was imported is not looked through again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


with contextlib.suppress(OSError, AttributeError):  # no glibc
    # glibc hands every tensor of some 100 KB back to the kernel and asks for it again: a seventh of all time. Keep up
    # to 512 MB that are free (M_TRIM_THRESHOLD), and take what is below 32 MB from the heap (M_MMAP_THRESHOLD).
    ctypes.CDLL("libc.so.6").mallopt(-1, 512 << 20)
    ctypes.CDLL("libc.so.6").mallopt(-3, 32 << 20)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random FluxPipeline, saved. Read only."""
    from experiments.tiny import flux_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    flux_pipeline(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One block of each kind, for what trains many times. Read only."""
    from experiments.tiny import flux_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "small-flux"
    flux_pipeline(WORDS, layers=1, single_layers=1, heads=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random class-conditional DDPMPipeline with three classes and a null class, saved. Read only."""
    from experiments.tiny import unet_pipeline
    from fieldsmith.models.unet import UNet

    folder = tmp_path_factory.mktemp("pipelines") / "unet"
    UNet(unet_pipeline(class_rows=4), "tiny", classes=("cat", "dog", "owl")).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A zoo of tiny random pipelines under the zoo's own names, with its vocabularies and cards. Read only."""
    import json

    from experiments.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
    from fieldsmith.models.unet import UNet
    from fieldsmith.worlds import emoji_captions, scenes, shapes

    folder = tmp_path_factory.mktemp("zoo")
    small = {"layers": 1, "single_layers": 1, "heads": 1}
    for name in ("shapes-flux", "shapes-flux-small"):
        flux_pipeline(shapes.VOCABULARY, vae_channels=(8, 8, 8), **small).save_pretrained(folder / name)
        (folder / name / "card.json").write_text(json.dumps({"world": "shapes", "size": 32}))
    for name in ("emoji-flux", "emoji-flux-small"):
        flux_pipeline(
            emoji_captions.VOCABULARY, vae_channels=(8, 8, 8), latent_channels=4, text_length=12, size=48, **small
        ).save_pretrained(folder / name)
        (folder / name / "card.json").write_text(json.dumps({"world": "emoji", "size": 48}))
    editor = kontext_pipeline(
        scenes.VOCABULARY, vae_channels=(8, 8, 8), latent_channels=4, text_length=10, size=24, **small
    )
    editor.save_pretrained(folder / "scenes-kontext")
    (folder / "scenes-kontext" / "card.json").write_text(json.dumps({"world": "scenes", "size": 24}))
    compositions = tuple(str(concept) for concept in shapes.concepts())
    for data, size, channels, names in (("digits", 8, 1, tuple("0123456789")), ("shapes", 16, 3, compositions)):
        teacher = unet_pipeline(
            size=size, channels=channels, widths=(8, 16), class_rows=len(names) + 1, attention=False,
            beta_schedule="squaredcos_cap_v2",
        )  # fmt: skip
        UNet(teacher, data, classes=names).save(folder / f"{data}-unet")
        (folder / f"{data}-unet" / "card.json").write_text(json.dumps({"data": data, "size": size}))
    columns = unet_pipeline(
        size=16, channels=48, widths=(8, 16), attention=False, prediction_type="sample",
        beta_schedule="squaredcos_cap_v2", clip=True, learned_variance=True,
    )  # fmt: skip
    UNet(columns, "columns", fold=4).save(folder / "columns-ddpm")
    (folder / "columns-ddpm" / "card.json").write_text(json.dumps({"data": "columns", "size": 64}))
    return folder


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs measure is drawn in 3 steps and not in 28, where nobody looks at the images."""
    from fieldsmith.measure import drawing

    monkeypatch.setattr(drawing, "STEPS", 3)


@pytest.fixture
def with_tiny_zoo(tiny_zoo: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's names are tiny pipelines."""
    from fieldsmith import models
    from fieldsmith.worlds import model_cards

    for module in (models, model_cards):
        monkeypatch.setattr(module, "ZOO", tiny_zoo)
