"""FLUX.2 klein, Qwen-Image and Qwen-Image-Edit against diffusers' own pipelines: images, times, sources, adapters,
gradients, wrong sizes. Every pipeline is saved by the test and loaded back."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import WORDS
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor

from experiments.tiny_edit import flux2_klein_pipeline, qwen_image_edit_pipeline, qwen_image_pipeline
from fieldsmith import preflight
from fieldsmith.errors import InputError
from fieldsmith.models import load, load_adapter
from fieldsmith.models.core import Condition, LoraSpec, stack
from fieldsmith.models.editing import edit, encode_unique, quantised
from fieldsmith.models.qwen_image_edit import _words
from fieldsmith.samplers import rollout
from tests.drawn import seeded

MAKERS: dict[str, Any] = {
    "flux2-klein": flux2_klein_pipeline,
    "qwen-image": qwen_image_pipeline,
    "qwen-image-edit": qwen_image_edit_pipeline,
}
FAMILIES = tuple(MAKERS)
EDITORS = ("flux2-klein", "qwen-image-edit")
PROMPTS = ["a red square", "a blue circle square", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A tiny random pipeline of each family, saved. Read only."""
    root = tmp_path_factory.mktemp("families")
    for family, make in MAKERS.items():
        make(WORDS).save_pretrained(root / family)
    return {family: root / family for family in MAKERS}


@pytest.fixture(autouse=True)
def own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image-Edit's pipelines resize sources to 1024 x 1024 pixels, which the tests cannot afford."""
    monkeypatch.setattr(
        pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (round(16 * ratio), 16, None)
    )
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 32 * 32)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 32)


def pictures(n: int, height: int = 16, width: int | None = None, seed: int = 5) -> Tensor:
    """Random images (n, 3, height, width) in [0, 1], at 8-bit levels."""
    return quantised(torch.rand(n, 3, height, width or height, generator=seeded(seed)))


def drawn(images: Tensor) -> list[PIL.Image.Image]:
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [PIL.Image.fromarray(np.ascontiguousarray(image)) for image in pixels.numpy()]


def asked(model: Any, prompts: Sequence[str] = PROMPTS, seed: int = 5) -> Condition:
    """What each family needs to draw: words, and a source image each where words are not enough."""
    condition = encode_unique(model, list(prompts))
    if model.family == "qwen-image-edit":
        condition = model.with_images(condition, pictures(len(prompts), seed=seed))
    return condition


@torch.no_grad()
def ours(model: Any, condition: Condition, guidance: float | None = None, steps: int = 3) -> Tensor:
    start = model.noise(len(condition), seeded())
    path = rollout(lambda x, t: model.predict(x, t, condition, guidance), start, model.grid(steps))
    return model.decode(path.last)


def theirs(
    model: Any,
    prompts: Sequence[str] = PROMPTS,
    images: list[PIL.Image.Image] | None = None,
    guidance: float = 1.0,
    steps: int = 3,
    pipe: Any = None,
    **options: Any,
) -> Tensor:
    """The images (n, 3, height, width) of the diffusers pipeline itself, away from the model's negative prompt."""
    pipe, n = pipe or model.pipeline, len(prompts)
    pipe.set_progress_bar_config(disable=True)
    if model.family == "flux2-klein":
        options |= {"guidance_scale": guidance, "max_sequence_length": 32}
        if guidance > 1 and model.negative:
            options["negative_prompt_embeds"] = pipe.encode_prompt([model.negative] * n, max_sequence_length=32)[0]
    else:
        options |= {"true_cfg_scale": guidance, "negative_prompt": [model.negative] * n if guidance > 1 else None}
    if images is None and model.family == "qwen-image-edit":
        images = drawn(pictures(n))
    if images is not None:
        options["image"] = images
    options.setdefault("generator", seeded())
    output: Tensor = pipe(
        prompt=list(prompts), height=model.resolution, width=model.resolution, num_inference_steps=steps,
        output_type="pt", **options,
    ).images  # fmt: skip
    return output


def same(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def shake(model: Any, seed: int = 7) -> None:
    """Move every trainable weight, as training would."""
    generator = seeded(seed)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))


