"""One command on one GPU: whether it computes what a CPU does, then what full-size networks cost.

    python -m benchmarks.gpu                       under nine minutes on one 80 GB GPU: writes results/gpu
    python -m benchmarks.gpu --tiny --out DIR      on a CPU: the same lines on toy sizes

Correctness is benchmarks/gpu_checks.py; networks have random weights (benchmarks/gpu_models.py). Timed: the whole
published GEM run on FLUX.1; a collection and an update of flow-grpo and nft on SD3.5-medium; a distill step on
DiT-XL/2; sampling beside diffusers' own pipeline; erase's update in variants. What the machine lacks, or what the nine
minutes have no room for, is left out with a word. The page is written again after every row, so that what was measured
stays.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms; read once, at the start

import torch
from rich.console import Console

from benchmarks import gpu_checks
from benchmarks.gpu_checks import Check
from benchmarks.gpu_models import CLASSES, FULL, TINY, Size, built, operations
from fieldsmith import verb
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.step import Inputs as DistillInputs
from fieldsmith.methods.distill.verb import DISTILL
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.models.memory import checkpoint_activations, compile_blocks
from fieldsmith.models.shrink import shrink
from fieldsmith.rewards import Reward
from fieldsmith.run import write_atomically
from fieldsmith.samplers import rollout

SECONDS = 540  # of the whole
GEM_SECONDS, GEM_GIGABYTES = 300, 48  # the aims, on one H100
BRIGHT = Reward("brightness", False, lambda images, prompts: images.mean((1, 2, 3)))


@dataclass(frozen=True)
class Row:
    """What one run cost; `share` of the ceiling that a large matrix product reaches here, None where not counted."""

    model: str
    parameters: int
    run: str
    variant: str
    updates: int
    preparing: float  # seconds until the first update
    seconds: float  # of the whole
    seconds_per_update: float
    gigabytes: float  # the most that was allocated
    share: float | None


@dataclass(frozen=True)
class Drawn:
    """Seconds of sampling by us and by diffusers' pipeline, the medians of rounds that take turns."""

    model: str
    images: int
    steps: int
    ours: float
    theirs: float


@dataclass
class Findings:
    """All that was found, and what was left out and why."""

    machine: str
    torch: str = torch.__version__
    ceiling: float = 0.0  # operations a second of a large matrix product
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def now(device: str) -> float:
    wait(device)
    return time.perf_counter()


def ceiling(device: str, dtype: torch.dtype, n: int) -> float:
    """Operations a second of an n x n matrix product."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(5):
        began = now(device)
        for _ in range(4):
            a @ b
        times.append(now(device) - began)
    return 8 * n**3 / min(times)


# the runs: a model, a size and how many updates -> what `verb.train` is given


def erase(model: Any, size: Size, updates: int, **changes: Any) -> tuple[Any, ...]:
    """GEM as published: 11 states an update, on the family's own layers."""
    config = EraseConfig.preset_of("paper", None, {}).replace(targets=("red",), anchors=("blue",), **changes)
    return ERASE, config.replace(budget=11 * updates, steps=size.rows["erase steps"]), EraseInputs()


def align(model: Any, size: Size, updates: int, preset: str) -> tuple[Any, ...]:
    """A collection for each update, guided as published."""
    config = AlignConfig.preset_of(preset, "laptop", {}).replace(
        prompts=("red", "blue", "a red square", "a blue circle"), prompts_per_epoch=size.rows["groups"],
        rollouts=size.rows["rollouts"], steps=size.rows["steps"], chunk=size.rows["chunk"], epochs=updates, updates=1,
        guidance=4.5, rank=32,
    )  # fmt: skip
    return ALIGN, config, AlignInputs(BRIGHT)


