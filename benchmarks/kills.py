"""SIGKILL at random moments of each verb's run, then the same run again: python -m benchmarks.kills --count 100

Half of the moments are a random share of the run's CPU time; the other half are inside of what writes: before a random
one of the operations on files of the run directory (open, sync, rename, truncate, remove), or with half of a checkpoint
written. What resumes has to end with the bytes of an undisturbed run: weights, last checkpoint and log. Runs are forked
from one process that has imported everything, so that a kill costs little. What was done already is not done again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks import reliability
from benchmarks.claims import share_claim
from benchmarks.plan_error import ALIGN, DISTILL, EDIT, ERASE, INPUTS, PIPELINES, SHARPEN
from fieldsmith import checkpoints, disk, planning, verb
from fieldsmith.models import load
from fieldsmith.planning import Judged
from fieldsmith.run import write_atomically
from fieldsmith.verb import Job, Verb

OUT = pathlib.Path("results/reliability")
PART = "kills.json"
POLL = 0.002  # seconds
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")  # Python's audit events
CASES: dict[str, tuple[str, Any]] = {
    "align": ("flux", ALIGN.replace(epochs=6, rollouts=4, chunk=8, evaluate=0)),
    "distill": ("unet", DISTILL.replace(steps=12, batch=8, evaluate=0)),
    "edit": ("kontext", EDIT.replace(epochs=4, evaluate=0, max_mean=1.0, min_spread=0.0)),
    "erase": ("flux", ERASE.replace(budget=120, evaluate=0)),
    "sharpen": ("unet", SHARPEN.replace(steps=12, samples=0)),
}


class Brightness(Judged):
    """A judge whose answers are the image's alone, whoever asked before."""

    def numbers(self, images: torch.Tensor) -> torch.Tensor:
        return images.detach().flatten(1).mean(1)


@dataclass(frozen=True)
class Trial:
    """One kill and what came of it."""

    verb: str
    number: int
    moment: str  # in words
    steps_logged: int  # when it was killed
    same: bool
    wrong: str = ""  # what differs, or how the resumed run ended


class Fatal:
    """Counts operations on files of a run directory, and kills this process at the `at`-th of them."""

    def __init__(self, folder: pathlib.Path, at: int | None):
        self.folder, self.at, self.seen = str(folder), at, 0

    def due(self) -> bool:
        self.seen += 1
        return self.seen == self.at

    def install(self) -> None:
        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            if event in WRITES and str(arguments[0]).startswith(self.folder):
                reading = event == "open" and not set("wax+") & set(str(arguments[1] or "r"))
                if not reading and self.due():
                    os.kill(os.getpid(), signal.SIGKILL)

        def synced(path: pathlib.Path) -> None:
            if self.due():
                os.kill(os.getpid(), signal.SIGKILL)
            whole(path)

        def saved(tensors: Any, path: pathlib.Path) -> None:
            due = self.due()
            save_file(tensors, path)
            if due:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        whole = disk.sync
        disk.sync = synced
        checkpoints.save_file = saved  # type: ignore[attr-defined]
        sys.addaudithook(hear)


def once(name: str, models: pathlib.Path, out: pathlib.Path) -> None:
    """The verb's run from beginning to end, or what is left of it; with a checkpoint every other step or collection."""
    pipeline, config = CASES[name]
    of, _ = planning.INPUTS[name]

    def prepare(model: Any, config: Any, inputs: Any) -> Job:
        job = of.prepare(model, config, inputs)
        job.optimisation = dataclasses.replace(job.optimisation, checkpoint_every=max(2, job.optimisation.block))
        return job

    often: Verb = dataclasses.replace(of, prepare=prepare)
    verb.run(often, config.replace(out=out), INPUTS[name](config, Brightness()), load(models / pipeline), quiet=True)


def fork(work: Callable[[], None], log: pathlib.Path) -> int:
    """A process that does this and ends; what it says goes to the log."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def spent(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def left(out: pathlib.Path) -> dict[str, str]:
    """What a run must have left, by name, as checksums; a page and metrics.json tell the seconds, so they are left out
    but for their being there, and temporary files have to be gone."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        told = path.name in ("report.html", "metrics.json")
        found[name] = "" if told else hashlib.sha256(ordered(path)).hexdigest()
    return found


