"""Two processes are one: the same losses and weights from every verb, one writer, one voice; FSDP; who dies."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import several
import torch
import yaml

from fieldsmith import processes
from fieldsmith.cli import main
from fieldsmith.commands import verbs
from fieldsmith.errors import InputError
from fieldsmith.models import load
from fieldsmith.run import Run
from tests import trained

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parent / "docs" / "accelerate"
# sums of many numbers differ in their order alone
TOLERANCES = {"single": 1e-3, "double": 1e-5}
WORDS = [
    "erase", "--model", "zoo:shapes-flux", "--targets", "circle", "--anchors", "square", "--budget", "12",
    "--batch", "2", "--steps", "4", "--window", "0", "2", "--no-attacks", "--evaluate", "2",
]  # fmt: skip


def surroundings(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **more}


def accelerated(arguments: Sequence[str], how: str = "processes", count: int = 2) -> list[str]:
    """As the documentation launches it."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{how}.yaml"),
            "--num_processes", str(count), "--main_process_port", "0", *arguments]  # fmt: skip


def run(command: Sequence[str], folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=surroundings(**environment), capture_output=True, text=True, timeout=600
    )


def together(
    folder: pathlib.Path, names: Sequence[str], how: str = "processes", count: int = 2, **environment: str
) -> dict[str, Any]:
    out = folder / "together.json"
    words = [str(HERE / "several.py"), str(out), ";".join(names)]
    done = run(accelerated(words, how, count), HERE, RUNS=str(folder / "runs"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(out.read_text()))
    assert found.pop("processes") == count and found.pop("sharded") == (how == "fsdp")
    return found


def alone(folder: pathlib.Path, names: Sequence[str], **environment: str) -> dict[str, Any]:
    out = folder / "alone.json"
    words = [sys.executable, str(HERE / "several.py"), str(out), ";".join(names)]
    done = run(words, HERE, RUNS=str(folder / "alone"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(out.read_text()))


def assert_same(one: dict[str, Any], two: dict[str, Any], tolerance: float) -> None:
    assert [row["step"] for row in one["history"]] == [row["step"] for row in two["history"]] == [0, 1]
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance, abs=1e-6), key
    for name, norm in one["weights"].items():
        assert norm == pytest.approx(two["weights"][name], rel=tolerance, abs=1e-7), name
    assert one["forwards"] == two["forwards"]


@pytest.fixture(scope="module", params=["single", "double"])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Every verb in one process and in two, in float32 and float64."""
    folder = tmp_path_factory.mktemp(request.param)
    names = tuple(several.VERBS)
    double = {"DOUBLE": "1"} if request.param == "double" else {}
    return alone(folder, names, **double), together(folder, names, **double), TOLERANCES[request.param]


@pytest.mark.parametrize("name", several.VERBS)
def test_two_processes_learn_what_one_learns(both: Any, name: str) -> None:
    one, two, tolerance = both
    assert_same(one[name], two[name], tolerance)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], pathlib.Path]:
    folder = tmp_path_factory.mktemp("sharded")
    return alone(folder, several.SHARDED), together(folder, several.SHARDED, "fsdp"), folder


@pytest.mark.parametrize("name", several.SHARDED)
def test_fsdp_learns_the_same(sharded: Any, name: str) -> None:
    assert_same(sharded[0][name], sharded[1][name], TOLERANCES["single"])
