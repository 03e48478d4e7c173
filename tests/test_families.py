"""Families that draw from words against diffusers' own pipelines: images, adapters, gradients, refusals."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from conftest import WORDS
from parity import (
    PROMPTS,
    Tiny,
    apart,
    check_adapter,
    check_gradient,
    check_parity,
    check_two_adapters,
    decoded,
    ours,
    plain,
    same,
    seeded,
    theirs,
    trained,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.import_utils import is_torchvision_available

from experiments.tiny import flux_pipeline, unet_pipeline
from experiments.tiny_edit import flux2_dev_pipeline, z_image_pipeline
from experiments.tiny_text import chroma_pipeline, sd3_pipeline, sd15_pipeline, sdxl_pipeline
from fieldsmith.errors import InputError
from fieldsmith.models import load, load_adapter
from fieldsmith.models.core import Condition, LoraSpec
from fieldsmith.models.sd3 import SD3
from fieldsmith.models.sd15 import SD15
from fieldsmith.models.unet import UNet
from fieldsmith.samplers import ancestral


def flux_raw(model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    output: Tensor = model.network(
        hidden_states=x, timestep=t, pooled_projections=condition.parts["pooled"], img_ids=model.image_ids,
        encoder_hidden_states=condition.parts["embeds"], txt_ids=torch.zeros(8, 3),
    ).sample  # fmt: skip
    return output


def chroma_raw(model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    seen = torch.ones(len(x), model.tokens)
    output: Tensor = model.network(
        hidden_states=x, timestep=t, img_ids=model.image_ids, txt_ids=torch.zeros(8, 3),
        encoder_hidden_states=condition.parts["embeds"],
        attention_mask=torch.cat((condition.parts["mask"], seen), 1),
    ).sample  # fmt: skip
    return output


def flux2_dev_raw(model: Any, x: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
    embeds = condition.parts["embeds"]
    output: Tensor = model.network(
        hidden_states=x, timestep=t, guidance=torch.full((len(x),), guidance), encoder_hidden_states=embeds,
        txt_ids=model.pipeline._prepare_text_ids(embeds), img_ids=model.image_ids,
    ).sample  # fmt: skip
    return output


def z_image_raw(model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    words = [row[mask] for row, mask in zip(condition.parts["embeds"], condition.parts["mask"], strict=True)]
    output = model.network([row[:, None] for row in x], (1000 - 1000 * t) / 1000, words).sample
    return -torch.stack(output)[:, :, 0]


def sd15_raw(model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    index = (1000 * t - 1).round().long()
    output: Tensor = model.network(x, index, encoder_hidden_states=condition.parts["embeds"]).sample
    return output


def sdxl_raw(model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    index, side = (1000 * t - 1).round().long(), model.resolution
    told = {
        "text_embeds": condition.parts["pooled"],
        "time_ids": torch.tensor([[side, side, 0.0, 0.0, side, side]] * len(x)),
    }
    embeds = condition.parts["embeds"]
    output: Tensor = model.network(x, index, encoder_hidden_states=embeds, added_cond_kwargs=told).sample
    return output


def sd3_raw(model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    output: Tensor = model.network(
        hidden_states=x, timestep=1000 * t, pooled_projections=condition.parts["pooled"],
        encoder_hidden_states=condition.parts["embeds"],
    ).sample  # fmt: skip
    return output


FAMILIES = {
    "flux": Tiny(
        lambda: flux_pipeline(WORDS), "flux", (32, 16),
        lambda w, negative: {"max_sequence_length": 8}
        | ({"true_cfg_scale": w, "negative_prompt": negative} if w else {}),
        flux_raw, 20,
    ),
    "chroma": Tiny(
        lambda: chroma_pipeline(WORDS), "chroma", (32, 16),
        lambda w, negative: {"guidance_scale": w or 1.0, "negative_prompt": negative, "max_sequence_length": 8},
        chroma_raw, 20,
    ),
    "flux2-dev": Tiny(
        lambda: flux2_dev_pipeline(WORDS), "flux2-dev", (32, 16),
        lambda w, negative: {"guidance_scale": w or 1.0, "max_sequence_length": 64}, flux2_dev_raw, 20,
    ),
    "z-image": Tiny(
        lambda: z_image_pipeline(WORDS), "z-image", (16, 24),
        # whose scale 0 is what is 1 elsewhere
        lambda w, negative: {"guidance_scale": (w or 1.0) - 1, "negative_prompt": negative, "max_sequence_length": 48},
        z_image_raw, 18,
    ),
    "sd15": Tiny(
        lambda: sd15_pipeline(WORDS), "sd15", (16, 24),
        lambda w, negative: {"guidance_scale": w or 1.0, "negative_prompt": negative}, sd15_raw, 17,
    ),
    "sdxl": Tiny(
        lambda: sdxl_pipeline(WORDS), "sdxl", (16, 24),
        lambda w, negative: {"guidance_scale": w or 1.0, "negative_prompt": negative if any(negative) else None},
        sdxl_raw, 17,
    ),
    "sd3": Tiny(
        lambda: sd3_pipeline(WORDS), "sd3", (16, 24, 64),
        lambda w, negative: {"guidance_scale": w or 1.0, "negative_prompt": negative, "max_sequence_length": 8},
        sd3_raw, 18,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Each family's tiny pipeline, saved. Read only."""
    made = {name: tmp_path_factory.mktemp("families") / name for name in FAMILIES}
    for name, folder in made.items():
        FAMILIES[name].make().save_pretrained(folder)
    return made