def ordered(path: pathlib.Path) -> bytes:
    """A file's bytes; of safetensors with the header in order, since its writer puts metadata in any."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its CPU seconds, its operations on files, what it left."""

    seconds: float
    writes: int
    left: dict[str, str]


def whole(name: str, folder: pathlib.Path) -> Whole:
    """Raises RuntimeError where it fails."""
    out, told = folder / name / "whole", folder / f"{name}.told"

    def work() -> None:
        count = Fatal(out, None)
        count.install()
        began = time.process_time()
        once(name, folder, out)
        told.write_text(json.dumps([time.process_time() - began, count.seen]))

    if ended(fork(work, folder / f"{name}.log")):
        raise RuntimeError(f"{name}: {(folder / f'{name}.log').read_text()[-2000:]}")
    seconds, writes = json.loads(told.read_text())
    return Whole(seconds, writes, left(out))


def kill(name: str, number: int, folder: pathlib.Path, of: Whole) -> Trial:
    """A run that is killed, and its repetition; a run that ended before its moment is another moment's."""
    moments = random.Random(f"{name} {number}")
    out, log = folder / name / "killed", folder / f"{name}.log"
    while True:
        shutil.rmtree(out, ignore_errors=True)
        at = moments.randint(1, of.writes) if number % 2 else None
        after = moments.uniform(0, of.seconds)

        def work(at: int | None = at) -> None:
            if at is not None:
                Fatal(out, at).install()
            once(name, folder, out)

        pid = fork(work, log)
        if at is None:
            began = spent(pid)
            while spent(pid) - began < after and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(POLL)
            os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        if code == -signal.SIGKILL:
            break
        if code:
            return Trial(name, number, "before its moment", 0, False, log.read_text()[-500:])
    moment = f"operation {at} of {of.writes} on files" if at else f"{100 * after / of.seconds:.0f}% of its CPU time"
    lines = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
    code = ended(fork(lambda: once(name, folder, out), log))
    if code:
        return Trial(name, number, moment, lines, False, f"exit {code}: {log.read_text()[-500:]}")
    now = left(out)
    differ = sorted(key for key in {*now, *of.left} if now.get(key) != of.left.get(key))
    return Trial(name, number, moment, lines, not differ, ", ".join(differ))


def claims_of(trials: list[Trial], command: str) -> list[dict[str, Any]]:
    counts = collections.Counter(trial.verb for trial in trials)
    each = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
    statement = (
        f"runs killed at random moments whose repetition ended with the weights, checkpoint and log of an undisturbed "
        f"run, of {len(trials)} ({each})"
    )
    same = sum(trial.same for trial in trials)
    return [share_claim("reliability.kills_resumed_share", statement, same, len(trials), command)]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="kills of each verb, those of earlier calls among them")
    parser.add_argument("--only", nargs="*", choices=CASES, help="some of the verbs")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    asked = parser.parse_args(words)
    path, command = asked.out / PART, f"python -m benchmarks.kills --count {asked.count}"
    trials = [Trial(**one) for one in json.loads(path.read_text())["trials"]] if path.exists() else []
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place).resolve()
        for name in asked.only or CASES:
            done = {trial.number for trial in trials if trial.verb == name}
            if done >= set(range(asked.count)):
                continue
            if not (folder / CASES[name][0]).exists():
                ended(fork(lambda name=name: PIPELINES[CASES[name][0]](folder / CASES[name][0]), folder / "log"))
            of = whole(name, folder)
            for number in sorted(set(range(asked.count)) - done):
                trials.append(kill(name, number, folder, of))
                if not trials[-1].same:
                    print(f"{name} {number}, {trials[-1].moment}: {trials[-1].wrong}", flush=True)
                found = {"claims": claims_of(trials, command), "trials": [dataclasses.asdict(one) for one in trials]}
                write_atomically(path, json.dumps(found, indent=1) + "\n")
                reliability.summarise(asked.out)
            print(f"{name}: {sum(t.same for t in trials if t.verb == name)} of {asked.count}", flush=True)
    return int(not all(trial.same for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