# parity with diffusers


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_is_the_pipelines(folders: dict[str, pathlib.Path], family: str, size: int) -> None:
    model: Any = load(folders[family], resolution=size)
    assert model.family == family and model.latent_shape == ((size // 8) ** 2, 16)
    plain = ours(model, asked(model))
    same(plain, theirs(model))
    guided = ours(model, asked(model), guidance=3.0)
    same(guided, theirs(model, guidance=3.0))
    model.negative = "a blue square"
    away = ours(model, asked(model), guidance=3.0)
    same(away, theirs(model, guidance=3.0))
    assert min(apart(plain, guided), apart(guided, away)) > 1e-3 < float(plain.std())
    assert min(apart(plain[0], plain[1]), apart(plain[1], plain[2])) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_other_lengths_beside_it_change_nothing(folders: dict[str, pathlib.Path], family: str) -> None:
    model: Any = load(folders[family], resolution=16)
    alone = stack([asked(model, [prompt]) for prompt in PROMPTS])
    x, t = model.noise(3, seeded()), torch.tensor([0.2, 0.6, 0.9])
    with torch.no_grad():
        for guidance in (None, 3.0):
            batch = model.predict(x, t, alone, guidance).velocity
            rows = [
                model.predict(x[i : i + 1], t[i : i + 1], asked(model, [prompt]), guidance).velocity
                for i, prompt in enumerate(PROMPTS)
            ]
            torch.testing.assert_close(batch, torch.cat(rows), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["flux2-klein", "qwen-image"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_dynamic_shifting": False, "shift": 3.0}, {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.1, "max_shift": 0.9, "max_image_seq_len": 8192},
        {"use_karras_sigmas": True},
    ],
)  # fmt: skip
def test_times_are_the_pipelines(folders: dict[str, pathlib.Path], family: str, options: dict[str, Any]) -> None:
    model: Any = load(folders[family], resolution=16)
    model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**options)
    before = model.pipeline.scheduler.sigmas.clone()
    grid = model.grid(5)
    assert torch.equal(model.pipeline.scheduler.sigmas, before)
    same(ours(model, asked(model, PROMPTS[:1]), steps=5), theirs(model, PROMPTS[:1], steps=5))
    assert torch.equal(grid, model.pipeline.scheduler.sigmas)


def test_a_single_step_cannot_be_stretched(folders: dict[str, pathlib.Path]) -> None:
    with pytest.raises(InputError, match=r"steps=1: .* 2 steps or more"):
        load(folders["qwen-image"], resolution=16).grid(1)
    assert load(folders["flux2-klein"]).grid(1).tolist() == [1, 0]


def test_a_distilled_klein_takes_no_guidance(tmp_path: pathlib.Path) -> None:
    flux2_klein_pipeline(WORDS, distilled=True, size=16).save_pretrained(tmp_path)
    model: Any = load(tmp_path)
    condition = asked(model)
    plain = ours(model, condition)
    with model.count_nfe() as nfe:
        assert model.embedded_guidance and torch.equal(ours(model, condition, guidance=3.0), plain)
    assert nfe.total == 3 * 3  # one forward each, with guidance too
    same(plain, theirs(model, guidance=3.0))


# source images


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_kleins_sources_are_the_pipelines(folders: dict[str, pathlib.Path], guidance: float | None) -> None:
    model: Any = load(folders["flux2-klein"])
    square, wide = pictures(1, 64), pictures(1, 64, 72, seed=6)
    model.negative = "red"
    output = []
    for sources in ([square], [wide, square]):  # the pipeline shows all its prompts the same images
        condition = model.with_images(model.encode(PROMPTS[:2]), sources)
        output.append(ours(model, condition, guidance))
        images = [drawn(source)[0] for source in sources]
        same(output[-1], theirs(model, PROMPTS[:2], images, guidance or 1.0))
    assert min(apart(*output), apart(output[0], ours(model, model.encode(PROMPTS[:2]), guidance))) > 1e-3


def test_each_row_sees_its_own_source(folders: dict[str, pathlib.Path]) -> None:
    model: Any = load(folders["flux2-klein"])
    images, start = pictures(3, 64), model.noise(3, seeded()).mT.unflatten(2, (model.side, model.side))
    rows = [theirs(model, [p], drawn(images[i : i + 1]), latents=start[i : i + 1]) for i, p in enumerate(PROMPTS)]
    same(ours(model, model.with_images(model.encode(PROMPTS), images)), torch.cat(rows))


def test_qwens_sources_of_another_size_are_the_pipelines(folders: dict[str, pathlib.Path]) -> None:
    model: Any = load(folders["qwen-image-edit"], resolution=24)
    images = pictures(3, 16, 40)
    condition = model.with_images(model.encode(PROMPTS), images)
    assert condition.parts["source"].shape == (3, 2 * 5, 16)
    same(ours(model, condition, 2.0), theirs(model, PROMPTS, drawn(images), 2.0))
    one = model.with_images(model.encode(PROMPTS[:1]), images[:1])
    same(ours(model, one.repeat(3)), theirs(model, PROMPTS[:1] * 3, drawn(images[:1]) * 3))


@pytest.mark.parametrize("number", [1, 2])
def test_edit_plus_sees_several_sources(tmp_path: pathlib.Path, number: int) -> None:
    qwen_image_edit_pipeline(WORDS, plus=True).save_pretrained(tmp_path)
    model: Any = load(tmp_path, resolution=16)
    model.negative = "red"
    sources = [pictures(2, 32, seed=seed) for seed in range(number)]
    condition = model.with_images(model.encode(PROMPTS[:2]), sources)
    start = model.noise(2, seeded())
    rows = [  # the pipeline takes one prompt at a time
        theirs(model, [p], [drawn(s)[i] for s in sources], 2.0, latents=start[i : i + 1])
        for i, p in enumerate(PROMPTS[:2])
    ]
    same(ours(model, condition, 2.0), torch.cat(rows))


@pytest.mark.parametrize("family", EDITORS)
def test_stored_sources_are_seen_as_images_are(folders: dict[str, pathlib.Path], family: str) -> None:
    model: Any = load(folders[family], resolution=16)
    prompts, latents = model.encode(PROMPTS), model.encode_images(pictures(3))
    whole, stored = model.with_images(prompts, pictures(3)), model.with_latents(prompts, latents)
    assert torch.equal(whole.parts["source"], stored.parts["source"])
    if family == "flux2-klein":
        assert torch.equal(ours(model, whole), ours(model, stored))
    else:  # the text encoder sees what the latents decode to
        seen = model.with_images(prompts, quantised(model.decode(latents)))
        assert torch.equal(seen.parts["embeds"], stored.parts["embeds"])
        assert apart(whole.parts["embeds"], stored.parts["embeds"]) > 1e-3
    again = model.with_images(stored, pictures(3))  # a new turn takes the old source's place
    assert torch.equal(ours(model, again), ours(model, whole))
    result = edit(model, prompts, pictures(3), seeded(), steps=2)
    assert result.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("family", EDITORS)
def test_gradient_reaches_the_sources_where_it_is_asked_for(folders: dict[str, pathlib.Path], family: str) -> None:
    model: Any = load(folders[family], resolution=16)
    images = pictures(2).requires_grad_()
    condition = model.encode(PROMPTS[:2])
    assert not model.with_images(condition, images).parts["source"].requires_grad
    seen = model.with_images(condition, images, grad=True)
    model.predict(model.noise(2, seeded()), torch.tensor(0.5), seen).velocity.square().sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


def test_wrong_sizes_and_numbers_are_refused(folders: dict[str, pathlib.Path]) -> None:
    for family in FAMILIES:
        with pytest.raises(InputError, match="resolution 20 is not a multiple of 8"):
            load(folders[family], resolution=20)
    for family in EDITORS:
        model: Any = load(folders[family], resolution=16)
        condition = model.encode(PROMPTS)
        with pytest.raises(InputError, match="did you mean 'circle'"):
            model.encode(["a circel"])
        with pytest.raises(InputError, match=r"20 x 16 pixels .* multiples of 8"):
            model.with_images(condition, torch.zeros(3, 3, 20, 16))
        with pytest.raises(InputError, match="2 source images do not go with 3 prompts"):
            model.with_images(condition, pictures(2))
        with pytest.raises(InputError, match=r"9 x 16 tokens .* 4 x 16"):
            model.with_latents(condition, torch.zeros(3, 9, 16))
        mixed = [model.with_images(condition[:1], pictures(1, 16, 32)), model.with_images(condition[:1], pictures(1))]
        with pytest.raises(InputError, match="cannot share a batch"):
            model.predict(model.noise(2, seeded()), torch.tensor(0.5), stack(mixed))
    klein: Any = load(folders["flux2-klein"])
    with pytest.raises(InputError, match="larger than the 1048576 of family flux2-klein"):
        klein.with_images(klein.encode(PROMPTS), torch.zeros(1, 3, 1032, 1024))
    with pytest.raises(InputError, match="takes one source image for each prompt, not 2"):
        model.with_images(condition, [pictures(3), pictures(3)])
    with pytest.raises(InputError, match="reads its instructions together with images"):
        model.predict(model.noise(3, seeded()), torch.tensor(0.5), condition, 2.0)


def test_words_pass_through_a_condition_unchanged(folders: dict[str, pathlib.Path]) -> None:
    model: Any = load(folders["qwen-image-edit"], resolution=16)
    model.check_prompts = lambda prompts: None
    prompts = ["größer, 更大", "", "a"]
    assert [_words(row) for row in encode_unique(model, prompts).parts["words"]] == prompts


# gradients and adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_through_predict_is_the_networks(folders: dict[str, pathlib.Path], family: str) -> None:
    model: Any = load(folders[family], resolution=16)
    x, t, pipe = model.noise(2, seeded()), torch.tensor([0.2, 0.9]), model.pipeline
    condition = encode_unique(model, PROMPTS[:2])
    if family in EDITORS:
        condition = model.with_images(condition, pictures(2))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    with model.count_nfe() as nfe:
        model.predict(one, t, condition).velocity.square().sum().backward()
    assert nfe.total == 2 * 3
    if family == "flux2-klein":
        embeds, txt_ids = pipe.encode_prompt(PROMPTS[:2], max_sequence_length=32)
        source = pipe._encode_vae_image(pictures(2) * 2 - 1, None)
        ids = torch.cat((pipe._prepare_latent_ids(source), pipe._prepare_image_ids([source[:1]]).repeat(2, 1, 1)), 1)
        tokens = torch.cat((two, pipe._pack_latents(source)), 1)
        output = model.network(tokens, embeds, t, ids, txt_ids).sample
    else:
        seen = {"image": drawn(pictures(2))} if family in EDITORS else {}
        embeds, mask = pipe.encode_prompt(PROMPTS[:2], **seen)
        tokens, shapes = two, [(1, 2, 2)]
        if seen:
            pixels = (pictures(2) * 2 - 1).unsqueeze(2)
            source = pipe.prepare_latents(pixels, 2, 4, 16, 16, torch.float32, model.device, seeded())[1]
            tokens, shapes = torch.cat((two, source), 1), [(1, 2, 2)] * 2
        output = model.network(tokens, embeds, mask, t, [shapes] * 2).sample
    output[:, :4].square().sum().backward()
    assert one.grad is not None and two.grad is not None
    torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_goes_to_diffusers_and_back(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, family: str
) -> None:
    model: Any = load(folders[family], resolution=16)
    base = ours(model, asked(model))
    model.adapt(LoraSpec(rank=2, alpha=4.0))
    assert torch.equal(ours(model, asked(model)), base)  # a fresh adapter is zero
    shake(model)
    expected = ours(model, asked(model))
    assert apart(expected, base) > 1e-3
    model.save(tmp_path / "lora")
    plain: Any = load(folders[family], resolution=16)
    plain.pipeline.load_lora_weights(tmp_path / "lora")
    same(theirs(plain), expected)
    back: Any = load(folders[family], resolution=16)
    load_adapter(back, tmp_path / "lora")
    same(ours(back, asked(back)), expected)
    model.save(tmp_path / "merged", merged=True)
    merged: Any = load(tmp_path / "merged", resolution=16)
    same(theirs(merged), expected)
    same(ours(merged, asked(merged)), expected)
    for off in (back, model):
        off.scale_adapter(0.0)
        assert torch.equal(ours(off, asked(off)), base)
        off.scale_adapter(1.0)
        with off.reference():
            assert torch.equal(ours(off, asked(off)), base)
    model.remove_training()
    assert torch.equal(ours(model, asked(model)), base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters_compose(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, family: str) -> None:
    sum_: Any = load(folders[family], resolution=16)
    for name, subset, share in (("a", "attention", 0.5), ("b", "qk_dual", 0.7)):
        model: Any = load(folders[family], resolution=16)
        model.adapt(LoraSpec(subset, rank=2))
        shake(model, seed=ord(name))
        model.save(tmp_path / name)
        with torch.no_grad():
            for module, layer in model._tuners().items():
                sum_.network.get_submodule(module).weight.add_(share * layer.get_delta_weight("default"))
    plain: Any = load(folders[family], resolution=16)
    for name in ("a", "b"):
        plain.pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    plain.pipeline.set_adapters(["a", "b"], [0.5, 0.7])
    same(theirs(plain), ours(sum_, asked(sum_)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_subset_learns(folders: dict[str, pathlib.Path], family: str) -> None:
    model: Any = load(folders[family], resolution=16)
    x, condition = model.noise(2, seeded()), asked(model, PROMPTS[:2])
    for subset in (*model.SUBSETS, "all"):
        if subset == "all":
            model.unfreeze(subset)
        else:
            model.adapt(LoraSpec(subset, rank=2))
        checks = preflight.gradients(model, model.predict(x, torch.tensor(0.5), condition).velocity.square().sum())
        assert all(check.passed for check in checks), (subset, checks)
        model.remove_training()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_states_convert(folders: dict[str, pathlib.Path], family: str) -> None:
    model: Any = load(folders[family], resolution=16)
    states = model.noise(2, seeded()).requires_grad_()
    images = model.decode(states, grad=True)
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    images.sum().backward()
    assert states.grad is not None and states.grad.abs().max() > 0
    assert not model.decode(states).requires_grad
    assert model.encode_images(images.detach()).shape == states.shape