every = pytest.mark.parametrize("name", FAMILIES)


@pytest.mark.parametrize("guidance", [None, 4.0])
@pytest.mark.parametrize(("name", "side"), [(name, side) for name, tiny in FAMILIES.items() for side in tiny.sides])
def test_images_are_the_pipelines(
    folders: dict[str, pathlib.Path], name: str, side: int, guidance: float | None
) -> None:
    check_parity(FAMILIES[name], folders[name], side, guidance)


@every
def test_adapters_travel(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, name: str) -> None:
    check_adapter(FAMILIES[name], folders[name], tmp_path)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@every
def test_two_adapters_compose(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, name: str) -> None:
    check_two_adapters(FAMILIES[name], folders[name], tmp_path)


@pytest.mark.parametrize("guidance", [None, 4.0])
@every
def test_gradients_are_the_networks(folders: dict[str, pathlib.Path], name: str, guidance: float | None) -> None:
    check_gradient(FAMILIES[name], folders[name], guidance)


@every
def test_wrong_sizes_are_refused(folders: dict[str, pathlib.Path], name: str) -> None:
    wrong = FAMILIES[name].wrong_side
    with pytest.raises(InputError, match=f"resolution {wrong} is not a multiple"):
        load(folders[name], resolution=wrong)


@every
def test_every_subset_trains(folders: dict[str, pathlib.Path], name: str) -> None:
    for subset in load(folders[name]).SUBSETS:
        model: Any = load(folders[name])
        model.adapt(LoraSpec(subset, rank=1))
        pred = model.predict(model.noise(1, seeded()), model.grid(4)[1], model.encode([PROMPTS[0]])).value
        pred.square().sum().backward()
        assert all(p.grad.abs().max() > 0 for key, p in model.trainable().items() if "lora_B" in key)


@every
def test_full_weights_all_have_a_gradient(folders: dict[str, pathlib.Path], name: str) -> None:
    model: Any = load(folders[name])
    model.unfreeze("all")
    pred = model.predict(model.noise(1, seeded()), model.grid(4)[1], model.encode([PROMPTS[0]])).value
    pred.square().sum().backward()
    assert not [key for key, p in model.trainable().items() if p.grad is None or not p.grad.any()]


@every
def test_states_and_images_convert(folders: dict[str, pathlib.Path], name: str) -> None:
    model: Any = load(folders[name])
    states = model.noise(2, seeded()).requires_grad_()
    images = model.decode(states, grad=True)
    assert images.requires_grad and not model.decode(states).requires_grad
    assert model.encode_images(images.detach()).shape == states.shape == (2, *model.latent_shape)
    if name not in ("flux", "chroma", "flux2-dev"):  # whose states are packed
        vae = model.pipeline.vae
        mean = vae.encode(images.detach() * 2 - 1).latent_dist.mean - (vae.config.shift_factor or 0.0)
        torch.testing.assert_close(model.encode_images(images.detach()), mean * vae.config.scaling_factor)


