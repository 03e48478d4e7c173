"""Our engine beside plain loops of the same method (benchmarks/plain), step by step in one process.

    python -m benchmarks.against_plain                  all of it, on one thread: writes results/against_plain
    python -m benchmarks.against_plain --only GEM       one method

Network, seeds, number of forwards and optimiser are alike, and the script ends where the first losses differ by more
than 1e-5. Time is this process's CPU time: after each step of ours the plain loop takes its own, so that whatever else
the machine does falls on both; the ratio is the median over blocks of steps, a block being an update's whole cycle (a
collection and its updates). Memory is the most bytes of storages alive at once, counted for real in a run of its own
(models/estimate_memory.py), networks among them. What a rearrangement gives is the plain loop without it, beside the
plain loop with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # loops that import diffusers first would be told of torchvision

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.claims import claim
from benchmarks.plain.dash import dash
from benchmarks.plain.flow_grpo import flow_grpo
from benchmarks.plain.gem import gem
from benchmarks.plain.mt_nft import mt_nft
from benchmarks.plain.nft import nft
from experiments.study import render
from fieldsmith import verb
from fieldsmith.errors import RunError
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.step import Inputs as DistillInputs
from fieldsmith.methods.distill.verb import DISTILL
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.edit.verb import EDIT
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.models.estimate_memory import Live, modules, tensors
from fieldsmith.models.shrink import shrink
from fieldsmith.rewards import Reward
from fieldsmith.run import write_atomically
from fieldsmith.worlds.scenes import ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel

OUT = pathlib.Path("results/against_plain")
TOLERANCE = 1e-5  # between first losses
COPY, ENCODED, TOGETHER = "adapter off as the reference", "prompts encoded once", "branches in one forward"
GROUPED, SHORT, PREFIX = (
    "prompts encoded once a group", "rollouts end with the window", "prefix shared by a prompt's rollouts",
)  # fmt: skip
KEPT = "text encoders kept"  # what neither does by itself; ours on a GPU with `offload`

AfterStep = Callable[[float], None]
Ours = Callable[[Model, int, AfterStep], None]  # a model, how many blocks of steps, what hears each step's loss
Plain = Callable[..., Iterator[float]]  # the same model's pipeline, how many blocks, without=...


@dataclass(frozen=True)
class Case:
    """A method both ways; `block` steps make a cycle."""

    name: str
    model: Callable[[], Model]
    ours: Ours
    plain: Plain
    block: int
    rearranged: tuple[str, ...]  # what a first draft does without


def trained(of: verb.Verb, model: Model, config: Any, inputs: Any, after: AfterStep) -> None:
    verb.train(of, model, config, inputs, callback=lambda done, log: after(log["loss"]) if done else None)


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


BRIGHT = Reward("brightness", False, lambda images, prompts: brightness(images))


def erasing(model: Callable[[], Model], target: str, anchor: str, **sizes: Any) -> Case:
    """GEM as published but for dropout, with guidance in its rollouts."""
    block = 5  # every fifth step of ours measures the drift on kept prompts
    config = EraseConfig.preset_of("paper", None, {}).replace(
        targets=(target,), anchors=(anchor,), dropout=0.0, chunk=1_000, **sizes
    )
    states = config.batch * (config.window[1] - config.window[0] + 1)

    def ours(model: Model, blocks: int, after: AfterStep) -> None:
        trained(ERASE, model, config.replace(budget=blocks * block * states), EraseInputs(), after)

    def plain(model: Model, blocks: int, **options: Any) -> Iterator[float]:
        return gem(
            model.pipeline, target, anchor, blocks * block, batch=config.batch, sampler_steps=config.steps,
            window=config.window, **options,
        )  # fmt: skip

    return Case("GEM", model, ours, plain, block, (COPY, ENCODED, TOGETHER, SHORT, KEPT))


def aligning(
    name: str,
    model: Callable[[], Model],
    prompts: tuple[str, ...],
    groups: int,
    rollouts: int,
    fork: int = 0,
    **sizes: Any,
) -> Case:
    """flow-grpo or nft at laptop settings; with `fork` a prompt's rollouts branch off one ODE at that step."""
    method = "nft" if name == "NFT" else "flow-grpo"
    config = AlignConfig.preset_of(method, "laptop", {}).replace(
        prompts=prompts, prompts_per_epoch=groups, rollouts=rollouts, advantage="std", **sizes
    )
    if method == "nft":
        config = config.replace(nft_beta=0.1, old="fresh")
    else:
        config = config.replace(last_step="train", kl=0.004, kl_scale="exact")
    states = config.renoise if method == "nft" else config.steps - fork  # of a rollout, in an update or another
    config = config.replace(chunk=groups * rollouts * states // config.updates)  # the plain loop has no chunks
    if fork:
        branches = tuple(rollouts if k == fork else 1 for k in range(config.steps))
        config = config.replace(rollout="tree", branches=branches, window=(fork, config.steps - 1), rollouts=1)

    def ours(model: Model, blocks: int, after: AfterStep) -> None:
        trained(ALIGN, model, config.replace(epochs=blocks), AlignInputs(BRIGHT), after)

    def plain(model: Model, blocks: int, **options: Any) -> Iterator[float]:
        loop: Any = nft if method == "nft" else functools.partial(flow_grpo, fork=fork)
        return loop(
            model.pipeline, prompts, brightness, blocks, groups=groups, rollouts=rollouts, sampler_steps=config.steps,
            **options,
        )  # fmt: skip

    rearranged = (PREFIX,) if fork else (COPY, ENCODED)
    return Case(name, model, ours, plain, config.updates, rearranged)


def editing(model: Callable[[], Model], groups: int, rollouts: int, turns: int = 3, **sizes: Any) -> Case:
    """mt-nft on sessions of scenes, judged by brightness."""
    world = ScenesWorld(24)
    config = EditConfig.preset_of("mt-nft", "laptop", {}).replace(
        groups=groups, rollouts=rollouts, turns=turns, max_mean=1.0, min_spread=0.0, **sizes
    )
    config = config.replace(chunk=groups * rollouts * turns * config.renoise // config.updates)

    def drawn(n: int, seed: int) -> tuple[Tensor, list[list[str]]]:
        sessions = world.sessions(n, turns, seed, config.dependency)
        return sessions.clean(0), [sessions.prompts(turn) for turn in range(1, turns + 1)]

    def scored(images: Tensor) -> tuple[Tensor, Tensor]:
        return brightness(images), 1 - images[:, 0].mean((1, 2))

    def judge(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Any:
        following, consistency = scored(after)
        return type("Scores", (), {"following": following, "consistency": consistency})

    def ours(model: Model, blocks: int, after: AfterStep) -> None:
        inputs = EditInputs(lambda n, seed, turns: world.sessions(n, turns, seed, config.dependency), judge, Channel())
        trained(EDIT, model, config.replace(epochs=blocks), inputs, after)

    def plain(model: Model, blocks: int, **options: Any) -> Iterator[float]:
        return mt_nft(
            model.pipeline, drawn, scored, blocks, groups=groups, rollouts=rollouts, sampler_steps=config.steps,
            updates=config.updates, **options,
        )  # fmt: skip

    return Case("MT-NFT", model, ours, plain, config.updates, (GROUPED,))


def distilling(model: Callable[[], Model], ratio: float, pairs: int, block: int = 10) -> Case:
    """DASH as published, with uniform weights over time and no cache."""
    config = DistillConfig.preset_of("dash-uniform", None, {}).replace(curriculum="uniform", batch=2 * pairs)

    def given(teacher: Model) -> tuple[Model, Source]:
        states = torch.randn(64, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        names = tuple(teacher.classes)  # type: ignore[attr-defined]
        return shrink(teacher, ratio), Source(states, torch.arange(64) % len(names), names)

    def ours(teacher: Model, blocks: int, after: AfterStep) -> None:
        student, source = given(teacher)
        # the whole run's schedule, of which some steps are taken
        inputs = DistillInputs(source=source, student=student)

        def stopping(done: int, log: dict[str, float]) -> str | None:
            if done:
                after(log["loss"])
            return "enough" if done == blocks * block else None

        verb.train(DISTILL, teacher, config, inputs, callback=stopping)

    def plain(teacher: Model, blocks: int, **options: Any) -> Iterator[float]:
        student, source = given(teacher)
        return dash(
            teacher.network, student.network, teacher.pipeline.scheduler, source.states, source.prompt,
            blocks * block, pairs=pairs, total=config.steps, **options,
        )  # fmt: skip

    return Case("DASH", model, ours, plain, block, (TOGETHER,))


def cases() -> list[Case]:
    """At the sizes of the table."""
    flux, prompts = functools.partial(load, "zoo:shapes-flux"), ("a red circle", "a blue square", "a green ring")
    return [
        erasing(flux, "circle", "square"),
        aligning("flow-GRPO", flux, prompts, 2, 4),
        aligning("flow-GRPO from step 5", flux, prompts, 2, 4, fork=5),
        aligning("NFT", flux, prompts, 2, 4),
        editing(functools.partial(load, "zoo:scenes-kontext"), 3, 4, turns=2),
        distilling(functools.partial(load, "zoo:digits-unet"), 4.0, 16),
    ]


@dataclass(frozen=True)
class Pair:
    """CPU seconds of blocks of steps of two loops that took turns, and each step's losses."""

    seconds: tuple[list[float], list[float]]
    losses: tuple[list[float], list[float]]

    @property
    def ratio(self) -> float:
        """The first's time over the second's, the median over blocks."""
        return statistics.median(a / b for a, b in zip(*self.seconds, strict=True))


def in_turns(first: Callable[[AfterStep], None], second: Iterator[float], block: int) -> Pair:
    """Run both, a step of each after the other; the first block, in which both set up, is not timed."""
    spans: tuple[list[float], list[float]] = ([], [])
    losses: tuple[list[float], list[float]] = ([], [])
    mark = time.process_time()

    def after(loss: float) -> None:
        nonlocal mark
        now = time.process_time()
        spans[0].append(now - mark)
        losses[0].append(loss)
        losses[1].append(next(second))
        mark = time.process_time()
        spans[1].append(mark - now)

    first(after)
    blocks = ([sum(one[i : i + block]) for i in range(block, len(one), block)] for one in spans)
    return Pair((next(blocks), next(blocks)), losses)


def stepwise(loop: Iterator[float]) -> Callable[[AfterStep], None]:
    def run(after: AfterStep) -> None:
        for loss in loop:
            after(loss)

    return run


def peak(model: Model, work: Callable[[Model], object]) -> int:
    """The most bytes alive at once while a model works, its pipeline's weights among them."""
    with Live() as live:
        for part in modules(model).values():
            live.hold(tensors(part), "weights")
        work(model)
    return sum(live.peak.values())


@dataclass(frozen=True)
class Gain:
    """What the plain loop costs without a rearrangement, over what it costs with it."""

    method: str
    rearrangement: str
    time: float
    memory: float


# which method is which claim's
CLAIMED = {"GEM": "erase", "flow-GRPO": "flow_grpo", "NFT": "nft", "DASH": "distill", "MT-NFT": "edit"}


def claims_of(rows: Sequence[Row], command: str) -> list[dict[str, Any]]:
    """Of the methods that were measured."""
    made = [
        claim(f"bench.{CLAIMED[r.method]}_vs_plain_loop", f"a step's CPU time over that of a plain loop of {r.method}",
              r.time, "ratio", r.time <= 1, command)
        for r in rows if r.method in CLAIMED
    ]  # fmt: skip
    most = max(r.memory for r in rows)
    statement = "most bytes alive over those of a plain loop, the worst method"
    return [*made, claim("bench.memory_vs_plain_loop", statement, most, "ratio", most <= 1, command)]


@dataclass(frozen=True)
class Row:
    """Ours over plain; `drafted` is ours over the plain loop without any rearrangement."""

    method: str
    loss: float
    apart: float  # of the first losses, as a share of them where they are above 1
    last_apart: float  # of the last ones
    time: float
    time_drafted: float
    memory: float
    memory_drafted: float
    milliseconds: float  # of a step of ours


def apart(ours: float, plain: float) -> float:
    """How far two losses are apart, as a share of them where they are above 1."""
    return abs(ours - plain) / max(1.0, abs(plain))


def first_losses(case: Case) -> tuple[float, float]:
    """Ours and plain. Raises RunError where they are not alike."""
    ours: list[float] = []
    case.ours(case.model(), 1, ours.append)
    plain = next(case.plain(case.model(), 1))
    if not apart(ours[0], plain) <= TOLERANCE:
        raise RunError(f"{case.name}: the first loss is {ours[0]:.8f} here, {plain:.8f} in the plain loop")
    return ours[0], plain


def measure(case: Case, blocks: int) -> tuple[Row, list[Gain]]:
    """All of a method's numbers, from `blocks` timed blocks of steps each."""
    first, plain = first_losses(case)

    def ours(after: AfterStep) -> None:
        case.ours(case.model(), blocks + 1, after)

    def theirs(*without: str) -> Iterator[float]:
        return case.plain(case.model(), blocks + 1, without=without)

    def held(*without: str) -> int:
        return peak(case.model(), lambda model: list(case.plain(model, 1, without=without)))

    drafted = tuple(name for name in case.rearranged if name != KEPT)
    beside, rough = in_turns(ours, theirs(), case.block), in_turns(ours, theirs(*drafted), case.block)
    kept, own = held(), peak(case.model(), lambda model: case.ours(model, 1, lambda loss: None))
    gains = [
        Gain(case.name, name, in_turns(stepwise(theirs(name)), theirs(), case.block).ratio, held(name) / kept)
        for name in case.rearranged
    ]
    last = apart(beside.losses[0][-1], beside.losses[1][-1])
    each = 1000 * statistics.median(beside.seconds[0]) / case.block
    row = Row(
        case.name, first, apart(first, plain), last, beside.ratio, rough.ratio, own / kept, own / held(*drafted), each
    )
    return row, gains


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_plain", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", nargs="*", help="some of the methods, by name")
    parser.add_argument("--blocks", type=int, default=8, help="timed blocks of steps of each pair")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    console, taken, gained = Console(), [], []
    for case in cases():
        if asked.only and case.name not in asked.only:
            continue
        row, gains = measure(case, asked.blocks)
        console.print(f"{row.method}: {row.time:.3f} of a plain loop's time, {row.memory:.3f} of its memory")
        taken.append(row)
        gained += gains
    command = f"python -m benchmarks.against_plain --blocks {asked.blocks}"
    claims = claims_of(taken, command)
    write_atomically(asked.out / "summary.json", json.dumps({"claims": claims}, indent=1) + "\n")
    write_atomically(asked.out / "rows.json", json.dumps(
        {"rows": [dataclasses.asdict(row) for row in taken], "gains": [dataclasses.asdict(gain) for gain in gained]},
        indent=1,
    ) + "\n")  # fmt: skip
    write_atomically(asked.out / "README.md", render(
        "against_plain.md.jinja", command=command, claims=claims,
        rows=[(r.method, f"{r.time:.3f}", f"{r.time_drafted:.3f}", f"{r.memory:.3f}", f"{r.memory_drafted:.3f}",
               f"{r.milliseconds:.0f}", f"{r.apart:.1e}", f"{r.last_apart:.1e}") for r in taken],
        gains=[(g.method, g.rearrangement, f"{g.time:.3f}", f"{g.memory:.3f}") for g in gained],
    ))  # fmt: skip


if __name__ == "__main__":
    main()
