"""The run directory, one contract for all verbs: what was asked, what happened, what came out.

config.toml, metrics.jsonl (a line a step), metrics.json (final numbers), checkpoints/, adapter/ or model/, samples/,
report.html. Files are written beside, synced and renamed, so that a reader or a resumed run never sees half of one, and
one launch at a time writes there (owner.py).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import tomli_w

from fieldsmith import disk, owner, processes
from fieldsmith.config import ADAPTABLE
from fieldsmith.errors import InputError
from fieldsmith.read import read_json, read_toml

PACKAGES = ("fieldsmith", "torch", "diffusers", "transformers", "peft", "accelerate")
FOLDERS = ("checkpoints", "adapter", "model", "samples")
BLOCK = 2**16  # bytes of metrics.jsonl that are read at once from its end
# what a killed process may leave in a folder that it had just begun
BESIDE = re.compile(r"\.(owner|config\.toml|metrics\.json|report\.html)(\.\d+)?|\.fieldsmith-\w+")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write text beside the path, then rename it into place; of several processes one writes.

    An error of the system leaves the old file and nothing beside it.
    """
    if not processes.is_main():
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with disk.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(text, encoding="utf-8")
            disk.sync(beside)
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)  # half a file would keep a full disk full
            raise
        disk.sync(path.parent)


def make_ordinary(file: pathlib.Path) -> None:
    """Give a file the permissions of any that this process opens; safetensors makes its own for the owner alone."""
    beside = file.with_name(f".{file.name}.mode-{os.getpid()}")
    beside.touch()
    os.chmod(file, beside.stat().st_mode & 0o777)
    beside.unlink()


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


class Base(NamedTuple):
    """What a finished run left, for another to go on from: a model's name, the adapters in it, and for a model in one
    file what has its config."""

    model: str
    adapter: tuple[str, ...] = ()
    config_from: str = ""


def base_of(source: str) -> Base | None:
    """What a finished run left; None where `source` is no run directory.

    Raises InputError where the run is not finished or left no weights.
    """
    folder = pathlib.Path(source).expanduser()
    if not (folder / "config.toml").is_file() or (folder / "model_index.json").exists():
        return None
    settings = read_toml(folder / "config.toml")
    if not (folder / "metrics.json").is_file():
        raise InputError(f"run '{source}' is not finished, so it is no model yet; repeat its command to finish it")
    metrics = read_json(folder / "metrics.json", "record of numbers")
    shipped = str(metrics.get("adapter") or "model") if isinstance(metrics, dict) else ""
    name = settings.get("model") or settings.get("teacher")
    if not (folder / shipped).is_dir() or (shipped == "adapter" and not isinstance(name, str)):
        raise InputError(f"run '{source}' left no weights that another run could begin with")
    if shipped != "adapter":
        return Base(str(folder / shipped))
    adapters = (*map(str, settings.get("adapter", ())), str(folder / shipped))
    return Base(str(name), adapters, str(settings.get("config_from", "")))


