"""Disks that are full, read-only or gone, names that are odd: a clear error, and what was good stays good."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from test_training import PLAN, begun, fresh, left_behind, noisy, trained
from torch import Tensor

from fieldsmith import checkpoints, cli, disk, training
from fieldsmith.errors import InputError
from fieldsmith.report.page import Page, Panel
from fieldsmith.run import Run


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts disks")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def ends(work: Callable[[], object], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    """What the command line says of an error of the disk."""
    patch.setattr(cli, "_command", lambda words: work())
    assert cli.main(["erase"]) == 3
    return capsys.readouterr().err


def fill(place: pathlib.Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def at_step(number: int, act: Callable[[], object]) -> Callable[[int], None]:
    return lambda step: (act() if step == number else None) and None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("name", ["run", "ein Lauf, 日本"])
def test_a_full_disk_is_named_with_what_is_free_and_the_run_goes_on_once_there_is_room(
    small_disk, tmp_path, capsys, monkeypatch, name
):
    trained(tmp_path / "whole")
    out = small_disk / name
    said = ends(lambda: trained(out, before=at_step(12, lambda: fill(small_disk))), capsys, monkeypatch)
    assert "the disk: No space left on device: '" in said and name in said and "B free)" in said
    kept = sorted((out / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["step-00000005", "step-00000010"]
    assert not any(map(checkpoints.damage_of, kept))
    (small_disk / "filler").unlink()
    trained(out)
    assert left_behind(out) == left_behind(tmp_path / "whole")


def test_a_disk_that_becomes_read_only_is_named(small_disk, capsys, monkeypatch):
    out = small_disk / "run"
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    said = ends(
        lambda: trained(out, before=at_step(12, lambda: subprocess.run(remount, check=True))), capsys, monkeypatch
    )
    assert f"the disk: Read-only file system: '{out / 'metrics.jsonl'}'" in said
    with pytest.raises(InputError, match="not a folder that you may write to"):
        Run(small_disk / "other", "test", {})


def test_a_folder_that_is_removed_while_a_run_writes_there_is_named(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    said = ends(lambda: trained(out, before=at_step(12, lambda: shutil.rmtree(out))), capsys, monkeypatch)
    assert f"the disk: No such file or directory: '{out / 'metrics.jsonl'}'" in said


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "samples"])
def test_a_file_where_a_run_has_a_folder_is_refused_by_name(tmp_path, name):
    begun(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"'{tmp_path / name}' is a file, where a run has a folder"):
        Run(tmp_path, "test", {"setting": 1})


def test_space_for_checkpoints_is_asked_for_before_the_start(tmp_path, monkeypatch):
    parameters: dict[str, Tensor] = {"a": torch.zeros(1000, requires_grad=True), "kept": torch.zeros(500)}
    needed = checkpoints.bytes_of(parameters, ema=True, optimizer="adamw")
    assert needed == 1000 * 4 * 4 + 500 * 4 * 2
    run = begun(tmp_path)
    monkeypatch.setattr(disk, "free", lambda path: 3 * needed)
    checkpoints.check_space(run, needed)
    monkeypatch.setattr(disk, "free", lambda path: 3 * needed - 1)
    with pytest.raises(InputError, match=r"has 60 kB free, but checkpoints take 60 kB \(3 of 20 kB\); free some"):
        checkpoints.check_space(run, needed)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "there").write_bytes(b"1")  # which will be deleted
    checkpoints.check_space(run, needed)


def test_what_a_checkpoint_takes_is_what_was_estimated(tmp_path):
    parameters = {"a": torch.zeros(100_000, requires_grad=True)}
    training.fit(parameters, noisy_of(parameters), PLAN.__class__(steps=1, lr=0.1, ema=0.9), begun(tmp_path))
    size = (tmp_path / "checkpoints" / "step-00000001" / checkpoints.FILE).stat().st_size
    assert size == pytest.approx(checkpoints.bytes_of(parameters, True, "adamw"), rel=0.01)


def noisy_of(parameters: dict[str, Tensor]) -> training.Losses:
    return lambda step, generator, log: iter([parameters["a"].square().sum() + parameters["a"].sum()])


# long runs


def test_a_log_of_100000_steps_is_rewound_from_its_end_and_thinned_for_the_page(tmp_path, monkeypatch):
    run, n = begun(tmp_path), 100_000
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(n):
            rare = {"rare": step / 7} if step % 5 == 3 else {}
            file.write(json.dumps({"step": step, "loss": (step * 37 % 101) / 101, "nfe": step, **rare}) + "\n")
    read = []
    real = run._backwards
    monkeypatch.setattr(run, "_backwards", lambda: (read.append(1) or line for line in real()))
    run.rewind(n - 40)
    assert len(read) == 41 and run.last() == {"step": n - 41, "loss": pytest.approx(0.5, abs=0.5), "nfe": n - 41} | (
        {"rare": (n - 41) / 7} if (n - 41) % 5 == 3 else {}
    )
    rows = run.history(1000)
    for key in ("loss", "rare"):
        assert 1000 <= sum(key in row for row in rows) <= 2000
    assert len(rows) <= 4000 and rows[0]["step"] == 0 and n - rows[-1]["step"] < 200
    page = Page("long")
    series = {
        key: ([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r]) for key in ("loss", "rare")
    }
    page.curves("The run", [Panel("both", series)])
    assert len(page.html()) < 250_000  # a page of ten such panels stays under 3 MB


def test_a_log_without_thinning_is_whole(tmp_path):
    run = begun(tmp_path)
    parameters = fresh()
    training.fit(parameters, noisy(parameters), PLAN, run)
    assert run.history() == run.history(1000) and len(run.history()) == 20
