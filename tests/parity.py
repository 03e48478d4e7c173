"""What every family that draws from words is held to: a tiny pipeline on disk, ours and diffusers' own images of it.

A family is one `Tiny`; the checks below take it, the folder that it was saved to, and a folder to write into.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fieldsmith.models import load, load_adapter
from fieldsmith.models.core import Condition, LoraSpec
from fieldsmith.paths import guide
from fieldsmith.samplers import rollout
from tests.drawn import seeded

PROMPTS = ["a red square", "a blue circle", ""]


@dataclass(frozen=True)
class Tiny:
    """A family at its smallest."""

    make: Callable[[], Any]  # its pipeline with random weights
    family: str  # as `load` should name it
    sides: tuple[int, ...]  # of images in pixels, its own first
    call: Callable[[float | None, list[str]], dict[str, Any]]  # guidance and negative prompts, as the pipeline is told
    # the network as diffusers calls it: model, x, t, condition; and the scale where the network takes it
    raw: Callable[..., Tensor]
    wrong_side: int  # that it cannot draw
    subset: str = "attention"


def same(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def ours(model: Any, prompts: list[str], steps: int = 4, guidance: float | None = None, seed: int = 0) -> Tensor:
    """Images (n, 3, height, width) by our sampler."""
    return decoded(model, model.encode(prompts), guidance, steps, seed)


@torch.no_grad()
def decoded(model: Any, condition: Condition, guidance: float | None = None, steps: int = 4, seed: int = 0) -> Tensor:
    """As `ours`, of prompts that are encoded."""
    start = model.noise(len(condition), seeded(seed))
    return model.decode(rollout(lambda x, t: model.predict(x, t, condition, guidance), start, model.grid(steps)).last)


def theirs(
    tiny: Tiny, pipe: Any, prompts: list[str], side: int, guidance: float | None = None, steps: int = 4,
    negative: str = "", **more: Any,
) -> Tensor:  # fmt: skip
    """Images (n, 3, side, side) by the diffusers pipeline itself."""
    pipe.set_progress_bar_config(disable=True)
    output: Tensor = pipe(  # some write their template into the list that they are given
        prompt=[*prompts], height=side, width=side, num_inference_steps=steps, generator=seeded(), output_type="pt",
        **tiny.call(guidance, [negative] * len(prompts)), **more,
    ).images  # fmt: skip
    return output


def plain(folder: pathlib.Path) -> Any:
    """The pipeline in a folder, as diffusers alone loads it; what it was saved without has to be said again."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, made_by in index.items() if isinstance(made_by, list) and not any(made_by)}
    return getattr(diffusers, index["_class_name"]).from_pretrained(folder, **absent)


def train(model: Any, seed: int = 0, steps: int = 3) -> None:
    """A few steps towards noise; far enough to be seen in images."""
    optimiser = torch.optim.AdamW(list(model.trainable().values()), lr=0.05)
    generator, condition = seeded(seed), model.encode(PROMPTS[:1])
    x, t = model.noise(1, generator), model.grid(4)[1:2]
    goal = model.noise(1, generator)
    for _ in range(steps):
        optimiser.zero_grad()
        mse_loss(model.predict(x, t, condition).value, goal).backward()
        optimiser.step()


def trained(tiny: Tiny, folder: pathlib.Path, seed: int = 0) -> Any:
    """The model in a folder with an adapter after a few steps."""
    model = load(folder)
    model.adapt(LoraSpec(tiny.subset, rank=2, alpha=3.0, seed=seed))
    train(model, seed)
    return model


