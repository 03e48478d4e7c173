"""Each verb's default recipe on a tiny budget, held to a wide band: it learns, and nothing runs away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

import fieldsmith as fs
from fieldsmith.worlds.columns import ColumnsWorld

PROMPTS = ("red circle", "blue square")


def logs(run: Callable[[Any], Any]) -> dict[str, list[float]]:
    """What a run's steps logged, by name, in order."""
    found: dict[str, list[float]] = {}

    def callback(step: int, log: dict[str, float]) -> None:
        for name, value in log.items():
            found.setdefault(name, []).append(value)

    run(callback)
    return found


def median(numbers: list[float]) -> float:
    return float(torch.tensor(numbers).median())


def brightness(model: Any) -> float:
    images = fs.sample(model, PROMPTS, seed=0, n=8)
    return sum(sum(image.convert("L").tobytes()) / image.width / image.height / 255 for image in images) / len(images)


def test_erase_moves_the_target_towards_its_anchor() -> None:
    log = logs(
        lambda callback: fs.erase(
            "zoo:shapes-flux-small", "triangle", "circle", budget=40, steps=6, window=(1, 4), batch=2, evaluate=0,
            callback=callback,
        )
    )  # fmt: skip
    assert log["lambda"][0] == 0 and 0.02 < log["lambda"][-1] < 0.5
    assert max(log["retain"]) < 1.5  # where anchor and target are 10 apart


def test_align_raises_its_reward_near_the_reference() -> None:
    model = fs.load("zoo:shapes-flux-small")
    before = brightness(model)
    log = logs(
        lambda callback: fs.align(
            model, "brightness", PROMPTS, epochs=6, prompts_per_epoch=2, steps=5, evaluate=0, callback=callback
        )
    )
    assert 0.005 < brightness(model) - before < 0.2
    assert 0.1 < log["kl to reference"][-1] < 20


def test_edit_forgets_what_a_turn_adds() -> None:
    def judge(before: torch.Tensor, after: torch.Tensor, instructions: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return after.mean((1, 2, 3)), 1 - (after - before).abs().mean((1, 2, 3))

    turns = ["add a red disc top left", "paint the red circle blue"]
    sessions = [(Image.new("RGB", (24, 24), color), turns) for color in ("white", "gray", "lightblue")]
    log = logs(
        lambda callback: fs.edit(
            fs.load("zoo:scenes-kontext"), sessions, judge, epochs=2, groups=2, rollouts=3, turns=2, evaluate=0,
            callback=callback,
        )
    )  # fmt: skip
    assert sum(log["identity"][-3:]) < 0.8 * sum(log["identity"][:3])
    assert all(0.2 < mean < 1 for mean in log["following"])


def test_distill_brings_both_branches_nearer() -> None:
    log = logs(
        lambda callback: fs.distill("zoo:digits-unet", steps=20, batch=16, bank=0, evaluate=0, callback=callback)
    )
    for branch in ("conditional error", "unconditional error"):
        assert 0.05 < sum(log[branch][-6:]) / sum(log[branch][:6]) < 0.9


def test_sharpen_trains_its_guide() -> None:
    images = ColumnsWorld(64).sample(32, 0)
    shown = [Image.fromarray((image[0] * 255).byte().numpy(), "L") for image in images]
    log = logs(
        lambda callback: fs.sharpen(
            "zoo:columns-ddpm", shown, lambda images: [True] * len(images), steps=60, batch=8, samples=0,
            callback=callback,
        )
    )  # fmt: skip
    assert 0.01 < median(log["eps error"][-20:]) < median(log["eps error"][:20])
