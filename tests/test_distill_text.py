"""Distillation of text-to-image teachers: both branches, what guidance leads away from, cached answers, a folder."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from experiments.tiny_text import sd3_pipeline, sd15_pipeline, sdxl_pipeline
from fieldsmith.methods.distill import bank as banks
from fieldsmith.methods.distill import teacher as asked_of
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig, objective_of
from fieldsmith.methods.distill.step import student_for
from fieldsmith.methods.distill.teacher import Feed
from fieldsmith.models import load
from fieldsmith.models.branches import branches
from fieldsmith.models.sd3 import SD3
from fieldsmith.models.sd15 import SD15
from fieldsmith.models.sdxl import SDXL
from tests.drawn import seeded
from tests.trained import distill

WORDS = ("a", "red", "blue", "circle")
PROMPTS = ("a red circle", "a blue circle")
MAKERS: list[Callable[[], Any]] = [
    lambda: SD15(sd15_pipeline(WORDS), "tiny"),
    lambda: SDXL(sdxl_pipeline(WORDS), "tiny"),
    lambda: SD3(sd3_pipeline(WORDS), "tiny"),
]


def source_for(model: Any) -> Source:
    return Source(model.noise(8, seeded()), torch.arange(8) % 2, PROMPTS, "noise")


def error(teacher: Any, student: Any) -> float:
    """Of the guided prediction at w = 3, in mean squares."""
    x, t, condition = teacher.noise(8, seeded(5)), torch.linspace(0.1, 0.9, 8), teacher.encode(PROMPTS * 4)
    with torch.no_grad():
        pair = [model.predict(x, t, condition, 3.0).value for model in (teacher, student)]
    return float((pair[0] - pair[1]).square().mean())


@pytest.mark.parametrize("make", MAKERS, ids=["sd15", "sdxl", "sd3"])
def test_a_text_student_learns_to_be_guided_from_cached_branches(
    make: Callable[[], Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (banks, asked_of):
        monkeypatch.setattr(module, "SHARD", 32)
    teacher = make()
    config = DistillConfig(bank=32, reuse=1e6, steps=12, batch=16, warmup=2, ema=0.5, shrink=2.0, lr=5e-3,
                           bank_folder=tmp_path / "bank")  # fmt: skip
    start = error(teacher, student_for(teacher, config, None))
    job, done = distill(teacher, None, source_for(teacher), config)
    assert len(list((tmp_path / "bank").glob("shard-*.safetensors"))) == 1 and done.steps == 12
    after = error(teacher, job.model)
    assert after < 0.9 * start
    job.model.save(tmp_path / "model")
    again = load(tmp_path / "model", teacher.resolution)
    assert error(teacher, again) == pytest.approx(after, rel=1e-4)


def test_the_branch_without_words_is_what_guidance_leads_away_from() -> None:
    """SDXL's is zeros, where a student of the empty prompt would be guided away from something that it never saw."""
    teacher: Any = MAKERS[1]()
    x, t, condition = teacher.noise(4, seeded()), torch.full((4,), 0.5), teacher.encode(PROMPTS * 2)
    zeros = type(condition)({name: torch.zeros_like(part) for name, part in condition.parts.items()})
    with torch.no_grad():
        away = teacher.predict(x, t, zeros).value
        both = branches(teacher, x, t, condition)
        torch.testing.assert_close(both.unconditional, away)
        torch.testing.assert_close(both.guided(3.0), teacher.predict(x, t, condition, 3.0).value, atol=1e-5, rtol=0)
    config = DistillConfig(bank=0, batch=4, layout="split", objective="matched-dropout", null_share=0.5, shrink=2.0)
    feed = Feed(teacher, source_for(teacher), config, objective_of(config))
    null = torch.tensor([True, False, True, False])
    rows = feed._ask(x, t, torch.tensor([0, 1, 0, 1]), torch.zeros_like(x), null)
    torch.testing.assert_close(rows.conditional[null], away[null])
    torch.testing.assert_close(rows.conditional[~null], both.conditional[~null])
