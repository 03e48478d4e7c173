"""All benchmarks but those against plain loops, on one thread: prints ratios, writes results/bench (`make bench`)."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from rich.console import Console

from benchmarks import samplers, startup, steps
from benchmarks.claims import claim
from benchmarks.plan_error import plan_error
from experiments.study import render
from fieldsmith.run import write_atomically

OUT = pathlib.Path("results/bench")
COMMAND = "make bench"
HELP = ("--help", "erase --help", "align --help", "edit --help", "distill --help", "sharpen --help")


def help_seconds(words: str, rounds: int = 5) -> float:
    """Wall time of the fastest of several starts."""
    spans = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fieldsmith", *words.split()], check=True, capture_output=True)
        spans.append(time.perf_counter() - began)
    return min(spans)


def main() -> None:
    torch.set_num_threads(1)
    console = Console()
    taken = []
    for case in steps.CASES:
        taken.append(steps.measure(case))
        console.print(f"{case}: a step costs {taken[-1].ratio:.3f} times its networks' bare calls")
    drawn = []
    for family in samplers.FAMILIES:
        drawn.append(samplers.measure(family))
        console.print(f"{family}: diffusers' pipeline takes {drawn[-1].ratio:.2f} times our sampler's time")
    started = {words: help_seconds(words) for words in HELP}
    for words, seconds in started.items():
        console.print(f"fieldsmith {words}: {seconds:.2f} s")
    began = startup.measure()
    console.print(f"start-up: {began.own:.2f} s beside the networks")
    planned = plan_error()
    console.print(f"plan: peak memory off by at most {100 * planned:.1f}%")

    small, large = ([r.ratio - 1 for r in taken if (r.verb in steps.SMALL) is some] for some in (True, False))
    overhead, slowest = max(small), min(r.ratio for r in drawn)
    longest = max(started.values())
    claims = [
        claim("bench.worst_step_overhead", "a training step's CPU time over its networks' bare forwards and backwards, "
              "less 1; the worst verb", overhead, "share", overhead <= 0.05, COMMAND),
        claim("bench.worst_step_overhead_large", "the same on networks of 50 million parameters", max(large), "share",
              max(large) <= 0.01, COMMAND),
        claim("bench.startup_seconds", "from the start of a run to its first step, less what its networks take",
              began.own, "s", began.own <= 5, COMMAND),
        claim("bench.sampler_ratio", "our sampler's throughput over the diffusers pipeline's, the worst family",
              slowest, "ratio", slowest >= 1, COMMAND),
        claim("bench.help_seconds", "time until --help is printed, the slowest verb", longest, "s", longest <= 0.5,
              COMMAND),
        claim("bench.plan_memory_error", "peak memory as planned against as measured, the worst case", planned, "share",
              planned <= 0.15, COMMAND),
    ]  # fmt: skip
    write_atomically(OUT / "summary.json", json.dumps({"claims": claims}, indent=1) + "\n")
    found = {"steps": taken, "samplers": drawn}
    rows = {name: [dataclasses.asdict(row) for row in part] for name, part in found.items()}
    write_atomically(
        OUT / "rows.json", json.dumps({**rows, "help": started, "start-up": dataclasses.asdict(began)}, indent=1) + "\n"
    )
    write_atomically(OUT / "README.md", page(claims, taken, drawn, started, began))


def page(
    claims: list[dict[str, Any]], taken: list[Any], drawn: list[Any], started: dict[str, float], began: startup.Startup
) -> str:
    return render(
        "bench.md.jinja", command=COMMAND, claims=claims,
        steps=[(r.verb, f"{r.parameters / 1e6:.3g}M", f"{r.ratio:.3f}", f"{r.step_milliseconds:.0f}", f"{r.calls:.0f}")
               for r in taken],
        samplers=[(r.family, f"{r.ratio:.2f}", f"{r.our_milliseconds:.0f}") for r in drawn],
        began=[(name, f"{seconds:.2f}") for name, seconds in dataclasses.asdict(began).items()],
        starts=[(f"fieldsmith {words}", f"{seconds:.2f}") for words, seconds in started.items()],
    )  # fmt: skip


if __name__ == "__main__":
    main()
