"""The run directory, one contract for all verbs: what was asked, what happened, what came out.

config.toml, metrics.jsonl (a line a step), metrics.json (final numbers), checkpoints/, adapter/ or model/, samples/,
report.html. Files are written beside and renamed, so that a reader or a resumed run never sees half of one.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
from typing import Any

import tomli_w

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.read import read_toml

PACKAGES = ("fieldsmith", "torch", "diffusers", "transformers", "peft", "accelerate")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write text beside the path, then rename it into place; of several processes one writes."""
    if not processes.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def check_out(out: pathlib.Path, folder: bool) -> None:
    """Raises InputError where `out` cannot become a folder (or a file): it is the other one, or cannot be written."""
    if folder and out.is_file():
        raise InputError(f"out '{out}' is a file; name a folder that is new or empty")
    if not folder and out.is_dir():
        raise InputError(f"out '{out}' is a folder; name a file")
    places = (out.absolute(), *out.absolute().parents) if folder else out.absolute().parents
    above = next(place for place in places if place.exists())
    try:
        tempfile.TemporaryDirectory(dir=above, prefix=".fieldsmith-").cleanup()
    except OSError as error:
        raise InputError(
            f"out '{out}' cannot be written, '{above}' is not a folder that you may write to ({error.strerror}); name "
            "another"
        ) from error


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as what TOML and JSON hold; None and NaN are left out of mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if item is not None and item == item}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, pathlib.Path) else value


class Run:
    """A run directory; the same command on a directory that it began resumes it, another command is refused."""

    def __init__(self, folder: str | pathlib.Path, verb: str, config: Any):
        """Nothing is written yet. Raises InputError where the folder cannot become this run's."""
        self.folder = pathlib.Path(folder)
        self.verb = verb
        self.settings = {"verb": verb, **plain(config)}
        self.settings.pop("out", None)
        self._check()

    def _check(self) -> None:
        path = self.folder / "config.toml"
        if not path.exists():
            check_out(self.folder, folder=True)
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise InputError(f"out folder '{self.folder}' holds other files; name one that is new or empty")
            return
        earlier = read_toml(path)
        earlier.pop("versions", None)
        if earlier != self.settings:
            differs = [k for k in {*earlier, *self.settings} if earlier.get(k) != self.settings.get(k)]
            raise InputError(
                f"out folder '{self.folder}' holds another run ({', '.join(sorted(differs))} differ); "
                "name a new folder, or repeat its settings to resume it"
            )

    def begin(self) -> None:
        """Write config.toml; called once the input is known to be good and before the first step."""
        versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
        write_atomically(self.folder / "config.toml", tomli_w.dumps({**self.settings, "versions": versions}))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Append one line to metrics.jsonl; of several processes one writes."""
        if not processes.is_main():
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")

    def history(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; a last line cut off by a crash is dropped."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Forget the logged steps from `step` on: the run resumes there."""
        rows = [row for row in self.history() if row["step"] < step]
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json, the sign that the run is complete."""
        write_atomically(self.folder / "metrics.json", json.dumps(plain(metrics), indent=1) + "\n")

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint waits to be gone on from."""
        return any((self.folder / "checkpoints").glob("step-*"))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
