"""Step time, peak memory and share of the matrix units' ceiling of full-size transformers with random weights.

    python -m benchmarks.gpu --out results/gpu            on one GPU: FLUX.1 12B, Kontext, SD3.5 medium
    python -m benchmarks.gpu --tiny --out /tmp/gpu         on a CPU: the same lines on toy sizes

Transformers are built from their public configurations; prompts are random embeddings of the encoders' shapes, as a run
has them once its text encoders are done, and the autoencoder is a small one on latents of the real size. One row a verb
and variant (plain, torch.compile, attention back end, chunk); the first is the whole published GEM run on FLUX.1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.tiny import flux_pipeline, kontext_pipeline
from experiments.tiny_text import sd3_pipeline
from fieldsmith import verb
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.edit.verb import EDIT
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.models.memory import checkpoint_activations
from fieldsmith.models.sd3 import SD3
from fieldsmith.rewards import Reward
from fieldsmith.worlds.scenes_judge import Channel

WORDS = ("a", "red", "blue", "square", "circle")
GEM_SECONDS, GEM_GIGABYTES = 300, 48  # the aim, on one H100


@dataclass(frozen=True)
class Size:
    """How large everything is: the whole of what `--tiny` changes."""

    side: int
    text: int  # tokens of T5
    flux: dict[str, Any]
    sd3: dict[str, Any]
    dtype: torch.dtype


FLUX_1 = {"guidance_embeds": True}  # diffusers' defaults are FLUX.1: 19 + 38 blocks, 24 heads of 128
SD35_MEDIUM = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "num_attention_heads": 24,
    "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
FULL = Size(512, 512, FLUX_1, SD35_MEDIUM, torch.bfloat16)
TINY = Size(
    32,
    8,
    FLUX_1 | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 32,
              "pooled_projection_dim": 32},
    SD35_MEDIUM | {"sample_size": 8, "num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 32,
                   "caption_projection_dim": 64, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
                   "dual_attention_layers": (0,)},
    torch.float32,
)  # fmt: skip


def embedded(kind: type[Any], text: int) -> type[Any]:
    """The family, with random embeddings for words."""

    class Embedded(kind):  # type: ignore[misc]
        def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
            shape = self.network.config
            rows = []
            for prompt in prompts:
                generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
                rows.append((torch.randn(text, shape.joint_attention_dim, generator=generator),
                             torch.randn(shape.pooled_projection_dim, generator=generator)))  # fmt: skip
            embeds, pooled = (torch.stack(part).to(self.device) for part in zip(*rows, strict=True))
            return Condition({"embeds": embeds, "pooled": pooled})

    return Embedded


def built(name: str, size: Size, device: str) -> Model:
    """The model, its transformer drawn where it will work."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            network: Any = (
                SD3Transformer2DModel(**size.sd3) if name == "sd3.5-medium" else FluxTransformer2DModel(**size.flux)
            )
    finally:
        torch.set_default_dtype(before)
    make: dict[str, tuple[Callable[..., Any], type[Any]]] = {
        "flux": (flux_pipeline, Flux), "kontext": (kontext_pipeline, FluxKontext), "sd3.5-medium": (sd3_pipeline, SD3),
    }  # fmt: skip
    pipe, kind = make[name]
    small = pipe(WORDS)
    vae = flux_pipeline(WORDS, vae_channels=(8, 8, 8, 8), latent_channels=16).vae  # an eighth of the side, as real ones
    pipeline = type(small)(**{**small.components, "transformer": network.eval(), "vae": vae.to(device)})
    model: Model = embedded(kind, size.text)(pipeline, name, size.side)
    return model


BRIGHT = Reward("brightness", True, lambda images, prompts: images.mean((1, 2, 3)))


def erase(model: Model, updates: int, **changes: Any) -> None:
    """GEM as published: LoRA on qk_dual, 11 states an update."""
    config = replace(EraseConfig.preset_of("paper", None, {}), targets=("red",), anchors=("blue",), **changes)
    per_step = config.batch * (config.window[1] - config.window[0] + 1)
    verb.train(ERASE, model, replace(config, budget=updates * per_step), EraseInputs())


def align_first(model: Model, updates: int, **changes: Any) -> None:
    config = replace(
        AlignConfig.preset_of("draft", "laptop", {}),
        prompts=("red", "blue"),
        prompts_per_epoch=2,
        rollouts=1,
        **changes,
    )
    verb.train(ALIGN, model, replace(config, epochs=updates, updates=1), AlignInputs(BRIGHT))


def align_zeroth(model: Model, updates: int, **changes: Any) -> None:
    config = replace(
        AlignConfig.preset_of("flow-grpo", "laptop", {}),
        prompts=("red", "blue"),
        prompts_per_epoch=2,
        rollouts=4,
        **changes,
    )
    reward = replace(BRIGHT, differentiable=False)
    verb.train(ALIGN, model, replace(config, epochs=updates, updates=1), AlignInputs(reward))