def check_parity(tiny: Tiny, folder: pathlib.Path, side: int, guidance: float | None) -> None:
    """A batch of different prompts, and guidance away from the empty prompt and from a named one."""
    model: Any = load(folder, resolution=side)
    assert model.family == tiny.family
    images = ours(model, PROMPTS, guidance=guidance)
    assert images.shape == (3, 3, side, side) and images.std() > 0.05
    same(images, theirs(tiny, model.pipeline, PROMPTS, side, guidance))
    assert apart(images, ours(model, PROMPTS[::-1], guidance=guidance).flip(0)) > 1e-2  # the noise is seen
    assert apart(images, ours(model, ["a square"] * 3, guidance=guidance)) > 1e-4  # the words are
    if guidance in (None, 1.0):
        return
    assert apart(images, ours(model, PROMPTS)) > 1e-4  # and the scale
    if model.embedded_guidance:
        return  # which the network takes, and leads away from nothing
    model.negative = "a blue square"
    away = ours(model, PROMPTS, guidance=guidance)
    same(away, theirs(tiny, model.pipeline, PROMPTS, side, guidance, negative=model.negative))
    assert apart(away, images) > 1e-4


def check_adapter(tiny: Tiny, folder: pathlib.Path, out: pathlib.Path) -> None:
    """A trained adapter, as LoRA, loaded again, and merged, in diffusers and here; at scale 0 the base's own bits."""
    side = tiny.sides[0]
    base = ours(load(folder, resolution=side), PROMPTS)
    model = trained(tiny, folder)
    expected = ours(model, PROMPTS)
    assert apart(expected, base) > 1e-3
    model.save(out / "adapter")
    pipe = plain(folder)
    pipe.load_lora_weights(out / "adapter")
    same(theirs(tiny, pipe, PROMPTS, side), expected)
    model.save(out / "merged", merged=True)
    same(theirs(tiny, plain(out / "merged"), PROMPTS, side), expected)
    same(ours(load(out / "merged"), PROMPTS), expected)
    again = load(folder)
    load_adapter(again, out / "adapter")
    same(ours(again, PROMPTS), expected)
    for one in (model, again):
        one.scale_adapter(0.0)
        assert torch.equal(ours(one, PROMPTS), base)


@torch.no_grad()
def check_two_adapters(tiny: Tiny, folder: pathlib.Path, out: pathlib.Path) -> None:
    """Two saved adapters together in diffusers are the base plus both changes of the weights."""
    shares = {"a": 0.5, "b": 0.7}
    both, pipe = load(folder), plain(folder)
    base = ours(both, PROMPTS)
    alone = []
    for seed, (name, share) in enumerate(shares.items()):
        with torch.enable_grad():
            model = trained(tiny, folder, seed)
        model.save(out / name)
        pipe.load_lora_weights(out / name, adapter_name=name)
        for layer, tuner in model._tuners().items():
            both.network.get_submodule(layer).weight.add_(share * tuner.get_delta_weight("default"))
        alone.append(ours(both, PROMPTS))
    pipe.set_adapters(list(shares), list(shares.values()))
    same(theirs(tiny, pipe, PROMPTS, tiny.sides[0]), alone[1])
    assert apart(alone[0], base) > 1e-3 and apart(alone[1], alone[0]) > 1e-3


def check_gradient(tiny: Tiny, folder: pathlib.Path, guidance: float | None) -> None:
    """The gradient of a loss, at states and at weights, through `predict` and through the raw network."""
    model: Any = load(folder)
    model.unfreeze(tiny.subset)
    x, t = model.noise(2, seeded()), model.grid(4)[1:3]
    goal = model.noise(2, seeded(1))
    condition, null = model.encode(PROMPTS[:2]), model.null.repeat(2)
    weights = list(model.trainable().values())

    def gradients(field: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        at = x.clone().requires_grad_()
        return torch.autograd.grad(mse_loss(field(at), goal), [at, *weights])

    def raw(at: Tensor) -> Tensor:
        if model.embedded_guidance:
            return tiny.raw(model, at, t, condition, 1.0 if guidance is None else guidance)
        output = tiny.raw(model, at, t, condition)
        return output if guidance is None else guide(output, tiny.raw(model, at, t, null), guidance)

    expected = gradients(raw)
    found = gradients(lambda at: model.predict(at, t, condition, guidance).value)
    for one, two in zip(found, expected, strict=True):
        assert two.abs().max() > 0
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-3)
