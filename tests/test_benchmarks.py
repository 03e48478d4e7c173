"""The benchmarks' own code on toy sizes: the GPU script's lines, and that a replay repeats a step's calls."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from benchmarks import gpu, steps


def test_the_gpu_script_runs_without_one(tmp_path: pathlib.Path) -> None:
    for case in range(len(gpu.CASES)):
        rows = gpu.main(["--tiny", "--cases", str(case), "--variants", "plain", "--out", str(tmp_path)])
        assert [row.verb for row in rows] == [gpu.CASES[case][1]] and rows[0].seconds > 0
    assert "| sd3.5-medium |" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "rows.json").read_text())[0]["share_of_ceiling"] > 0


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
