"""The verbs edit and erase on FLUX.2 klein, Qwen-Image and Qwen-Image-Edit, and what they refuse there."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import WORDS
from torch import Tensor

from experiments.tiny_edit import flux2_klein_pipeline, qwen_image_edit_pipeline, qwen_image_pipeline
from fieldsmith.errors import InputError
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.models import load
from fieldsmith.models.shrink import shrink
from fieldsmith.worlds.scenes import VOCABULARY, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel
from tests.trained import edit, erase

MAKERS: dict[str, Any] = {
    "flux2-klein": flux2_klein_pipeline,
    "qwen-image": qwen_image_pipeline,
    "qwen-image-edit": qwen_image_edit_pipeline,
}


def loaded(family: str, folder: pathlib.Path, words: Sequence[str] = WORDS, size: int = 16) -> Any:
    """A tiny random pipeline, saved into `folder` and loaded back."""
    MAKERS[family](words).save_pretrained(folder)
    return load(folder, resolution=size)


@pytest.mark.parametrize("family", ["flux2-klein", "qwen-image-edit"])
@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_edit_trains_on_its_own_sessions(tmp_path: pathlib.Path, family: str, objective: Any) -> None:
    model = loaded(family, tmp_path, VOCABULARY, 24)
    world = ScenesWorld(24)
    config = EditConfig(
        epochs=1, groups=2, rollouts=2, turns=2, steps=3, updates=1, rank=2, dependency=0.5, lr=1e-3, max_mean=1.0,
        objective=objective, identity=0.5, guidance=2.0 if objective == "nft" else None,
    )  # fmt: skip

    def bright(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Any:
        following, consistency = after.mean((1, 2, 3)), 1 - (after - first).abs().mean((1, 2, 3))
        return type("Scored", (), {"following": following, "consistency": consistency})

    inputs = Inputs(lambda n, seed, turns: world.sessions(n, turns, seed, config.dependency), bright, Channel())
    result = edit(model, config, inputs)
    assert result.steps == 1 and result.nfe > 0
    assert any(bool(p.any()) for name, p in model.trainable().items() if "lora_B" in name)


@pytest.mark.parametrize("family", ["flux2-klein", "qwen-image"])
def test_erase_runs(tmp_path: pathlib.Path, family: str) -> None:
    model = loaded(family, tmp_path)
    config = EraseConfig(
        targets=("red circle",), anchors=("blue square circle",), keep=("a square", "a"), steps=4, window=(1, 2),
        budget=4, rollout_guidance=2.0, rank=2, retain=0.1, dropout=0.0,
    )  # fmt: skip
    assert erase(model, config).steps == 2
    assert any(bool(p.any()) for name, p in model.trainable().items() if "lora_B" in name)


def test_an_editor_that_reads_images_cannot_erase(tmp_path: pathlib.Path) -> None:
    model = loaded("qwen-image-edit", tmp_path)
    with pytest.raises(InputError, match="use the verb edit"):
        erase(model, EraseConfig(targets=("red circle",), anchors=("a blue circle",), steps=4, window=(1, 2), budget=2))


def test_methods_inside_text_layers_are_refused(tmp_path: pathlib.Path) -> None:
    model, config = loaded("qwen-image", tmp_path), {"targets": ("red circle",), "anchors": ("a blue circle",)}
    with pytest.raises(InputError, match="'eraseanything' needs dual-stream attention to words"):
        erase(model, EraseConfig(method="eraseanything", subset="add_qk", **config))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'uce' needs layers where single words enter"):
        erase(model, EraseConfig(method="uce", subset="text-inputs", full=True, **config))  # type: ignore[arg-type]


def test_no_student_is_made_of_a_family_that_nobody_shrinks(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="has no smaller network that fieldsmith can build"):
        shrink(loaded("qwen-image-edit", tmp_path), ratio=2.0)
