"""Our sampler against the diffusers pipeline's own, images a second, on the same prompts, steps and batch.

Both encode the prompts and decode the images. CPU time of this process on one thread; rounds of both alternate, and the
ratio is theirs over ours, each the fastest of the rounds: above 1, we are faster. Networks are tiny and random, so that
what lies around them counts as much as it ever will.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from experiments.tiny import dit_pipeline, flux_pipeline, kontext_pipeline, unet_pipeline
from experiments.tiny_edit import flux2_klein_pipeline, qwen_image_pipeline
from experiments.tiny_text import sd3_pipeline, sd15_pipeline
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.samplers import rollout

WORDS = ("a", "red", "blue", "square", "circle")
PROMPTS = ["a red square", "a blue circle"]
STEPS = 8


@dataclass(frozen=True)
class Ratio:
    """Their CPU time over ours."""

    family: str
    ratio: float
    our_milliseconds: float


def _prompted(pipe: Any, size: int, **more: Any) -> None:
    pipe(prompt=PROMPTS, height=size, width=size, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0),
         output_type="pt", **more)  # fmt: skip


FAMILIES: dict[str, tuple[Callable[[], Any], int, Callable[[Any], Any]]] = {
    "sd15": (lambda: sd15_pipeline(WORDS), 32, lambda pipe: _prompted(pipe, 32, guidance_scale=1.0)),
    "sd3": (lambda: sd3_pipeline(WORDS), 32, lambda pipe: _prompted(pipe, 32, guidance_scale=1.0)),
    "flux": (lambda: flux_pipeline(WORDS), 32, lambda pipe: _prompted(pipe, 32, max_sequence_length=8)),
    "flux-kontext": (
        lambda: kontext_pipeline(WORDS), 32, lambda pipe: _prompted(pipe, 32, max_sequence_length=8, max_area=32 * 32),
    ),
    "flux2-klein": (lambda: flux2_klein_pipeline(WORDS), 16, lambda pipe: _prompted(pipe, 16, guidance_scale=1.0)),
    "qwen-image": (lambda: qwen_image_pipeline(WORDS), 16, lambda pipe: _prompted(pipe, 16, true_cfg_scale=1.0)),
    "dit": (
        lambda: dit_pipeline(classes=1000), 16,
        lambda pipe: pipe([1, 2], guidance_scale=1.0, num_inference_steps=STEPS, output_type="np"),
    ),
    "unet": (
        lambda: unet_pipeline(), 16,
        lambda pipe: pipe(batch_size=2, num_inference_steps=STEPS, output_type="np"),
    ),
}  # fmt: skip


@torch.no_grad()
def ours(model: Model, prompts: list[str]) -> None:
    condition = model.encode(prompts)
    noise = model.noise(len(prompts), torch.Generator().manual_seed(0))
    path = rollout(lambda x, t: model.predict(x, t, condition), noise, model.grid(STEPS))
    model.decode(path.last)


def measure(family: str, rounds: int = 12) -> Ratio:
    make, size, theirs = FAMILIES[family]
    with tempfile.TemporaryDirectory() as folder:
        make().save_pretrained(folder)
        model = load(pathlib.Path(folder), resolution=size)
    pipe = model.pipeline
    if family == "unet":
        from diffusers import DDIMPipeline

        pipe = DDIMPipeline(pipe.unet, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompts = {"unet": ["", ""], "dit": ["1", "2"]}.get(family, PROMPTS)
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        for name, run in (("ours", lambda: ours(model, prompts)), ("theirs", lambda: theirs(pipe))):
            began = time.process_time()
            run()
            spent[name].append(time.process_time() - began)
    fastest = {name: min(spans) for name, spans in spent.items()}  # others were disturbed
    return Ratio(family, fastest["theirs"] / fastest["ours"], 1000 * fastest["ours"])