class Run:
    """A run directory; the same command on a directory that it began resumes it, another command is refused, but for
    settings that change how much is computed at once (config.ADAPTABLE)."""

    def __init__(self, folder: str | pathlib.Path, verb: str, config: Any):
        """Nothing is written yet. Raises InputError where the folder cannot become this run's."""
        self.folder = pathlib.Path(folder)
        self.verb = verb
        self.settings = {"verb": verb, **plain(config)}
        self.settings.pop("out", None)
        self.origins: dict[str, str] = {}  # digests of what it is made from beside its settings (origins.py)
        self._began: dict[str, str] = {}  # the same, as they were at the beginning
        self._confirmed = bool(self.settings.pop("resume_changed", False))
        self.changes = ""  # what is to be said of other versions
        self.good: tuple[pathlib.Path | None] | None = None  # the checkpoint to go on from, once it was looked for
        self._check()

    def _check(self) -> None:
        owner.check(self.folder)
        path = self.folder / "config.toml"
        for name in FOLDERS:
            if (self.folder / name).is_file():
                raise InputError(f"'{self.folder / name}' is a file, where a run has a folder; move it away")
        if not path.exists():
            check_out(self.folder, folder=True)
            if self.folder.is_dir() and not all(BESIDE.fullmatch(file.name) for file in self.folder.iterdir()):
                raise InputError(f"out folder '{self.folder}' holds other files; name one that is new or empty")
            return
        earlier = read_toml(path)
        earlier_versions, self._began = earlier.pop("versions", {}), earlier.pop("origins", {})
        differs = [k for k in {*earlier, *self.settings} if earlier.get(k) != self.settings.get(k)]
        if not set(differs) <= set(ADAPTABLE):
            raise InputError(
                f"out folder '{self.folder}' holds another run ({', '.join(sorted(differs))} differ); "
                "name a new folder, or repeat its settings to resume it"
            )
        self.changes = self._changes(earlier_versions, sorted(differs), earlier) if self.resumes else ""

    def compare(self, origins: dict[str, str]) -> None:
        """Note digests of what the run is made from, for config.toml.

        Raises InputError where a run that has a checkpoint began with others, unless the config's `resume_changed` says
        that this is meant.
        """
        self.origins |= origins
        changed = sorted(name for name, digest in origins.items() if self._began.get(name, digest) != digest)
        if changed and self.resumes and not self._confirmed:
            raise InputError(
                f"out folder '{self.folder}' began with another {', another '.join(changed)}; put back what it was, or "
                "add --resume-changed to go on with what is there now"
            )

    def _changes(self, earlier: dict[str, str], differs: list[str], settings: dict[str, Any]) -> str:
        """A sentence about versions and settings that are others than at the beginning; '' where there is none."""
        now = versions()
        others = [
            f"{name} {earlier[name]} (now {now[name]})" for name in now if earlier.get(name, now[name]) != now[name]
        ] + [f"{name}={settings.get(name)} (now {self.settings.get(name)})" for name in differs]
        return f"this run began with {', '.join(others)}: its last bits may differ" if others else ""

    def begin(self) -> None:
        """Own the folder and write config.toml; called once the input is known to be good and before the first step.

        Raises InputError where another process owns the folder, or has begun another run in it since it was checked.
        """
        if processes.is_main():
            with disk.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                owner.take(self.folder)
            try:
                self._check()
            except BaseException:
                self.end()
                raise
            for left in self.folder.iterdir():  # of processes that were killed; their owner is gone
                if left.name != owner.FILE and BESIDE.fullmatch(left.name):
                    shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        record = {**self.settings, "versions": versions(), **({"origins": self.origins} if self.origins else {})}
        write_atomically(self.folder / "config.toml", tomli_w.dumps(record))

    def end(self) -> None:
        """Let go of the folder, whether the run is complete or not."""
        if processes.is_main():
            owner.release(self.folder)

    @property
    def _log(self) -> pathlib.Path:
        return self.folder / "metrics.jsonl"

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Append one line to metrics.jsonl; of several processes one writes."""
        if not processes.is_main():
            return
        with disk.writing(self._log), self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")

    def sync(self) -> None:
        """Until what was logged is on the disk."""
        if self._log.exists():
            disk.sync(self._log)

    def rows(self) -> Iterator[dict[str, float]]:
        """The lines of metrics.jsonl, one at a time; what a crash cut off is dropped."""
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            for line in file:
                row = _row(line)
                if row is not None:
                    yield row

    def history(self, most: int | None = None) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; of each number at least `most` and at most twice as many, evenly apart, where it
        was logged more often, so that memory does not grow with the run."""
        if most is None:
            return list(self.rows())
        kept: dict[str, list[tuple[int, float]]] = {}
        stride: dict[str, int] = {}
        seen: dict[str, int] = {}
        for row in self.rows():
            for key in row.keys() - {"step"}:
                at, every = seen.get(key, 0), stride.get(key, 1)
                seen[key] = at + 1
                if at % every == 0:
                    points = kept.setdefault(key, [])
                    points.append((int(row["step"]), row[key]))
                    if len(points) > 2 * most:
                        del points[1::2]
                        stride[key] = 2 * every
        rows: dict[int, dict[str, float]] = {}
        for key, points in kept.items():
            for step, value in points:
                rows.setdefault(step, {"step": step})[key] = value
        return [rows[step] for step in sorted(rows)]

    def last(self) -> dict[str, float] | None:
        """The last whole line of metrics.jsonl, read from its end; None where there is none."""
        return next((row for _, row in self._backwards() if row is not None), None)

    def rewind(self, step: int) -> None:
        """Forget the logged steps from `step` on: the run resumes there. Reads no more of the file than it forgets.

        Raises as `log_before`.
        """
        if not processes.is_main():
            return
        end = self.log_before(step)
        if self._log.exists():
            with disk.writing(self._log):
                os.truncate(self._log, end)  # between two lines, so that no reader sees half of one
                disk.sync(self._log)

    def log_before(self, step: int) -> int:
        """How many bytes of metrics.jsonl hold the steps before this one. Raises InputError where some are missing."""
        end, row = next(((end, row) for end, row in self._backwards() if row and row["step"] < step), (0, None))
        if step and (row is None or row["step"] != step - 1):
            ends = f"ends at step {row['step']}" if row else "has no lines"
            raise InputError(
                f"'{self._log}' {ends}, but the checkpoint is of {step} steps; put the file back, or begin in a new "
                "folder"
            )
        return end

    def _backwards(self) -> Iterator[tuple[int, dict[str, float] | None]]:
        """Lines from the last one to the first: where each ends in the file, and what it says; None where it is cut."""
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            begin = end = file.seek(0, os.SEEK_END)
            rest = b""
            while begin or rest:
                cut = rest.rfind(b"\n", 0, -1) if rest else -1
                if cut < 0 and begin:
                    size = min(BLOCK, begin)
                    begin = file.seek(begin - size)
                    rest = file.read(size) + rest
                    continue
                line = rest[cut + 1 :]
                yield end, _row(line) if line.endswith(b"\n") else None
                end -= len(line)
                rest = rest[: cut + 1]

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json, the sign that the run is complete."""
        write_atomically(self.folder / "metrics.json", json.dumps(plain(metrics), indent=1) + "\n")

    @property
    def finished(self) -> bool:
        """Whether it is trained and measured: a judge that failed is named as 'missing'."""
        file = self.folder / "metrics.json"
        record = read_json(file, "record of numbers") if file.exists() else None
        return file.exists() and not (isinstance(record, dict) and "missing" in record)

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint waits to be gone on from."""
        return any((self.folder / "checkpoints").glob("step-*"))


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def versions() -> dict[str, str]:
    """Of Python, of the packages that numbers hang on, and of the machine."""
    machine = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "platform": machine, **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