@every
def test_half_precision_weights_step_in_float32(folders: dict[str, pathlib.Path], name: str) -> None:
    model = load(folders[name], dtype=torch.bfloat16)
    images = ours(model, PROMPTS, 2)
    assert model.network.dtype == torch.bfloat16 and images.dtype == torch.float32
    torch.testing.assert_close(images, ours(load(folders[name]), PROMPTS, 2), atol=0.2, rtol=0)


# LoRA files of other families


@pytest.mark.parametrize(
    ("name", "key", "family"),
    [
        ("flux", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "sd15 or sdxl"),
        ("flux", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "sd15 or sdxl"),
        ("flux", "transformer.transformer_blocks.0.img_mlp.net.2", "qwen-image"),
        ("flux", "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "flux2-klein or flux2-dev"),
        ("flux", "transformer.layers.0.attention.to_q", "z-image"),
        ("sd3", "lora_unet_context_refiner_0_attention_qkv", "z-image"),
        ("flux", "diffusion_model.distilled_guidance_layer.in_proj", "chroma"),
        ("chroma", "lora_unet_single_blocks_0_modulation_lin", "flux"),
        ("z-image", "transformer.single_transformer_blocks.0.proj_mlp", "flux or chroma"),
        ("flux", "transformer.transformer_blocks.0.attn2.to_q", "sd3"),
        ("sd15", "transformer.single_transformer_blocks.0.attn.to_q", "flux or chroma"),
        (
            "sd15",
            "transformer.transformer_blocks.0.attn.add_q_proj",
            "flux, chroma, flux2-klein, flux2-dev, sd3 or qwen-image",
        ),
        ("sd3", "transformer.single_transformer_blocks.0.attn.to_q", "flux or chroma"),
        ("sd3", "lora_unet_double_blocks_0_img_attn_qkv", "flux, chroma, flux2-klein or flux2-dev"),
        ("sd15", "diffusion_model.double_blocks.0.img_mlp.0", "flux, chroma, flux2-klein or flux2-dev"),
    ],
)
def test_a_lora_of_another_family_is_named(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, name: str, key: str, family: str
) -> None:
    halves = ("lora_down", "lora_up") if key.startswith("lora_unet") else ("lora_A", "lora_B")
    state = {f"{key}.{halves[0]}.weight": torch.zeros(2, 64), f"{key}.{halves[1]}.weight": torch.zeros(64, 2)}
    save_file(state, tmp_path / "other.safetensors")
    model = load(folders[name])
    with pytest.raises(InputError, match=f"made for family {family}, not for {name} ") as refused:
        load_adapter(model, tmp_path)
    assert "\n" not in str(refused.value) and model.spec is None


def test_an_adapter_of_ours_is_refused_by_the_other_families(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    for name, other in zip(FAMILIES, [*FAMILIES][1:] + [*FAMILIES][:1], strict=True):
        trained(FAMILIES[name], folders[name]).save(tmp_path / name)
        with pytest.raises(InputError, match=f"made for family .*{name}.*, not for {other}|does not fit"):
            load_adapter(load(folders[other]), tmp_path / name)


# FLUX.2 dev


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_devs_sources_are_the_pipelines(folders: dict[str, pathlib.Path], guidance: float | None) -> None:
    model: Any = load(folders["flux2-dev"])
    source = torch.rand(1, 3, 64, 72, generator=seeded(5)).mul(255).round()
    picture = PIL.Image.fromarray(source[0].permute(1, 2, 0).byte().numpy())
    condition = model.with_images(model.encode(PROMPTS[:2]), source / 255)
    images = decoded(model, condition, guidance)
    tiny = FAMILIES["flux2-dev"]
    same(images, theirs(tiny, model.pipeline, PROMPTS[:2], 32, guidance, image=picture))
    assert apart(images, ours(model, PROMPTS[:2], guidance=guidance)) > 1e-3


@pytest.mark.skipif(is_torchvision_available(), reason="transformers has the processor itself")
def test_without_torchvision_the_tokenizer_stands_for_its_processor(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    shutil.copytree(folders["flux2-dev"], tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]  # as FLUX.2-dev is published
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model: Any = load(tmp_path)
    same(ours(model, PROMPTS), ours(load(folders["flux2-dev"]), PROMPTS))
    model.save(tmp_path / "again", merged=True)
    same(ours(load(tmp_path / "again"), PROMPTS), ours(model, PROMPTS))


def test_devs_prompts_have_the_room_that_its_system_message_leaves(folders: dict[str, pathlib.Path]) -> None:
    model: Any = load(folders["flux2-dev"])
    tokenizer, room = model._readers()["tokenizer"]
    after = len(tokenizer("[/INST]").input_ids)  # marks behind a prompt, which are cut before it is
    lengths = (room - 1, room, room + after, room + after + 1)
    asked = [model._encode([" ".join(["red"] * n)]).parts["embeds"] for n in lengths]
    assert 0 < room < 64 and apart(asked[0], asked[1]) > 1e-3  # one word more is read
    assert torch.equal(asked[2], asked[3])  # and beyond the room none


# Stable Diffusion 1.5


def with_scheduler(tmp_path: pathlib.Path, scheduler: Any) -> SD15:
    """The tiny pipeline with another scheduler, saved and loaded."""
    pipe = sd15_pipeline(WORDS)
    pipe.scheduler = scheduler
    pipe.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert isinstance(model, SD15)
    return model


def test_schedulers_of_another_parametrisation_are_refused(tmp_path: pathlib.Path) -> None:
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for number, scheduler in enumerate(
        (flow, diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EDMEulerScheduler())
    ):
        with pytest.raises(InputError, match=f"is a {type(scheduler).__name__} for .* put back a DDIMScheduler"):
            with_scheduler(tmp_path / str(number), scheduler)
    for name in ("flux", "sd3"):
        pipe = FAMILIES[name].make()
        pipe.scheduler = diffusers.DDIMScheduler()
        pipe.save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match="'epsilon' predictions, but its network predicts a flow's velocity"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_other_solvers_of_a_flow_are_read_as_euler(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    pipe = FAMILIES[name].make()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.save_pretrained(tmp_path / "own")
    grid = load(tmp_path / "own").grid(4)
    for other in (
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ):
        pipe.scheduler = other
        pipe.save_pretrained(tmp_path / "other")
        assert torch.equal(load(tmp_path / "other").grid(4), grid)
        assert f"ships a {type(other).__name__}; fieldsmith takes Euler's steps" in caplog.messages[-1]


SHIPPED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize("kind", ["PNDM", "DDIM", "DPMSolverMultistep", "EulerDiscrete"])
def test_other_schedulers_are_read_as_ddim(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    steps = 7
    ends = {"set_alpha_to_one": False} if kind in ("PNDM", "DDIM") else {"timestep_spacing": "linspace"}
    saved = getattr(diffusers, f"{kind}Scheduler")(**SHIPPED, **ends)
    model = with_scheduler(tmp_path, saved)
    said = [] if kind == "DDIM" else [f"ships a {kind}Scheduler; fieldsmith takes DDIM's steps on its betas instead."]
    assert [line.partition(" ")[2] for line in caplog.messages] == said
    assert model.grid(steps)[-1] == (0.001 if "set_alpha_to_one" in ends else 0.0)
    images = ours(model, PROMPTS, steps)
    model.save(tmp_path / "again", merged=True)
    pipe = plain(tmp_path / "again")
    assert type(pipe.scheduler) is type(saved)  # its own
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, timestep_spacing="leading"
    )
    same(images, theirs(FAMILIES["sd15"], pipe, PROMPTS, 16, steps=steps))


def test_the_last_alpha_is_seen(tmp_path: pathlib.Path) -> None:
    few = {**SHIPPED, "num_train_timesteps": 20, "beta_end": 0.2, "clip_sample": False}
    images = []
    for clean in (True, False):
        model = with_scheduler(tmp_path / str(clean), diffusers.DDIMScheduler(**few, set_alpha_to_one=clean))
        images.append(ours(model, PROMPTS[:1], 10))
        same(images[-1], theirs(FAMILIES["sd15"], model.pipeline, PROMPTS[:1], 16, steps=10))
    assert apart(*images) > 1e-3
    same(ours(model, PROMPTS[:1], 12), theirs(FAMILIES["sd15"], model.pipeline, PROMPTS[:1], 16, steps=12))
    clean = with_scheduler(tmp_path / "dense", diffusers.DDIMScheduler(**few))
    same(ours(clean, PROMPTS[:1], 12), theirs(FAMILIES["sd15"], clean.pipeline, PROMPTS[:1], 16, steps=12))
    with pytest.raises(InputError, match="steps=20 do not fit"):
        model.grid(20)


def test_v_prediction_is_the_pipelines() -> None:
    model = SD15(sd15_pipeline(WORDS, prediction_type="v_prediction"), "tiny")
    assert model.kind == "v_prediction"
    expected = theirs(FAMILIES["sd15"], model.pipeline, PROMPTS, 16, 4.0)
    same(ours(model, PROMPTS, guidance=4.0), expected)
    assert apart(expected, ours(SD15(sd15_pipeline(WORDS), "tiny"), PROMPTS, guidance=4.0)) > 1e-2


def test_unets_for_other_tasks_are_refused() -> None:
    pipe: Any = sd15_pipeline(WORDS)
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(InputError, match="takes 9 channels where its autoencoder gives 4, as inpainting"):
        SD15(pipe, "tiny")
    pipe = sd15_pipeline(WORDS)
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(InputError, match="latent consistency"):
        SD15(pipe, "tiny")
    pipe = sd15_pipeline(WORDS)
    pipe.scheduler = diffusers.DDIMScheduler(**SHIPPED, rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="rescale_betas_zero_snr=False"):
        SD15(pipe, "tiny")


# Stable Diffusion 3


@pytest.mark.parametrize("options", [{"newer": False}, {"t5": False}])
def test_older_and_lighter_sd3_is_the_pipelines(tmp_path: pathlib.Path, options: dict[str, bool]) -> None:
    pipe: Any = sd3_pipeline(WORDS, **options)
    pipe.save_pretrained(tmp_path)
    model: Any = load(tmp_path)
    assert (model.pipeline.text_encoder_3 is None) == (options == {"t5": False})
    tokens = {"guidance_scale": 3.0} if "t5" in options else {"guidance_scale": 3.0, "max_sequence_length": 8}
    model.pipeline.set_progress_bar_config(disable=True)
    expected = model.pipeline(
        PROMPTS, height=16, width=16, num_inference_steps=4, generator=seeded(), output_type="pt", **tokens
    ).images
    same(ours(model, PROMPTS, guidance=3.0), expected)


@pytest.mark.parametrize("options", [{"shift": 1.0}, {"use_dynamic_shifting": True, "base_shift": 0.9}])
def test_sd3s_times_are_its_schedulers(options: dict[str, Any]) -> None:
    pipe = sd3_pipeline(WORDS)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    model = SD3(pipe, "tiny")
    assert apart(model.grid(4), SD3(sd3_pipeline(WORDS), "tiny").grid(4)) > 1e-2
    same(ours(model, PROMPTS), theirs(FAMILIES["sd3"], pipe, PROMPTS, 16))


def test_sd3_needs_its_clip_encoders_and_a_place_for_every_token(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="resolution 128 is not a multiple of 4 up to 64"):
        SD3(sd3_pipeline(WORDS), "tiny", resolution=128)
    for part in ("", "_2"):
        pipe: Any = sd3_pipeline(WORDS)
        pipe.register_modules(**{f"text_encoder{part}": None})
        with pytest.raises(InputError, match=f"lacks its text_encoder{part}, "):
            SD3(pipe, "tiny")


def test_words_outside_the_vocabulary_are_refused(folders: dict[str, pathlib.Path]) -> None:
    for folder in folders.values():
        with pytest.raises(InputError, match="did you mean 'circle'"):
            load(folder).encode(["a red circel"])


# pixel-space DDPM, by its own stochastic steps


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
@torch.no_grad()
def test_unets_own_steps_are_the_ddpm_pipelines(kind: str, side: int) -> None:
    pipe: Any = unet_pipeline(train_times=10, learned_variance=kind == "learned_range")
    pipe.unet.register_to_config(sample_size=side)
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, variance_type=kind)
    pipe.set_progress_bar_config(disable=True)
    expected = torch.as_tensor(pipe(batch_size=2, generator=seeded(), num_inference_steps=10, output_type="pt").images)
    assert expected.shape == (2, 3, side, side) and expected.std() > 0.05
    model = UNet(pipe, "tiny", resolution=side)
    variance: Any = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}[kind]
    generator, condition = seeded(), model.encode([""])
    start = model.noise(2, generator)
    field = lambda x, t: model.predict(x, t, condition)  # noqa: E731
    same(model.decode(ancestral(field, start, model.grid(10), generator, variance)), expected)
