"""Whether a device computes what a CPU does: what benchmarks/gpu.py asks before it times anything.

In: a device. Out: checks, each a number beside its limit. Every family's tiny pipeline is held against a CPU's float32,
every verb's interrupted run against an uninterrupted one, one process under FSDP2 against none. What has to run under
another environment is a process of its own: `python -m benchmarks.gpu_checks TASK FOLDER`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.plan_error import ALIGN, DISTILL, EDIT, ERASE, INPUTS, PIPELINES, SHARPEN
from experiments.tiny import dit_pipeline, flux_pipeline, kontext_pipeline, unet_pipeline
from experiments.tiny_edit import flux2_klein_pipeline, qwen_image_edit_pipeline, qwen_image_pipeline
from experiments.tiny_text import sd3_pipeline, sd15_pipeline
from fieldsmith import planning, processes, verb
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.models import load
from fieldsmith.planning import Judged, Scores
from fieldsmith.rewards import Reward
from fieldsmith.run import Run
from fieldsmith.samplers import rollout

WORDS = ("a", "red", "blue", "square", "circle")
PROMPTS = ("a red square", "a blue circle")
# name -> the tiny pipeline, its images' side, what it is asked for
FAMILIES: dict[str, tuple[Callable[[], Any], int, tuple[str, ...]]] = {
    "sd15": (lambda: sd15_pipeline(WORDS), 16, PROMPTS),
    "sd3": (lambda: sd3_pipeline(WORDS), 16, PROMPTS),
    "flux": (lambda: flux_pipeline(WORDS), 32, PROMPTS),
    "flux-kontext": (lambda: kontext_pipeline(WORDS), 32, PROMPTS),
    "flux2-klein": (lambda: flux2_klein_pipeline(WORDS), 32, PROMPTS),
    "qwen-image": (lambda: qwen_image_pipeline(WORDS), 16, PROMPTS),
    "qwen-image-edit": (lambda: qwen_image_edit_pipeline(WORDS), 16, PROMPTS),
    "dit": (lambda: dit_pipeline(classes=10), 16, ("1", "2")),
    "unet": (lambda: unet_pipeline(), 16, ("", "")),
}  # fmt: skip
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
EXACT = 1e-4  # relative distance of float32 from a CPU's; that of bf16 may be twice what bf16 on a CPU has
# two updates each, the second after a checkpoint
RUNS: dict[str, tuple[str, Any]] = {
    "erase": ("flux", ERASE), "align": ("flux", ALIGN.replace(epochs=2)),
    "edit": ("kontext", EDIT.replace(epochs=2, updates=1)), "distill": ("unet", DISTILL), "sharpen": ("unet", SHARPEN),
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A number, the most that it may be, and what it is of; None: it could not be taken, for the reason in `name`."""

    name: str
    value: float | None
    limit: float

    @property
    def passed(self) -> bool:
        return self.value is None or self.value <= self.limit


def distance(one: Tensor, two: Tensor) -> float:
    """|one - two| / |two|."""
    return float((one.double() - two.double()).norm() / two.double().norm().clamp(min=1e-12))


def farthest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest distance of all parts."""
    return max(distance(some[name], others[name]) for name in others)


# every family as a CPU has it


@torch.no_grad()
def outputs(folder: pathlib.Path, side: int, prompts: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a tiny model says and draws, on the CPU in float32; it works where `load` puts it."""
    model: Any = load(folder, resolution=side, dtype=dtype)
    condition = model.encode(list(prompts))
    generator = torch.Generator().manual_seed(0)
    if hasattr(model, "with_images"):
        condition = model.with_images(condition, torch.rand(2, 3, side, side, generator=generator).to(model.device))
    x = model.noise(2, generator)
    made = {f"velocity at {t}": model.predict(x, torch.tensor(t), condition).value for t in (0.25, 0.75)}
    path = rollout(lambda x, t: model.predict(x, t, condition), x, model.grid(4))
    made |= {"state after 4 steps": path.last, "image": model.decode(path.last)}
    return {name: part.float().cpu().contiguous() for name, part in made.items()}


def families(folder: pathlib.Path, names: Iterable[str] = tuple(FAMILIES)) -> Iterator[Check]:
    """Each family on this device, in both types, against a process that sees no accelerator."""
    names = list(names)
    for name in names:
        FAMILIES[name][0]().save_pretrained(folder / name)
    _child("reference", folder, CUDA_VISIBLE_DEVICES="")
    for name in names:
        _, side, prompts = FAMILIES[name]
        exact, rounded = (load_file(folder / f"{name}-{kind}.safetensors") for kind in TYPES)
        for kind, dtype in TYPES.items():
            with _exact_convolutions():
                found = outputs(folder / name, side, prompts, dtype)
            limit = EXACT if kind == "float32" else 2 * farthest(rounded, exact)
            yield Check(f"{name} in {kind} against a CPU's float32", farthest(found, exact), limit)