def distill(model: Any, size: Size, updates: int) -> tuple[Any, ...]:
    """DASH as published: both branches of the teacher at each state."""
    states = torch.randn(256, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    names = tuple(str(i) for i in range(CLASSES))
    source = Source(states, torch.arange(256) % CLASSES, names)
    config = DistillConfig.preset_of("dash-uniform", None, {}).replace(
        curriculum="uniform", batch=2 * size.rows["pairs"], steps=updates, warmup=0
    )
    return DISTILL, config, DistillInputs(source=source, student=shrink(model, size.student))


def timed(model: Any, name: str, variant: str, given: tuple[Any, ...], most: float, counted: bool) -> Row:
    """A run of `verb.train`, timed update by update; the first warms up and is left out where there are more."""
    device = model.device.type
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    marks, asked = [now(device)], []

    def callback(done: int, log: dict[str, float]) -> None:
        marks.append(now(device))
        asked.append(dict(model.__dict__.get("asked", {False: 0, True: 0})))

    of, config, inputs = given
    verb.train(of, model, config, inputs, callback=callback)
    spans = [after - before for before, after in zip(marks[1:], marks[2:], strict=False)]
    late = slice(1 if len(spans) > 1 else 0, None)
    share = None
    if counted:
        work = operations(model)
        done = [work.of({key: b[key] - a[key] for key in a}) for a, b in zip(asked, asked[1:], strict=False)]
        share = sum(done[late]) / sum(spans[late]) / most
    model.remove_training()
    return Row(
        name, sum(p.numel() for p in model.network.parameters()), of.name, variant, len(spans), marks[1] - marks[0],
        marks[-1] - marks[0], statistics.median(spans[late]),
        torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0, share,
    )  # fmt: skip


@torch.no_grad()
def sampled(model: Any, name: str, size: Size, rounds: int = 3) -> Drawn:
    """The same embeddings, steps and batch through our sampler and through diffusers' pipeline."""
    device, steps, pipe = model.device.type, size.rows["drawn"], model.pipeline
    condition = model.encode(["red"])
    embeds, pooled = (condition.parts[part].to(size.dtype) for part in ("embeds", "pooled"))
    pipe.set_progress_bar_config(disable=True)
    scale = 3.5 if model.embedded_guidance else 1.0

    def ours() -> None:
        x = model.noise(1, torch.Generator().manual_seed(0))
        model.decode(rollout(lambda x, t: model.predict(x, t, condition, scale), x, model.grid(steps)).last)

    def theirs() -> None:
        pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=model.resolution, width=model.resolution,
             num_inference_steps=steps, guidance_scale=scale, generator=torch.Generator().manual_seed(0),
             output_type="pt")  # fmt: skip

    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        for who, draw in (("ours", ours), ("theirs", theirs)):
            began = now(device)
            draw()
            spent[who].append(now(device) - began)
    return Drawn(name, 1, steps, *(statistics.median(spans[1:]) for spans in spent.values()))


VARIANTS: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "plain": (lambda model: None, {}),
    "chunk 12": (lambda model: None, {"chunk": 12}),
    "checkpointing": (checkpoint_activations, {}),
    "cuDNN attention": (lambda model: model.network.set_attention_backend("_native_cudnn"), {}),
    "compiled blocks": (compile_blocks, {}),  # last, since nothing takes it off again
}


def lacking(variant: str, device: str) -> str:
    """Why a variant cannot run here, or nothing."""
    if variant == "cuDNN attention" and not (device == "cuda" and torch.backends.cudnn.is_available()):
        return "there is no cuDNN"
    return "compiling pays on GPUs alone" if variant == "compiled blocks" and device == "cpu" else ""


