"""One malformed input, and what became of it: refused in one sentence that names it, with nothing left on disk, or not.

In: a `Case`. Out: an `Outcome`. `bounded` asks in a forked process with a limit on time and memory, so that an input
that hangs or takes all memory is a finding and not the end of the machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.malformed.pipelines import Bases
from fieldsmith.cli import main
from fieldsmith.errors import InputError

SECONDS = 30  # of one input
MEMORY = 4 * 2**30  # bytes of address space beyond those of the process that is forked
SENTENCE = re.compile(r"fieldsmith: \S.*")
TWO = re.compile(r"[.!] [A-Z]|Traceback|File \"")

Words = list[str]


@dataclass(frozen=True)
class Case:
    """`make(place, bases)` writes files into the folder `place` and gives the words of a command, or what to call."""

    name: str  # group/command/what is wrong
    make: Callable[[pathlib.Path, Bases], Words | Callable[[], object]]
    says: str  # regular expression: the sentence names the value by it


@dataclass(frozen=True)
class Outcome:
    """Why an input fell through; '' where it was refused as it should be."""

    name: str
    fault: str
    sentence: str
    seconds: float


def ask(case: Case, bases: Bases) -> Outcome:
    """In this process."""
    with tempfile.TemporaryDirectory() as folder, _inside(pathlib.Path(folder)) as place:
        work = case.make(place, bases)
        before = _listed(place)
        began = time.monotonic()
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code, sentence = _call(work) if callable(work) else (main(work), "")
        sentence = sentence or (said.getvalue().strip().splitlines() or [""])[-1]
        fault = _fault(case, code, sentence, callable(work)) or _left(before, _listed(place))
        return Outcome(case.name, fault, sentence, time.monotonic() - began)


def bounded(case: Case, bases: Bases) -> Outcome:
    """In a process of its own."""
    reads, writes = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reads)
        _limit()
        try:
            found = ask(case, bases)
            line = json.dumps([found.fault, found.sentence])
        except BaseException as error:  # a traceback is what is looked for
            line = json.dumps([f"raised {type(error).__name__}: {str(error)[:300]}", ""])
        os.write(writes, line.encode())
        os._exit(0)
    os.close(writes)
    with open(reads, encoding="utf-8") as pipe:
        line = pipe.read()
    _, status = os.waitpid(child, 0)
    fault, sentence = json.loads(line) if line else (f"ended by signal {os.WTERMSIG(status)}", "")
    return Outcome(case.name, fault, sentence, time.monotonic() - began)


def _limit() -> None:
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)


def _call(work: Callable[[], object]) -> tuple[int, str]:
    try:
        work()
    except InputError as error:
        return 2, str(error)
    return 0, ""


def _fault(case: Case, code: int, sentence: str, python: bool) -> str:
    if code != 2:
        return f"ends with {code}"
    if not (python or SENTENCE.fullmatch(sentence)) or TWO.search(sentence) or "\n" in sentence:
        return "is refused, but not in one sentence"
    return "" if re.search(case.says, sentence) else f"is refused in a sentence that does not say {case.says!r}"


@contextlib.contextmanager
def _inside(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    before = pathlib.Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def _listed(place: pathlib.Path) -> dict[str, Any]:
    """Every file and folder, with its size."""
    return {str(path.relative_to(place)): path.is_file() and path.stat().st_size for path in place.rglob("*")}


def _left(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What a refusal must not leave: another file, or another content's size."""
    other = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return f"left {', '.join(other[:3])} changed" if other else ""


def copied(base: pathlib.Path, place: pathlib.Path, name: str = "model") -> pathlib.Path:
    """A base that may be damaged."""
    return pathlib.Path(shutil.copytree(base, place / name))
