"""What all tests share: one quiet thread, and tiny pipelines on disk as users have them."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read once, when torch is imported; spinning threads starve a busy machine

import pathlib

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("busy", deadline=None)  # an example takes as long as the machine lets it
hypothesis.settings.load_profile("busy")
WORDS = ("a", "red", "blue", "square", "circle")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random FluxPipeline, saved. Read only."""
    from fieldsmith.models.tiny import flux_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    flux_pipeline(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random class-conditional DDPMPipeline with three classes and a null class, saved. Read only."""
    from fieldsmith.models.tiny import unet_pipeline
    from fieldsmith.models.unet import UNet

    folder = tmp_path_factory.mktemp("pipelines") / "unet"
    UNet(unet_pipeline(class_rows=4), "tiny", classes=("cat", "dog", "owl")).save(folder)
    return folder
