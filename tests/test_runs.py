"""The run directory: what it refuses, what it resumes, and that no reader ever sees half a file."""

from __future__ import annotations

import json
import os
import pathlib
import tomllib
from dataclasses import dataclass, replace

import pytest

from fieldsmith.errors import InputError
from fieldsmith.run import Run, write_atomically


@dataclass(frozen=True)
class Settings:
    names: tuple[str, ...] = ("a", "b")
    window: tuple[int, int] = (1, 11)
    lr: float = 1e-3
    alpha: float | None = None
    fast: bool = False
    out: pathlib.Path | None = None


def begun(folder: pathlib.Path, settings: Settings | None = None) -> Run:
    run = Run(folder, "erase", settings or Settings(out=folder))
    run.begin()
    return run


# what it takes and refuses


def test_a_new_folder_is_not_made_before_the_run_begins(tmp_path):
    Run(tmp_path / "new", "erase", Settings())
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_is_taken(tmp_path):
    assert (begun(tmp_path).folder / "config.toml").exists()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files"):
        Run(tmp_path, "erase", Settings())


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        Run(tmp_path / "file", "erase", Settings())


def test_the_same_settings_are_taken_again(tmp_path):
    begun(tmp_path)
    assert not Run(tmp_path, "erase", Settings(out=tmp_path)).finished


def test_where_a_run_lies_is_not_one_of_its_settings(tmp_path):
    begun(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "moved")
    again = Run(tmp_path / "moved", "erase", Settings(out=tmp_path / "moved"))
    assert "out" not in again.settings and again.settings["verb"] == "erase"


def test_other_settings_are_refused_by_name(tmp_path):
    begun(tmp_path)
    with pytest.raises(InputError, match=r"another run \(alpha, lr differ\)"):
        Run(tmp_path, "erase", replace(Settings(), lr=2e-3, alpha=1.0))


def test_another_verb_is_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(InputError, match=r"\(verb differ\)"):
        Run(tmp_path, "align", Settings())


def test_other_versions_of_packages_do_not_hinder_resuming(tmp_path):
    begun(tmp_path)
    file = tmp_path / "config.toml"
    file.write_text(file.read_text().replace('python = "', 'python = "0.'))
    assert 'python = "0.' in file.read_text()
    assert Run(tmp_path, "erase", Settings()).folder == tmp_path


# files


def test_config_comes_back_from_toml_with_versions(tmp_path):
    begun(tmp_path)
    with (tmp_path / "config.toml").open("rb") as file:
        found = tomllib.load(file)
    versions = found.pop("versions")
    assert found == {"verb": "erase", "names": ["a", "b"], "window": [1, 11], "lr": 1e-3, "fast": False}
    assert versions["torch"].startswith("2.") and "python" in versions and "fieldsmith" in versions


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def broken(source, target):
        assert pathlib.Path(source).read_text() == "new"  # whole before it takes the name
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_an_atomic_write_leaves_nothing_beside_the_file(tmp_path):
    write_atomically(tmp_path / "deep" / "file", "text")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file"]


def test_history_is_what_was_logged(tmp_path):
    run = begun(tmp_path)
    run.log(0, {"loss": 1.5})
    run.log(1, {"loss": 0.1 + 0.2})
    assert run.history() == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.1 + 0.2}]


def test_a_cut_last_line_is_dropped_and_overwritten(tmp_path):
    run = begun(tmp_path)
    run.log(0, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    assert run.history() == [{"step": 0, "loss": 1.0}]
    run.rewind(1)
    run.log(1, {"loss": 0.5})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == run.history()
    assert len(run.history()) == 2


def test_rewinding_forgets_the_steps_that_will_be_repeated(tmp_path):
    run = begun(tmp_path)
    for step in range(5):
        run.log(step, {"loss": 1.0})
    run.rewind(3)
    assert [row["step"] for row in run.history()] == [0, 1, 2]


def test_a_run_is_finished_when_its_numbers_are_written(tmp_path):
    run = begun(tmp_path)
    assert not run.finished
    run.finish({"after": Settings(), "none": None})
    assert run.finished
    assert json.loads((tmp_path / "metrics.json").read_text())["after"]["names"] == ["a", "b"]