class Session:
    """Parts of the command in their order, each with the seconds that it may need; findings are written at once."""

    def __init__(self, size: Size, device: str, out: pathlib.Path, seconds: float):
        self.size, self.device, self.out, self.seconds = size, device, out, seconds
        self.began, self.console = time.monotonic(), Console(stderr=True)
        self.found = Findings(torch.cuda.get_device_name() if device == "cuda" else "a CPU, toy sizes")

    @contextlib.contextmanager
    def part(self, name: str, needs: float) -> Iterator[bool]:
        """Whether there is time for it. What goes wrong inside is written down, and the rest still runs."""
        spent = time.monotonic() - self.began
        enough = self.device == "cpu" or spent + needs <= self.seconds
        if not enough:
            self.found.left_out.append(f"{name}: {spent:.0f} of {self.seconds:.0f} seconds were gone")
        try:
            yield enough
        except Exception as error:
            self.found.left_out.append(f"{name} failed: {type(error).__name__}: {str(error).strip()[:300]}")
            self.console.print_exception()
        self.found.seconds = time.monotonic() - self.began
        self.console.print(f"{self.found.seconds:5.0f} s  {name}")
        write_atomically(self.out / "README.md", page(self.found))
        write_atomically(self.out / "found.json", json.dumps(dataclasses.asdict(self.found), indent=1) + "\n")

    def checked(self, folder: pathlib.Path) -> None:
        tasks: dict[str, Callable[[pathlib.Path], Iterator[Check]]] = {
            "families": gpu_checks.families, "resumed runs": gpu_checks.resumes, "FSDP2": gpu_checks.fsdp,
        }  # fmt: skip
        for name, task in tasks.items():
            with self.part(name, 60) as enough:
                self.found.checks += task(folder / name.replace(" ", "-")) if enough else ()

    def run(self, model: Any, name: str, variant: str, given: tuple[Any, ...], counted: bool = True) -> None:
        self.found.rows.append(timed(model, name, variant, given, self.found.ceiling, counted))

    def flux(self) -> None:
        size = self.size
        with self.part("erase, FLUX.1", 240) as enough:
            if enough:
                model = built("FLUX.1", size, self.device)
                # two states at once are planned to take 42 GB, the published six 78
                given = erase(model, size, size.rows["erase updates"], chunk=size.rows["erase chunk"])
                self.run(model, "FLUX.1", "GEM as published", given)
                self.found.drawn.append(sampled(model, "FLUX.1", size))

    def sd3(self) -> None:
        size, model = self.size, None
        for preset in ("flow-grpo", "nft"):
            with self.part(f"align {preset}, SD3.5-medium", 60) as enough:
                if enough:
                    model = model or built("SD3.5-medium", size, self.device)
                    self.run(model, "SD3.5-medium", preset, align(model, size, 2, preset))
        with self.part("sampling, SD3.5-medium", 15) as enough:
            if enough and model:
                self.found.drawn.append(sampled(model, "SD3.5-medium", size))
        for variant, (turn_on, changes) in VARIANTS.items():
            with self.part(f"erase, SD3.5-medium, {variant}", 40) as enough:
                if reason := lacking(variant, self.device):
                    self.found.left_out.append(f"erase, {variant}: {reason}")
                elif enough and model:
                    turn_on(model)
                    given = erase(model, size, 3, subset="attention", **changes)
                    self.run(model, "SD3.5-medium", variant, given, counted=variant == "plain")
                    if variant == "checkpointing":
                        model.network.disable_gradient_checkpointing()

    def dit(self) -> None:
        with self.part("distill, DiT-XL/2", 30) as enough:
            if enough:
                model = built("DiT-XL/2", self.size, self.device)
                self.run(model, "DiT-XL/2", "DASH as published", distill(model, self.size, 4), counted=False)


def page(found: Findings) -> str:
    """What results/gpu/README.md says."""
    lines = [
        "# On a GPU", "",
        f"On {found.machine} with torch {found.torch}, by `python -m benchmarks.gpu`, {found.seconds:.0f} s in all. "
        "Networks have random weights; text encoders are left out of memory, as they wait on the CPU in a run with "
        f"`--offload`. A large matrix product reaches {found.ceiling / 1e12:.4g} TFLOP/s here, of which `share` is a "
        "part.", "",
        "## Correctness", "", "| check | value | at most | |", "| --- | ---: | ---: | --- |",
        *(f"| {c.name} | {'' if c.value is None else f'{c.value:.2g}'} | {c.limit:.2g} | "
          f"{'ok' if c.passed else 'NOT'} |" for c in found.checks), "",
        "## Training", "",
        "| model | parameters | verb | variant | s an update | until the first, s | whole run, s | peak, GB | share |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {r.model} | {r.parameters / 1e9:.3f}B | {r.run} | {r.variant} | {r.seconds_per_update:.3g} | "
          f"{r.preparing:.3g} | {r.seconds:.3g} ({r.updates} updates) | {r.gigabytes:.1f} | "
          f"{'' if r.share is None else f'{100 * r.share:.0f}%'} |" for r in found.rows), "",
        f"The aim for the first: below {GEM_SECONDS} s and {GEM_GIGABYTES} GB on one H100.", "",
        "## Sampling beside diffusers' pipeline", "",
        "| model | images | steps | ours, s | theirs, s | theirs over ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {d.model} | {d.images} | {d.steps} | {d.ours:.3g} | {d.theirs:.3g} | {d.theirs / d.ours:.3f} |"
          for d in found.drawn), "",
        "## Left out", "", *(f"- {reason}" for reason in found.left_out or ["nothing"]), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> Findings:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for machines without a GPU")
    parser.add_argument("--parts", nargs="*", default=["checks", "flux", "sd3", "dit"], help="some of the parts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long all of it may take")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/gpu"))
    asked = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.tiny:
        parser.error("no GPU here: add --tiny for toy sizes, or run it where there is one")
    size = TINY if asked.tiny else FULL
    session = Session(size, device, asked.out, asked.seconds)
    session.found.ceiling = ceiling(device, size.dtype, 8192 if device == "cuda" else 256)
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], None]] = {
            "checks": lambda: session.checked(pathlib.Path(folder)), "flux": session.flux, "sd3": session.sd3,
            "dit": session.dit,
        }  # fmt: skip
        for name in asked.parts:
            parts[name]()
            if device == "cuda":
                torch.cuda.empty_cache()
    return session.found


if __name__ == "__main__":
    main()
