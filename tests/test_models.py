"""Families against diffusers' own pipelines, adapters and reference to the last bit, loading and its errors."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import WORDS
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.tiny import flux_pipeline, unet_pipeline
from fieldsmith.errors import InputError, NotFiniteError
from fieldsmith.models import load, load_adapter
from fieldsmith.models.core import LoraSpec, Model, check_resolution, stack
from fieldsmith.models.families import FAMILIES
from fieldsmith.models.flux import Flux
from fieldsmith.models.sd15 import SD15
from fieldsmith.models.unet import UNet
from fieldsmith.samplers import ddim_step, rollout
from tests.drawn import seeded

PROMPTS = ["a red square", "a blue circle", ""]


def tiny_flux() -> Flux:
    return Flux(flux_pipeline(WORDS), "tiny")


def tiny_unet(**options: Any) -> UNet:
    return UNet(unet_pipeline(**options), "tiny")


MAKERS: list[Callable[[], Model]] = [tiny_flux, tiny_unet]


def shake(model: Model, size: float = 0.05) -> None:
    """Move every trainable weight, as training would."""
    generator = seeded(7)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=generator))


@torch.no_grad()
def ours(model: Model, prompts: list[str], steps: int, guidance: float | None = None, seed: int = 0) -> Tensor:
    condition = model.encode(prompts)
    start = model.noise(len(prompts), seeded(seed))
    path = rollout(lambda x, t: model.predict(x, t, condition, guidance), start, model.grid(steps))
    return model.decode(path.last)


def flux_images(pipe: FluxPipeline, prompts: list[str], steps: int, seed: int = 0, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompts, height=32, width=32, num_inference_steps=steps, generator=seeded(seed), output_type="pt",
        max_sequence_length=8, **options,
    ).images  # fmt: skip


def velocity(model: Model, grad: bool = False) -> Tensor:
    """The field at fixed states; the same for the same weights."""
    with torch.set_grad_enabled(grad):
        x = model.noise(2, seeded(3))
        return model.predict(x, torch.tensor([0.3, 0.8]), model.encode([""])).velocity


# parity with diffusers


@pytest.mark.parametrize("steps", [4, 7])
def test_flux_sampler_is_the_pipelines(steps: int) -> None:
    model = tiny_flux()
    torch.testing.assert_close(
        ours(model, PROMPTS, steps), flux_images(model.pipeline, PROMPTS, steps), atol=1e-4, rtol=0
    )


def test_flux_true_guidance_is_the_pipelines() -> None:
    model = tiny_flux()
    theirs = flux_images(model.pipeline, PROMPTS, 4, true_cfg_scale=3.0, negative_prompt=[""] * 3)
    torch.testing.assert_close(ours(model, PROMPTS, 4, guidance=3.0), theirs, atol=1e-4, rtol=0)
    assert (theirs - ours(model, PROMPTS, 4)).abs().max() > 1e-3  # guidance does something here


def test_flux_embedded_guidance_is_the_pipelines() -> None:
    model = Flux(flux_pipeline(WORDS, guidance_embeds=True), "tiny")
    theirs = flux_images(model.pipeline, PROMPTS, 4, guidance_scale=3.5)
    torch.testing.assert_close(ours(model, PROMPTS, 4, guidance=3.5), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flux_static_shift_is_the_pipelines(shift: float) -> None:
    pipe = flux_pipeline(WORDS)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=shift)
    theirs = flux_images(pipe, PROMPTS, 4)
    torch.testing.assert_close(ours(Flux(pipe, "tiny"), PROMPTS, 4), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 7), ("trailing", 10)])
def test_unet_sampler_is_the_ddim_pipelines(prediction_type: str, spacing: str, steps: int) -> None:
    model = tiny_unet(train_times=100, prediction_type=prediction_type, timestep_spacing=spacing)
    pipe = DDIMPipeline(model.network, model.pipeline.scheduler)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(batch_size=2, generator=seeded(), num_inference_steps=steps, output_type="pt").images
    torch.testing.assert_close(ours(model, ["", ""], steps), theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1


def test_unet_steps_offset_is_the_ddim_pipelines() -> None:
    model = tiny_unet(train_times=100)
    pipe = DDIMPipeline(model.network, DDIMScheduler(100, clip_sample=False, steps_offset=1))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(generator=seeded(), num_inference_steps=5, output_type="pt").images
    torch.testing.assert_close(ours(UNet(pipe, "tiny"), [""], 5), theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_ddim_step_with_noise_is_the_schedulers() -> None:
    model = tiny_unet()
    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    x = model.noise(2, seeded())
    pred = model.predict(x, model.path.time(torch.tensor(400)), model.encode([""]))
    step = ddim_step(pred, model.path.time(torch.tensor(300)), eta=1.0)
    for noise, expected in ((torch.zeros_like(x), step.mean), (torch.ones_like(x), step.mean + step.deviation)):
        theirs = scheduler.step(pred.value, 400, x, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(expected, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variance_type", ["learned_range", "learned"])
def test_learned_variance_is_the_schedulers(variance_type: str) -> None:
    pipe = unet_pipeline(learned_variance=True)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
    model = UNet(pipe, "tiny")
    x = model.noise(4, seeded())
    index = torch.tensor([0, 1, 500, 999])
    pred = model.predict(x, model.path.time(index), model.encode([""]))
    raw = model.network(x, index).sample
    torch.testing.assert_close(pred.value, raw[:, :3], atol=1e-5, rtol=0)
    assert pred.log_variance is not None
    for row, at in enumerate(index.tolist()):
        theirs = pipe.scheduler._get_variance(at, predicted_variance=raw[row, 3:])
        if variance_type == "learned":  # what the scheduler takes a root of
            theirs = theirs.clamp(min=1e-20).log()
            positive = raw[row, 3:] > 1e-3
            torch.testing.assert_close(pred.log_variance[row][positive], theirs[positive], atol=2e-2, rtol=0)
        else:  # the scheduler's own float32 1 - a / b is good to about 1e-3 where beta is small
            torch.testing.assert_close(pred.log_variance[row], theirs, atol=3e-3, rtol=0)


@torch.no_grad()
def test_variance_of_the_wrong_type_is_refused() -> None:
    pipe = unet_pipeline(learned_variance=True)
    pipe.scheduler = DDPMScheduler(variance_type="fixed_small")
    with pytest.raises(InputError, match="learned_range"):
        UNet(pipe, "tiny")


# classes and conditions


@torch.no_grad()
def test_classes_guidance_and_the_null_class(unet_folder: pathlib.Path) -> None:
    model = load(unet_folder)
    assert isinstance(model, UNet) and model.classes == ("cat", "dog", "owl")
    assert model.encode(["dog", "2", ""]).parts["label"].tolist() == [1, 2, 3]
    x, t = model.noise(2, seeded()), torch.tensor([0.5, 0.9])
    condition = model.encode(["cat", "owl"])
    guided = model.predict(x, t, condition, guidance=2.0).value
    plain, null = model.predict(x, t, condition).value, model.predict(x, t, model.encode([""])).value
    torch.testing.assert_close(guided, null + 2 * (plain - null), atol=1e-5, rtol=1e-5)
    assert (plain - null).abs().max() > 1e-4
    for wrong in ("dgo", "3", "-1"):
        with pytest.raises(InputError, match=f"'{wrong}'"):
            model.encode([wrong])


@torch.no_grad()
def test_guidance_without_a_null_class_is_refused() -> None:
    model = tiny_unet(class_rows=2)
    assert isinstance(model, UNet) and model.encode(["1"]).parts["label"].tolist() == [1]
    for wish in (lambda: model.encode([""]), lambda: model.predict(model.noise(1, seeded()), torch.tensor(0.5),
                                                                   model.encode(["1"]), 2.0)):  # fmt: skip
        with pytest.raises(InputError, match="null class"):
            wish()
    with pytest.raises(InputError, match="unconditional"):
        tiny_unet().encode(["cat"])
    with pytest.raises(InputError, match="names 3 classes"):
        UNet(unet_pipeline(class_rows=2), "tiny", classes=("a", "b", "c"))


@torch.no_grad()
def test_one_condition_row_serves_a_batch() -> None:
    model = tiny_flux()
    x, t = model.noise(3, seeded()), torch.tensor(0.5)
    one = model.encode(["a red circle"])
    many = stack([one, one, one])
    assert torch.equal(model.predict(x, t, one).value, model.predict(x, t, many).value)
    with pytest.raises(ValueError, match="encode 1 or 3"):
        model.predict(x, t, many[:2])


def test_words_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'circle'"):
        tiny_flux().encode(["a red circel"])


@pytest.mark.parametrize("make", MAKERS)
def test_images_and_states_convert(make: Callable[[], Model]) -> None:
    model = make()
    states = model.noise(2, seeded()).requires_grad_()
    images = model.decode(states, grad=True)
    assert images.requires_grad and not model.decode(states).requires_grad
    assert images.min() >= 0 and images.max() <= 1
    assert model.encode_images(images.detach()).shape == states.shape


# gradients, adapters and the reference


def test_gradient_through_predict_is_the_networks() -> None:
    model = tiny_flux()
    x, t, condition = model.noise(2, seeded()), torch.tensor([0.2, 0.9]), model.encode(PROMPTS[:2])
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    with model.count_nfe() as nfe:
        model.predict(one, t, condition).velocity.square().sum().backward()
    output = model.network(
        hidden_states=two, timestep=t, pooled_projections=condition.parts["pooled"], img_ids=model.image_ids,
        encoder_hidden_states=condition.parts["embeds"], txt_ids=torch.zeros(8, 3),
    ).sample  # fmt: skip
    output.square().sum().backward()
    assert one.grad is not None and two.grad is not None
    torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-6)
    assert nfe.total == 2 * 3


def test_numbers_that_are_not_finite_are_named_with_their_prompts_and_times() -> None:
    model = tiny_flux()
    condition, x, t = model.encode(PROMPTS), model.noise(3, seeded()), torch.tensor([0.25, 0.5, 0.75])
    model.predict(x, t, condition, 2.0)
    assert model.asked() == f", at t=0.25, 0.5, 0.75 under {', '.join(map(repr, PROMPTS))}"
    worse = x.clone()
    worse[1] = torch.inf
    with pytest.raises(
        NotFiniteError, match=r"^the network's state x_t holds inf in 1 of 3 rows, at t=0\.5 under 'a blue c"
    ):
        model.predict(worse, t, condition)
    torn = condition[[2, 0]]
    torn.parts["embeds"][1, 0, 0] = torch.nan
    with pytest.raises(
        NotFiniteError, match=r"part 'embeds' holds nan in 1 of 2 rows, at t=0\.1 under 'a red square'$"
    ):
        model.predict(x[:2], torch.tensor(0.1), torn)
    with pytest.raises(NotFiniteError, match=r"^the latent to decode holds nan in 3 of 3 rows, at t=0\.1"):
        model.decode(x * torch.nan)
    with pytest.raises(NotFiniteError, match=r"^the image to encode holds -inf in 2 of 2 rows$"):
        model.encode_images(torch.full((2, 3, 32, 32), -torch.inf))
    shown = tiny_unet(class_rows=4)  # whose condition is rows of an embedding
    shown.predict(shown.noise(2, seeded()), torch.tensor([0.5, 0.25]), shown.encode(["1", "2"]), None)
    assert shown.asked() == ", at t=0.5, 0.25 under '1', '2'"
    next(shown.network.parameters()).data.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match=r"network's output holds nan in 1 of 1 rows, at t=0\.5 under '1'"):
        shown.predict(shown.noise(1, seeded()), torch.tensor(0.5), shown.encode(["1"]))


def test_counters_nest_and_what_is_uncounted_leaves_them_alone() -> None:
    model = tiny_flux()
    x, t, condition = model.noise(2, seeded()), torch.tensor([0.2, 0.9]), model.encode(PROMPTS[:2])
    with torch.no_grad(), model.count_nfe() as outer:
        with model.count_nfe() as inner:
            model.predict(x, t, condition)
        with model.uncounted(), model.count_nfe() as own:
            model.predict(x, t, condition, guidance=2.0)
        model.predict(x, t, condition)
    model.predict(x, t, condition)
    assert (outer.total, inner.total, own.total) == (4, 2, 4)


@pytest.mark.parametrize("make", MAKERS)
def test_adapter_off_is_the_base_to_the_last_bit(make: Callable[[], Model]) -> None:
    model = make()
    base, names = velocity(model), dict(model.network.named_parameters())
    model.adapt(LoraSpec(rank=4, alpha=8.0))
    assert torch.equal(velocity(model), base)  # a fresh adapter is zero
    shake(model)
    trained, before = velocity(model), model.trainable()
    assert (trained - base).abs().max() > 1e-3
    model.scale_adapter(0.0)
    assert torch.equal(velocity(model), base)
    model.scale_adapter(1.0)
    with pytest.raises(KeyError), model.reference():
        assert torch.equal(velocity(model), base)
        with model.reference():
            assert torch.equal(velocity(model), base)
        assert torch.equal(velocity(model), base)  # the inner exit leaves the outer one in place
        raise KeyError
    assert torch.equal(velocity(model), trained)
    assert model.trainable().keys() == before.keys()
    model.remove_training()
    after = dict(model.network.named_parameters())
    assert torch.equal(velocity(model), base) and not model.trainable()
    assert after.keys() == names.keys() and all(after[k] is names[k] for k in names)
    model.adapt(LoraSpec(rank=2))
    assert torch.equal(velocity(model), base)


@pytest.mark.parametrize("subset", ["attention", "all"])
@pytest.mark.parametrize("make", MAKERS)
def test_full_weights_off_is_the_base_to_the_last_bit(make: Callable[[], Model], subset: str) -> None:
    model = make()
    base, originals = velocity(model), {k: v.clone() for k, v in model.network.state_dict().items()}
    model.unfreeze(subset)
    assert (model.trainable().keys() == originals.keys()) == (subset == "all")
    shake(model)
    trained, before = velocity(model), model.trainable()
    assert (trained - base).abs().max() > 1e-3
    with pytest.raises(KeyError), model.reference():
        assert torch.equal(velocity(model), base)
        raise KeyError
    assert torch.equal(velocity(model), trained)
    assert all(p is before[name] for name, p in model.trainable().items())
    model.remove_training()
    assert torch.equal(velocity(model), base) and not model.trainable()
    assert all(torch.equal(v, originals[k]) for k, v in model.network.state_dict().items())


@pytest.mark.parametrize("how", ["adapter", "weights"])
def test_backward_crosses_the_reference(how: str) -> None:
    model = tiny_flux()
    if how == "adapter":
        model.adapt(LoraSpec(rank=2))
    else:
        model.unfreeze("attention")
    shake(model)

    def gradients(order: str) -> list[Tensor]:
        for p in model.trainable().values():
            p.grad = None
        trained = model.trainable().values()
        if order == "student first":
            student = velocity(model, grad=True)
            with model.reference():
                teacher = velocity(model)
        else:
            with model.reference():
                teacher = velocity(model, grad=order != "teacher first")
            student = velocity(model, grad=True)
        assert not teacher.requires_grad
        loss = (student - teacher).square().sum()
        if order == "backward inside":
            with model.reference():
                loss.backward()
        else:
            loss.backward()
        return [p.grad.clone() for p in trained if p.grad is not None]

    first = gradients("student first")
    assert len(first) == len(model.trainable()) and all(g.abs().max() > 0 for g in first)
    for order in ("teacher first", "teacher with grad", "backward inside"):
        for one, other in zip(first, gradients(order), strict=True):
            torch.testing.assert_close(one, other)


def test_gradient_through_the_reference_survives_it() -> None:
    model = tiny_flux()
    x, t, condition = model.noise(1, seeded()), torch.tensor(0.5), model.encode([""])

    def pull() -> Tensor:
        at = x.clone().requires_grad_()
        with model.reference():
            value = model.predict(at, t, condition).velocity.square().sum()
        return torch.autograd.grad(value, at)[0]  # outside, where the trained weights are back

    expected = pull()
    model.unfreeze("attention")
    shake(model)
    assert torch.equal(pull(), expected)


def test_qk_dual_trains_the_dual_blocks_only() -> None:
    model = tiny_flux()
    model.adapt(LoraSpec("qk_dual", rank=2))
    layers = {name.split(".lora_")[0] for name in model.trainable()}
    assert layers == {
        f"transformer_blocks.{block}.attn.{layer}"
        for block in (0, 1)
        for layer in ("to_q", "to_k", "add_q_proj", "add_k_proj")
    }


def test_every_subset_names_layers() -> None:
    for make in MAKERS:
        for subset in make().SUBSETS:
            model = make()
            model.adapt(LoraSpec(subset, rank=1))
            assert model.trainable()
    with pytest.raises(InputError, match="known: qk_dual"):
        tiny_flux().adapt(LoraSpec("everything"))
    with pytest.raises(ValueError, match="being trained already"):
        model.unfreeze("attention")


def test_adapters_are_seeded_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        model = tiny_flux()
        model.adapt(LoraSpec(rank=2, seed=seed))
        assert torch.equal(torch.rand(1), expected)
        states.append(model.adapter_state())
    key = next(k for k in states[0] if "lora_A" in k)
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


def test_dropout_acts_only_where_switched_on() -> None:
    model = tiny_flux()
    model.adapt(LoraSpec(rank=2, dropout=0.5))
    shake(model)
    still = velocity(model)
    model.dropout(True)
    assert not torch.equal(velocity(model), still)
    model.dropout(False)
    assert torch.equal(velocity(model), still)


# saving and loading


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_saved_adapter_gives_diffusers_our_image(
    flux_folder: pathlib.Path, tmp_path: pathlib.Path, scale: float
) -> None:
    model = load(flux_folder)
    model.adapt(LoraSpec(rank=4, alpha=10.0))
    shake(model)
    model.scale_adapter(scale)
    expected = ours(model, PROMPTS, 4)
    model.save(tmp_path)
    pipe = FluxPipeline.from_pretrained(flux_folder)
    before = flux_images(pipe, PROMPTS, 4)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(flux_images(pipe, PROMPTS, 4), expected, atol=1e-4, rtol=0)
    assert (before - expected).abs().max() > 1e-3

    again = load(flux_folder)
    base = ours(again, PROMPTS, 4)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(ours(again, PROMPTS, 4), expected, atol=1e-5, rtol=0)
    with again.reference():
        assert torch.equal(ours(again, PROMPTS, 4), base)
    assert again.trainable().keys() == model.trainable().keys()
    again.save(tmp_path / "again")
    third = load(flux_folder)
    load_adapter(third, tmp_path / "again" / "pytorch_lora_weights.safetensors")
    assert torch.equal(ours(third, PROMPTS, 4), ours(again, PROMPTS, 4))
    again.scale_adapter(0.0)
    assert torch.equal(ours(again, PROMPTS, 4), base)
    again.remove_training()
    assert torch.equal(ours(again, PROMPTS, 4), base) and not again.trainable()


@pytest.mark.parametrize("how", ["adapter", "weights"])
def test_a_saved_pipeline_gives_diffusers_our_image(tmp_path: pathlib.Path, how: str) -> None:
    model = tiny_flux()
    model.adapt(LoraSpec(rank=4, alpha=10.0)) if how == "adapter" else model.unfreeze("attention")
    shake(model)
    expected, trained = ours(model, PROMPTS, 4), model.trainable()
    model.save(tmp_path, merged=True)
    modes = {file.stat().st_mode for file in tmp_path.glob("*/*.*")}  # JSON, which diffusers opens, and weights
    assert len(modes) == 1
    theirs = flux_images(FluxPipeline.from_pretrained(tmp_path), PROMPTS, 4)
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)
    assert torch.equal(ours(model, PROMPTS, 4), expected)  # the live model is as it was
    assert all(p is trained[name] for name, p in model.trainable().items())
    torch.testing.assert_close(ours(load(tmp_path), PROMPTS, 4), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["adapter", "weights"])
def test_a_saved_unet_is_whole(unet_folder: pathlib.Path, tmp_path: pathlib.Path, how: str) -> None:
    model = load(unet_folder)
    base = velocity(model)
    model.adapt(LoraSpec(rank=4, alpha=8.0)) if how == "adapter" else model.unfreeze("all")
    shake(model)
    trained = velocity(model)
    model.save(tmp_path)
    again = load(tmp_path)
    torch.testing.assert_close(velocity(again), trained, atol=1e-4, rtol=1e-4)
    assert isinstance(again, UNet) and again.classes == ("cat", "dog", "owl")
    assert torch.equal(velocity(model), trained)
    model.remove_training()
    assert torch.equal(velocity(model), base)


def test_foreign_adapters_are_refused(
    flux_folder: pathlib.Path, tmp_path: pathlib.Path, unet_folder: pathlib.Path
) -> None:
    model = load(flux_folder)
    base = velocity(model)
    wrong = {
        "transformer.blocks.0.to_q": (128, 128),
        "transformer.transformer_blocks.0.attn.to_q": (64, 64),
        "text_encoder.text_model.layer": (64, 64),
    }
    for layer, (tall, wide) in wrong.items():
        save_file({f"{layer}.lora_A.weight": torch.zeros(2, wide), f"{layer}.lora_B.weight": torch.zeros(tall, 2)},
                  tmp_path / "pytorch_lora_weights.safetensors")  # fmt: skip
        with pytest.raises(InputError, match=r"does not fit|trains text_encoder too, of which nothing trains"):
            load_adapter(model, tmp_path)
    with pytest.raises(InputError, match="nowhere' does not exist"):
        load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(InputError, match="saved whole"):
        load_adapter(load(unet_folder), tmp_path)
    assert torch.equal(velocity(model), base) and model.spec is None


def test_half_precision_weights_step_in_float32(flux_folder: pathlib.Path) -> None:
    model = load(flux_folder, dtype=torch.bfloat16)
    pred = model.predict(model.noise(1, seeded()), torch.tensor(0.5), model.encode([""]))
    assert model.network.dtype == torch.bfloat16 and pred.velocity.dtype == torch.float32
    images = ours(model, PROMPTS, 2)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, ours(load(flux_folder), PROMPTS, 2), atol=0.1, rtol=0)


def test_wrong_folders_are_refused_with_the_mend(
    flux_folder: pathlib.Path, unet_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, change: Callable[[pathlib.Path], Any], source: pathlib.Path = unet_folder) -> str:
        shutil.copytree(source, tmp_path / name)
        change(tmp_path / name)
        return str(tmp_path / name)

    def renamed(folder: pathlib.Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipeline"}))

    def pickled(folder: pathlib.Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()

    def cut(folder: pathlib.Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])

    cases = {
        str(tmp_path / "nowhere"): "does not exist",
        str(flux_folder / "model_index.json"): "is a file",
        str(flux_folder / "vae"): "it has no model_index.json",
        "zoo:nothing": "not in the zoo; known",
        broken("kind", renamed): "supported: FluxPipeline, .*DDPMPipeline, DDIMPipeline",
        broken("pickle", pickled): "safe_serialization=True",
        broken("cut", cut): "no safetensors file, or was cut short",
        broken("half", lambda f: shutil.rmtree(f / "vae"), flux_folder): "component 'vae' is missing",
        broken("empty", lambda f: next((f / "unet").glob("*.safetensors")).unlink()): "'unet' has no weights",
        broken("words", lambda f: (f / "classes.json").write_text("{")): "not a list of class names",
        broken("text", lambda f: (f / "model_index.json").write_text("no")): "is not JSON",
    }
    for name, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            load(name)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr("fieldsmith.models.offline_copy", lambda name: None)  # as where the hub answers
    monkeypatch.setattr(DiffusionPipeline, "load_config", offline)
    with pytest.raises(InputError, match=r"could be fetched from the hub.*couldn't connect") as refused:
        load("nobody/nothing")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("how", ["no network", "HF_HUB_OFFLINE is set"])
def test_without_the_hub_its_absence_is_said_at_once_and_what_was_fetched_is_read(
    flux_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", how != "no network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(InputError, match=f"'some/model' is not a folder here and was not fetched before, and {how}"):
        load("some/model")
    assert time.monotonic() - began < 5
    kept = tmp_path / "models--some--model"
    shutil.copytree(flux_folder, kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    assert load("some/model").name == "some/model"


def test_a_gated_repository_is_named_with_its_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: Any, **__: Any) -> None:
        try:
            raise GatedRepoError.__new__(GatedRepoError)  # whose own arguments are an answer over HTTP
        except GatedRepoError:
            raise OSError("is not a valid model identifier")  # as diffusers hides it  # noqa: B904

    monkeypatch.setattr("fieldsmith.models.offline_copy", lambda name: None)
    monkeypatch.setattr(DiffusionPipeline, "load_config", gated)
    with pytest.raises(
        InputError, match=r"'some/model' is gated: accept its licence at .*some/model, then `hf auth lo"
    ):
        load("some/model")


def test_a_zoo_name_that_is_nearly_one_is_told() -> None:
    with pytest.raises(InputError, match="'zoo:shapes-fluks' is not in the zoo; did you mean 'zoo:shapes-flux'"):
        load("zoo:shapes-fluks")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("black-forest-labs/FLUX1-dev", "black-forest-labs/FLUX.1-dev"),
        ("blackforestlabs/flux.1-kontext-dev", "black-forest-labs/FLUX.1-Kontext-dev"),
        ("stable-difusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("shapes-flux", "zoo:shapes-flux"),
        ("Qwen/Qwen-Image-Edit-2059", "Qwen/Qwen-Image-Edit-2509"),
        ("black-forest-labs/FLUX.1-dev", None),
        ("some/model", None),
    ],
)
def test_a_name_that_is_nearly_a_published_one_is_told(
    name: str, meant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"does not exist|HF_HUB_OFFLINE is set") as refused:
        load(name)
    asked = re.findall("did you mean '(.*)'", str(refused.value))
    assert asked == ([meant] if meant else [])


def test_resolution_is_checked(flux_folder: pathlib.Path, unet_folder: pathlib.Path) -> None:
    assert load(flux_folder, resolution=16).noise(1, seeded()).shape[1] == 4
    for folder in (flux_folder, unet_folder):
        with pytest.raises(InputError, match="resolution 17 is not a multiple"):
            load(folder, resolution=17)


def test_loading_is_quiet(flux_folder: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(flux_folder)
    out, err = capfd.readouterr()
    assert not out and not err


# what a folder holds


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}], ids=["whole", "sharded"])
def test_a_folder_of_one_variant_is_read(tmp_path: pathlib.Path, shards: dict[str, Any]) -> None:
    pipeline = tiny_flux().pipeline
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16", **shards)
    model = load(tmp_path)
    weight = model.network.x_embedder.weight
    assert weight.dtype == torch.float32 and torch.equal(weight.half(), pipeline.transformer.x_embedder.weight)


def test_full_weights_come_before_a_variant(flux_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(flux_folder, folder)
    for file in list(folder.glob("*/*.safetensors")):  # a variant of zeros beside every component's own
        zeros = {key: torch.zeros_like(tensor) for key, tensor in load_file(file).items()}
        save_file(zeros, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
    assert torch.equal(load(folder).network.x_embedder.weight, load(flux_folder).network.x_embedder.weight)
    (file,) = (folder / "vae").glob("*model.safetensors")
    file.unlink()  # now the autoencoder has its variant alone
    assert not load(folder).pipeline.vae.decoder.conv_in.weight.any()
    (other,) = (folder / "text_encoder").glob("*model.safetensors")
    other.rename(other.with_suffix(".bf16.safetensors"))
    (folder / "text_encoder" / "model.fp16.safetensors").unlink()
    with pytest.raises(InputError, match=r"no variant of its weights that is whole \(.*text_encoder: bf16"):
        load(folder)


def test_another_resolution_than_the_loaded_one_is_refused() -> None:
    for model, own in ((tiny_flux(), 32), (tiny_unet(), 16)):
        check_resolution(model, None)
        check_resolution(model, own)
        with pytest.raises(InputError, match=f"resolution=64: tiny was loaded at {own} pixels; leave it out"):
            check_resolution(model, 64)


def test_the_subsets_that_train_by_default_are_the_familys_own() -> None:
    for family in FAMILIES:
        kind = family.model_class()
        assert {kind.DEFAULT_SUBSET, kind.ERASE_SUBSET} <= kind.SUBSETS.keys()
    assert SD15.ERASE_SUBSET == "qk_cross" and Flux.ERASE_SUBSET == "qk_dual"


def test_importing_families_prints_nothing() -> None:
    names = "fieldsmith.models.flux, fieldsmith.models.qwen_image_edit"
    done = subprocess.run([sys.executable, "-c", f"import {names}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