@dataclass(frozen=True)
class GreySessions:
    """Sessions of two turns from grey images."""

    images: Tensor
    turns: int = 2

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> GreySessions:
        return GreySessions(self.images[rows])

    def prompts(self, turn: int) -> list[str]:
        return ["red"] * len(self)

    def clean(self, turn: int) -> Tensor:
        return self.images


@dataclass(frozen=True)
class Scored:
    following: Tensor
    consistency: Tensor


def judge(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Scored:
    return Scored(after.mean((1, 2, 3)), 1 - after.mean((1, 2, 3)))


def edit(model: Model, updates: int, **changes: Any) -> None:
    side = model.resolution  # type: ignore[attr-defined]
    config = EditConfig.preset_of("mt-nft", "paper", {}).replace(
        groups=1, rollouts=4, turns=2, steps=8, max_mean=1.0, min_spread=0.0, updates=1, epochs=updates, **changes
    )
    inputs = EditInputs(lambda n, seed, turns: GreySessions(torch.full((n, 3, side, side), 0.5)), judge, Channel())
    verb.train(EDIT, model, config, inputs)


@dataclass(frozen=True)
class Row:
    """What one verb cost in one variant; `share` of the ceiling that a large matrix product reaches here."""

    model: str
    parameters: int
    verb: str
    variant: str
    updates: int
    seconds: float
    seconds_per_update: float
    peak_gigabytes: float
    share_of_ceiling: float


CASES: tuple[tuple[str, str, Callable[..., None], int, dict[str, Any]], ...] = (
    ("flux", "erase", erase, 23, {}),
    ("flux", "align draft", align_first, 3, {"chunk": 1}),
    ("flux", "align flow-grpo", align_zeroth, 3, {"chunk": 2}),
    ("kontext", "edit mt-nft", edit, 3, {"chunk": 2}),
    ("sd3.5-medium", "erase", erase, 3, {"subset": "attention"}),
    ("sd3.5-medium", "align flow-grpo", align_zeroth, 3, {"chunk": 4}),
)
VARIANTS = ("plain", "checkpointing", "compile", "cudnn attention", "chunk 2x")


def varied(model: Model, variant: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Turn the variant on; the run's settings with it."""
    if variant == "checkpointing":
        checkpoint_activations(model)
    elif variant == "compile":
        model.network.compile_repeated_blocks()
    elif variant == "cudnn attention":
        model.network.set_attention_backend("_native_cudnn")
    elif variant == "chunk 2x":
        return changes | {"chunk": 2 * changes.get("chunk", 4)}
    return changes


def ceiling(device: str, dtype: torch.dtype, n: int) -> float:
    """Operations a second of an n x n matrix product."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        times.append(time.perf_counter() - began)
    return 8 * n**3 / min(times)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(case: int, variant: str, size: Size, device: str, most: float) -> Row:
    """A fresh model, one update to warm up and count operations, then the run."""
    name, verb, run, updates, changes = CASES[case]
    updates = updates if device == "cuda" else 1
    model = built(name, size, device)
    parameters = sum(p.numel() for p in model.network.parameters())
    settings = varied(model, variant, changes)
    operations = []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            run(model, steps, **settings)
        model.remove_training()
        operations.append(counter.get_total_flops())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spans = []
    for steps in (1, 1 + updates):
        wait(device)
        began = time.perf_counter()
        run(model, steps, **settings)
        wait(device)
        spans.append(time.perf_counter() - began)
        model.remove_training()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    each = (spans[1] - spans[0]) / updates
    return Row(
        name, parameters, verb, variant, updates, spans[1], each, peak, (operations[1] - operations[0]) / each / most
    )


def table(rows: Sequence[Row], device: str) -> str:
    lines = [
        "# Full-size transformers with random weights", "",
        f"On {device}, by `python -m benchmarks.gpu`. Seconds an update without preparation; the whole run's seconds "
        "with it; share of what a large matrix product reaches on the same device.", "",
        "| model | parameters | verb | variant | s an update | run, s | peak, GB | share of ceiling |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |",
        *(f"| {r.model} | {r.parameters / 1e9:.2f}B | {r.verb} | {r.variant} | {r.seconds_per_update:.3g} | "
          f"{r.seconds:.3g} ({r.updates + 1} updates) | {r.peak_gigabytes:.1f} | {100 * r.share_of_ceiling:.0f}% |"
          for r in rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for machines without a GPU")
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))), help="some of the rows")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/gpu"))
    asked = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.tiny:
        parser.error("no GPU here: add --tiny for toy sizes, or run it where there is one")
    size = TINY if asked.tiny else FULL
    most = ceiling(device, size.dtype, 8192 if device == "cuda" else 256)
    rows: list[Row] = []
    asked.out.mkdir(parents=True, exist_ok=True)
    for case in asked.cases:
        for variant in asked.variants:
            rows.append(measured(case, variant, size, device, most))
            where = torch.cuda.get_device_name() if device == "cuda" else "a CPU, toy sizes"
            (asked.out / "README.md").write_text(table(rows, where), encoding="utf-8")
            (asked.out / "rows.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