def reference(folder: pathlib.Path) -> None:
    for name in (place.name for place in folder.iterdir() if (place / "model_index.json").exists()):
        _, side, prompts = FAMILIES[name]
        for kind, dtype in TYPES.items():
            save_file(outputs(folder / name, side, prompts, dtype), folder / f"{name}-{kind}.safetensors")


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# runs that are interrupted


class Interrupted(Exception):
    pass


def given(name: str) -> Any:
    """A verb's inputs, whose judges are functions of what they see."""
    bright = Reward("brightness", True, lambda images, prompts: images.mean((1, 2, 3)))
    if name == "align":
        return AlignInputs(bright)
    if name == "edit":
        judge = lambda sessions, turn, before, after, first: Scores(after.mean((1, 2, 3)), -after[:, 0].mean((1, 2)))  # noqa: E731
        return replace(INPUTS["edit"](RUNS["edit"][1], Judged()), judge=judge)
    return INPUTS[name](RUNS[name][1], Judged())


def trained(name: str, folder: pathlib.Path, run: Run | None, stop: int | None = None) -> list[Tensor]:
    """A tiny run of a verb, in `run` where there is one; its weights. Raises Interrupted after `stop` updates."""
    pipeline, config = RUNS[name]

    def interrupt(done: int, log: dict[str, float]) -> None:
        if done == stop:
            raise Interrupted

    of, _ = planning.INPUTS[name]
    job, _ = verb.train(of, load(folder / pipeline), config, given(name), run, interrupt)
    return [p.detach().float().cpu() for p in job.parameters.values()]


def resumes(folder: pathlib.Path, names: Iterable[str] = tuple(RUNS)) -> Iterator[Check]:
    """An interrupted run goes on to the last bit, under deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        for name in names:
            if not (folder / RUNS[name][0]).exists():
                PIPELINES[RUNS[name][0]](folder / RUNS[name][0])
            whole = trained(name, folder, Run(folder / f"{name}-whole", name, RUNS[name][1]))
            broken = folder / f"{name}-broken"
            with contextlib.suppress(Interrupted):
                trained(name, folder, Run(broken, name, RUNS[name][1]), stop=1)
            again = trained(name, folder, Run(broken, name, RUNS[name][1]))
            apart = max(float((a - b).abs().max()) for a, b in zip(whole, again, strict=True))
            yield Check(f"{name}, interrupted and resumed, against one that was not", apart, 0.0)
    finally:
        torch.use_deterministic_algorithms(False)


# one process under FSDP2


def fsdp(folder: pathlib.Path) -> Iterator[Check]:
    """The losses of a run whose network FSDP2 holds, in one process, against a plain one's."""
    if not (folder / "flux").exists():
        PIPELINES["flux"](folder / "flux")
    plain = json.loads(_child("losses", folder, ACCELERATE_MIXED_PRECISION="no"))
    launched = json.loads(_child(
        "losses", folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2",
    ))  # fmt: skip
    if not launched["sharded"]:
        yield Check("one process under FSDP2: left out, the engine shards over two or more", None, 0.0)
        return
    pairs = zip(launched["losses"], plain["losses"], strict=True)
    yield Check("losses of one process under FSDP2 against none", max(abs(a / b - 1) for a, b in pairs), 1e-4)


def losses(folder: pathlib.Path) -> None:
    """Of a tiny erase run, printed as JSON."""
    processes.begin()
    found: list[float] = []
    of, _ = planning.INPUTS["erase"]
    config = RUNS["erase"][1]
    verb.train(of, load(folder / "flux"), config, given("erase"),
               callback=lambda done, log: found.append(log["loss"]) if done else None)  # fmt: skip
    print(json.dumps({"sharded": processes.sharded(), "losses": found}))


def _child(task: str, folder: pathlib.Path, *launcher: str, **environment: str) -> str:
    """A task of this file in a process of its own; the last line that it printed."""
    command = [sys.executable, *launcher, "-m", "benchmarks.gpu_checks", task, str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


TASKS: dict[str, Callable[[pathlib.Path], None]] = {"reference": reference, "losses": losses}

if __name__ == "__main__":
    TASKS[sys.argv[1]](pathlib.Path(sys.argv[2]))
