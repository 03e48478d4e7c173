"""Tries every malformed input: `python -m benchmarks.malformed [PART OF A NAME]`; writes results/reliability."""

from __future__ import annotations

import collections
import importlib
import json
import os
import pathlib
import sys
import tempfile

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.claims import claim, share_claim
from benchmarks.malformed import corpus
from benchmarks.malformed.case import bounded
from benchmarks.malformed.pipelines import Bases
from benchmarks.reliability import summarise
from fieldsmith.run import write_atomically

OUT = pathlib.Path("results/reliability")
COMMAND = "python -m benchmarks.malformed"
# what a process imports when it needs it, so that each that is forked has it already
PRELOADED = ("fieldsmith.api", "fieldsmith.planning", "fieldsmith.sampling", "fieldsmith.models.export", "transformers")


def main() -> None:
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    cases = [case for case in corpus.cases() if part in case.name]
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(pathlib.Path(folder))
        bases.make_all()
        outcomes = []
        for case in track(cases, "malformed inputs", console=console, disable=not sys.stderr.isatty()):
            outcomes.append(outcome := bounded(case, bases))
            if outcome.fault:
                print(f"{outcome.name}: {outcome.fault}\n    {outcome.sentence}", file=sys.stderr)
    fell = [outcome for outcome in outcomes if outcome.fault]
    console.print(f"{len(outcomes)} inputs, {len(fell)} fell through")
    if part:
        return
    counts = collections.Counter(tuple(outcome.name.split("/")[:2]) for outcome in outcomes)
    claims = [
        claim("reliability.malformed_inputs", "malformed inputs that were tried over every command and the Python API",
              len(outcomes), "inputs", len(outcomes) >= 500, COMMAND),
        share_claim("reliability.malformed_refused_share", "of these, refused with exit code 2 or InputError in one "
                    "sentence that names the value, without a traceback, nothing left on disk",
                    len(outcomes) - len(fell), len(outcomes), COMMAND),
    ]  # fmt: skip
    rows = {
        "claims": claims, "command": COMMAND, "inputs": len(outcomes), "refused": len(outcomes) - len(fell),
        "by group and command": {"/".join(key): n for key, n in sorted(counts.items())},
        "fell through": [
            {"name": one.name, "fault": one.fault, "sentence": one.sentence.replace(folder, "")} for one in fell
        ],
    }  # fmt: skip
    write_atomically(OUT / "malformed.json", json.dumps(rows, indent=1) + "\n")
    summarise(OUT)


if __name__ == "__main__":
    main()
