"""The benchmarks' own code on toy sizes: the GPU script's lines, and that a replay repeats a step's calls."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from benchmarks import gpu, steps


def test_the_gpu_script_runs_without_one(tmp_path: pathlib.Path) -> None:
    rows = gpu.main(["--tiny", "--cases", "4", "--variants", "plain", "--out", str(tmp_path)])
    assert [row.verb for row in rows] == ["erase"] and rows[0].seconds > 0
    assert "| sd3.5-medium |" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "rows.json").read_text())[0]["share_of_ceiling"] > 0


@pytest.mark.parametrize("name", ["flux", "kontext", "sd3.5-medium"])
def test_its_models_predict_and_decode(name: str) -> None:
    model = gpu.built(name, gpu.TINY, "cpu")
    x = model.noise(2, torch.Generator().manual_seed(0))
    pred = model.predict(x, torch.tensor(0.5), model.encode(["a", "b"]))
    assert pred.value.shape == x.shape and model.decode(x).shape == (2, 3, 32, 32)


def test_variants_are_on() -> None:
    model = gpu.built("flux", gpu.TINY, "cpu")
    assert gpu.varied(model, "chunk 2x", {"chunk": 3}) == {"chunk": 6}
    gpu.varied(model, "checkpointing", {})
    assert model.network.gradient_checkpointing


def test_without_a_gpu_full_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "add --tiny" in capsys.readouterr().err


def test_a_replay_makes_the_recorded_calls() -> None:
    calls = steps.recorded("distill", 1, 2)
    assert [call.gradient for call in calls] == [False, True]  # a frozen teacher, then the student
    for call in calls:
        call.again()
    assert all(p.grad is not None for p in calls[1].trained) and calls[1].trained
