"""Adapters of other trainers, as part of a base and as a start; files are made here, as their trainers write them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS
from diffusers import FluxPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.tiny import flux_pipeline
from fieldsmith import api
from fieldsmith.cli import main
from fieldsmith.errors import InputError
from fieldsmith.models import load, load_adapter, merge_adapters
from fieldsmith.models.adapters import parse
from fieldsmith.models.changes import Change, difference
from fieldsmith.models.core import LoraSpec, Model
from fieldsmith.models.export import sizes_of
from fieldsmith.models.flux import Flux
from fieldsmith.models.sd15 import SD15
from tests.drawn import seeded
from tests.test_export import SMALL, stable_diffusion
from tests.test_models import flux_images

LAYER = "transformer_blocks.0.attn.to_q"


def sd15() -> SD15:
    return SD15(stable_diffusion(), "tiny")


def flux() -> Flux:
    return Flux(flux_pipeline(WORDS, **SMALL), "tiny")


def weights(model: Model) -> dict[str, Tensor]:
    """Copies of the denoiser's, and of the text encoders' under their own names."""
    found = {}
    for part in (model.PART, "text_encoder", "text_encoder_2"):
        if model.pipeline.components.get(part) is not None:
            state = model.pipeline.components[part].state_dict()
            found |= {f"{part}.{name}": tensor.clone() for name, tensor in state.items()}
    return found


def pair(wide: int, tall: int, rank: int = 2, seed: int = 1, kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    draws = seeded(seed)
    down = torch.randn(rank, wide, *kernel, generator=draws)
    return down, torch.randn(tall, rank, *[1] * len(kernel), generator=draws)


def sd_scripts(model: Model, alpha: float = 1.0) -> dict[str, Tensor]:
    """What sd-scripts' networks/lora.py writes by default: every linear layer and 1x1 convolution of the transformers,
    and of the text encoder under the names that it had in transformers 4."""
    state = {}
    unet = {name: size for name, size in sizes_of(model.network).items() if ".attentions." in name}
    text = {
        f"text_model.{name}": (layer.in_features, layer.out_features)
        for name, layer in model.pipeline.text_encoder.named_modules() if isinstance(layer, nn.Linear)
    }  # fmt: skip
    for prefix, layers in (("lora_unet_", unet), ("lora_te_", text)):
        for name, (wide, tall, *kernel) in layers.items():
            key = prefix + name.replace(".", "_")
            down, up = pair(wide, tall, kernel=tuple(kernel))
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return state


def written(state: dict[str, Tensor], file: pathlib.Path) -> pathlib.Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    return file


def test_sd_scripts_defaults_are_a_base(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = sd15()
    before, state = weights(model), sd_scripts(model)
    file = written(state, tmp_path / "style.safetensors")
    merge_adapters(model, f"{file}:0.5")
    after, named = weights(model), {key.replace(".", "_"): key for key in before}
    stems = {key.removesuffix(".alpha") for key in state if key.endswith(".alpha")}
    for stem in stems:
        plain = stem.replace("lora_unet_", "unet_").replace("lora_te_text_model_", "text_encoder_") + "_weight"
        key = named.pop(plain)
        change = 0.5 * 0.5 * state[f"{stem}.lora_up.weight"].flatten(1) @ state[f"{stem}.lora_down.weight"].flatten(1)
        torch.testing.assert_close((after[key] - before[key]).flatten(1), change, atol=1e-5, rtol=1e-4)
    assert any("proj_in" in stem for stem in stems) and any("lora_te_" in stem for stem in stems)
    assert all(torch.equal(after[key], before[key]) for key in named.values())  # and nothing else
    said = capsys.readouterr().err
    assert f"{file} at 0.5: " in said and "layers of the unet" in said and "6 of the text_encoder" in said
    assert model.adapters == (f"{file}:0.5",) and not model.trains


def test_scale_zero_is_the_base_to_the_last_bit(tmp_path: pathlib.Path) -> None:
    model = sd15()
    before = weights(model)
    merge_adapters(model, [f"{written(sd_scripts(model), tmp_path / 'a.safetensors')}:0"])
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(model).items())


def test_flux_of_kohya_with_clip_keys(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = flux()
    before, state = weights(model), {}
    down, up = pair(128, 3 * 128)
    encoder = next(
        (n, m) for n, m in model.pipeline.text_encoder.named_modules() if n.endswith("layers.0.self_attn.q_proj")
    )
    small = pair(encoder[1].in_features, encoder[1].out_features)
    te = f"lora_te1_text_model_{encoder[0].removeprefix('text_model.').replace('.', '_')}"
    for key, halves in (("lora_unet_double_blocks_0_img_attn_qkv", (down, up)), (te, small)):
        state |= {f"{key}.lora_down.weight": halves[0], f"{key}.lora_up.weight": halves[1]}
    merge_adapters(model, written(state, tmp_path / "a.safetensors"))
    after = weights(model)
    made = [after[f"transformer.transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"]
    were = [before[f"transformer.transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"]
    torch.testing.assert_close(torch.cat(made) - torch.cat(were), up @ down, atol=1e-5, rtol=1e-4)
    key = f"text_encoder.{encoder[0]}.weight"
    torch.testing.assert_close(after[key] - before[key], small[1] @ small[0], atol=1e-5, rtol=1e-4)
    assert "1 layers of the transformer, 1 of the text_encoder" in capsys.readouterr().err


def test_an_encoder_that_the_model_does_not_have_is_passed_over(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sd15()
    extra = dict(zip(("lora_te2_x.lora_down.weight", "lora_te2_x.lora_up.weight"), pair(4, 4), strict=True))
    merge_adapters(model, written(sd_scripts(model) | extra, tmp_path / "a.safetensors"))
    assert "passed over: 1 of text_encoder_2, which this model does not have" in capsys.readouterr().err


PREFIXES = {
    "peft": ("base_model.model.transformer_blocks.0.attn.to_q", ".lora_A.weight", ".lora_B.weight"),
    "peft with a name": ("base_model.model.transformer_blocks.0.attn.to_q", ".lora_A.default.weight",
                         ".lora_B.default.weight"),
    "bare": (LAYER, ".lora_A.weight", ".lora_B.weight"),
    "OneTrainer": ("lora_transformer_transformer_blocks_0_attn_to_q", ".lora_down.weight", ".lora_up.weight"),
    "LyCORIS": ("lycoris_transformer_blocks_0_attn_to_q", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (f"transformer.{LAYER}", ".lora_A.weight", ".lora_B.weight"),
    "old diffusers": (f"transformer.{LAYER}", ".lora.down.weight", ".lora.up.weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Flux:
    """Its layer's weight is put back by those that change it."""
    return flux()


@pytest.fixture
def layer(base: Flux) -> Any:
    """The layer that the files here change, as it was again afterwards."""
    layer = base.network.get_submodule(LAYER)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    yield layer
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    base.adapters = ()


@pytest.mark.parametrize("trainer", PREFIXES)
def test_every_prefix_is_read(base: Flux, layer: Any, trainer: str, tmp_path: pathlib.Path) -> None:
    stem, *ends = PREFIXES[trainer]
    halves, before = pair(128, 128), layer.weight.clone()
    state = {stem + end: half for end, half in zip(ends, halves, strict=True)}
    file = written(state, tmp_path / "a.safetensors")
    merge_adapters(base, file)
    torch.testing.assert_close(layer.weight - before, halves[1] @ halves[0], atol=1e-5, rtol=1e-4)
    base.adapters = ()
    with torch.no_grad():
        layer.weight.copy_(before)
    load_adapter(base, file)
    try:
        assert base.spec and base.spec.rank == 2 and len(base.trainable()) == 2
        torch.testing.assert_close(base.adapter()[LAYER].up, halves[1])
    finally:
        base.remove_training()


def test_peft_keeps_its_alpha_beside_the_file(base: Flux, layer: Any, tmp_path: pathlib.Path) -> None:
    halves, before = pair(128, 128), layer.weight.clone()
    state = {f"base_model.model.{LAYER}.lora_{x}.weight": half for x, half in zip("AB", halves, strict=True)}
    written(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "use_rslora": False}))
    merge_adapters(base, tmp_path)
    torch.testing.assert_close(layer.weight - before, 4 * halves[1] @ halves[0], atol=1e-4, rtol=1e-4)


KINDS: dict[str, Any] = {
    "LoHa": LoHaConfig(r=3, alpha=6, target_modules=["0"], init_weights=False),
    "LoKr": LoKrConfig(r=3, alpha=6, target_modules=["0"], init_weights=False, decompose_both=True),
    "DoRA": LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False),
    "LoRA with biases": LoraConfig(
        r=3, lora_alpha=6, target_modules=["0"], lora_bias=True, init_lora_weights=False
    ),
}  # fmt: skip


def by_peft(kind: str, layer: nn.Linear, folder: pathlib.Path) -> tuple[pathlib.Path, Tensor, Tensor]:
    """A file of this kind as peft writes it for LAYER, and the weight and bias that peft's own merge gives."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        own = nn.Linear(128, 128)
        own.load_state_dict(layer.state_dict())
        tuned = get_peft_model(nn.Sequential(own), KINDS[kind])  # type: ignore[arg-type]
        for name, parameter in tuned.named_parameters():  # what starts as it is, as after training
            if "magnitude" in name or name.endswith("lora_B.default.bias"):
                parameter.data += torch.rand_like(parameter)
    tuned.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    state = {key.replace("model.0", f"model.{LAYER}"): tensor for key, tensor in load_file(file).items()}
    rank = KINDS[kind].r
    state |= {} if kind in ("DoRA", "LoRA with biases") else {f"base_model.model.{LAYER}.alpha": torch.tensor(6.0)}
    assert rank == 3
    merged = tuned.merge_and_unload()[0]
    return written(state, file), merged.weight.detach(), merged.bias.detach()


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor")  # peft's own, of the bias that it wrote itself
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_merged_as_peft_merges_them(base: Flux, layer: Any, kind: str, tmp_path: pathlib.Path) -> None:
    before = layer.weight.clone(), layer.bias.clone()
    file, weight, bias = by_peft(kind, layer, tmp_path)
    merge_adapters(base, file)
    torch.testing.assert_close(layer.weight, weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.bias, bias, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        layer.weight.copy_(before[0])
        layer.bias.copy_(before[1])
    base.adapters = ()
    with pytest.raises(InputError, match=f"is an adapter of kind {kind} .*goes in with --adapter"):
        load_adapter(base, file)
    merge_adapters(base, f"{file}:0")
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.bias, before[1])
    assert not base.trains


def test_dora_of_lycoris_may_scale_inputs() -> None:
    weight, (down, up) = torch.randn(4, 6, generator=seeded()), pair(6, 4)
    size = torch.rand(1, 6, generator=seeded(2)) + 0.5
    change = Change("x", ("x",), {"down": down, "up": up, "dora_scale": size}, 1.0)
    made = difference(change, weight)
    assert made is not None
    torch.testing.assert_close((weight + made).norm(dim=0), size[0])
    whole = weight + up @ down  # every column keeps its direction
    torch.testing.assert_close(nn.functional.normalize(weight + made, dim=0), nn.functional.normalize(whole, dim=0))


def test_what_is_broken_is_refused_by_key(base: Flux, layer: Any, tmp_path: pathlib.Path) -> None:
    before = layer.weight.clone()
    down, up = pair(128, 128)
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "nan": ({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up * float("nan")},
                rf"'{LAYER}.lora_B.weight' in .* holds NaN"),
        "half": ({f"{LAYER}.lora_B.weight": up}, rf"is not whole: '{LAYER}' has one of its two weights \(up\)"),
        "oft": ({f"oft_unet_{LAYER}.oft_blocks": up}, "adapter of kind OFT"),
        "foreign": ({"some.layer.lora_A.weight": down, "some.layer.lora_B.weight": up},
                    r"does not fit tiny: 'some.layer.lora_A.weight' \(2, 128\) is no layer of a flux denoiser"),
        "size": ({f"{LAYER}.lora_A.weight": down[:, :5], f"{LAYER}.lora_B.weight": up}, "its layer 128 x 128"),
        "empty": ({}, "holds no LoRA"),
    }  # fmt: skip
    for name, (state, sentence) in cases.items():
        file = written(state, tmp_path / f"{name}.safetensors")
        for take in (merge_adapters, load_adapter):
            with pytest.raises(InputError, match=sentence) as refused:
                take(base, file)
            assert "\n" not in str(refused.value)
    assert torch.equal(layer.weight, before) and not base.trains and base.adapters == ()


def test_scales_are_numbers(tmp_path: pathlib.Path) -> None:
    odd = tmp_path / "a:b.safetensors"
    odd.touch()
    assert parse(odd) == (odd, 1.0) and parse(f"{odd}:0.5") == (odd, 0.5) and parse("a:-1") == (pathlib.Path("a"), -1.0)
    for tail in ("x", "nan", "inf", ""):
        with pytest.raises(InputError, match=f"the scale '{tail}' of adapter 'a.safetensors' is no number; write"):
            parse(f"a.safetensors:{tail}")


def test_a_start_is_trained_on_and_is_its_own_reference(base: Flux, layer: Any, tmp_path: pathlib.Path) -> None:
    halves = pair(128, 128, rank=3)
    key = "lora_unet_double_blocks_0_img_attn_proj"
    state = {
        f"{key}.lora_down.weight": halves[0],
        f"{key}.lora_up.weight": halves[1],
        f"{key}.alpha": torch.tensor(6.0),
    }
    names = dict(base.network.named_parameters())
    x, condition = base.noise(1, seeded()), base.encode(["a red square"])

    @torch.no_grad()
    def velocity() -> Tensor:
        return base.predict(x, torch.tensor(0.5), condition).velocity

    bare = velocity()
    load_adapter(base, written(state, tmp_path / "a.safetensors"), start=True)
    try:
        start = velocity()
        assert base.spec and base.spec.rank == 3 and (start - bare).abs().max() > 1e-3
        assert {name.split(".lora_")[0] for name in base.trainable()} == {"transformer_blocks.0.attn.to_out.0"}
        for parameter in base.trainable().values():
            parameter.data.mul_(0.5)
        moved, mine = velocity(), base.trainable()
        with base.reference():
            assert torch.equal(velocity(), start)
        assert torch.equal(velocity(), moved) and (moved - start).abs().max() > 1e-3
        assert all(mine[name] is parameter for name, parameter in base.trainable().items())
        assert base.adapter()["transformer_blocks.0.attn.to_out.0"].scale == 2
        base.scale_adapter(0.0)
        torch.testing.assert_close(velocity(), bare)
    finally:
        base.remove_training()
    assert torch.equal(velocity(), bare)
    assert all(names[name] is parameter for name, parameter in base.network.named_parameters())


# the commands

QUICK = [
    "--steps",
    "3",
    "--window",
    "0",
    "2",
    "--batch",
    "2",
    "--budget",
    "4",
    "--evaluate",
    "0",
    "--rollout-guidance",
    "1",
]


@pytest.fixture
def file(flux_folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A LoRA of rank 3 for the tiny pipeline."""
    model = load(flux_folder)
    model.adapt(LoraSpec("qk_dual", rank=3))
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=seeded(len(name))))
    model.save(tmp_path / "given")
    return tmp_path / "given" / "pytorch_lora_weights.safetensors"


def test_erase_goes_on_from_a_lora_over_a_base_with_another(
    flux_folder: pathlib.Path, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "run"
    words = ["erase", "--model", str(flux_folder), "--targets", "red circle", "--anchors", "blue square", *QUICK]
    words += ["--adapter", f"{file}:0.5", "--adapter", f"{file}:0.25", "--continue", str(file), "--out", str(out)]
    assert main(words) == 0
    result = api.open_run(out)
    assert result.config["adapter"] == [f"{file}:0.5", f"{file}:0.25"] and result.config["continue_from"] == str(file)
    trained, given = load_file(out / "adapter" / "pytorch_lora_weights.safetensors"), load_file(file)
    assert trained.keys() == given.keys()
    assert all(trained[key].shape == given[key].shape for key in given)
    moved = [(trained[key] - given[key]).abs().max() for key in given]
    assert 0 < max(moved) < 0.05  # from where the file stood
    plain = load(flux_folder)
    name = LAYER + ".base_layer.weight"
    change = result.model.network.get_parameter(name) - plain.network.get_parameter(LAYER + ".weight")
    A, B = (given[f"transformer.{LAYER}.lora_{half}.weight"] for half in "AB")
    torch.testing.assert_close(change, 0.75 * B @ A, atol=1e-5, rtol=1e-4)
    assert "fuse_lora(lora_scale=0.5)" in (out / "report.html").read_text()


def test_bad_adapters_are_refused_before_weights_are_read(
    flux_folder: pathlib.Path, unet_folder: pathlib.Path, file: pathlib.Path, tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("diffusers.FluxPipeline.from_pretrained", never)
    monkeypatch.setattr("diffusers.DDPMPipeline.from_pretrained", never)
    other = tmp_path / "sd.safetensors"
    written(
        {f"lora_unet_mid_block_attentions_0_proj_in.lora_{x}.weight": torch.zeros(2, 2) for x in ("down", "up")}, other
    )
    base = ["erase", "--model", str(flux_folder), "--targets", "red circle", "--anchors", "blue square", *QUICK]
    out = ["--out", str(tmp_path / "new")]
    cases = [
        ([*base, "--adapter", "gone.safetensors", *out], "the adapter 'gone.safetensors' does not exist"),
        ([*base, "--adapter", f"{file}:strong", *out], "the scale 'strong' of adapter"),
        ([*base, "--adapter", str(other), *out], "seems to be made for family sd15 or sdxl, not for flux"),
        ([*base, "--continue", "gone", *out], "the adapter 'gone' does not exist"),
        ([*base, "--continue", str(file), "--full", *out], "is a LoRA, but full weights train; leave out one"),
        (["sample", "--model", str(unet_folder), "--prompts", "cat", "--adapter", str(file)], "has no adapter files"),
    ]  # fmt: skip
    for words, sentence in cases:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1, said
    assert not (tmp_path / "new").exists()


def test_a_loaded_model_brings_its_adapters(flux_folder: pathlib.Path, file: pathlib.Path) -> None:
    model = load(flux_folder, adapter=[f"{file}:0.5"])
    settings: dict[str, Any] = {"steps": 3, "window": (0, 2), "batch": 2, "budget": 4, "evaluate": 0, "rank": 2}
    result = api.erase(model, "red circle", "blue square", **settings)
    assert result.config.adapter == (f"{file}:0.5",)
    with pytest.raises(InputError, match=r"goes with the name of a model; this one is loaded"):
        api.erase(load(flux_folder), "red circle", "blue square", adapter=(str(file),), **settings)


def test_sample_puts_base_and_adapter_side_by_side(
    flux_folder: pathlib.Path, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red square\na blue circle\n")
    out = tmp_path / "grid.png"
    words = ["sample", "--model", str(flux_folder), "--prompts", str(tmp_path / "prompts.txt"), "--each", "2"]
    words += ["--steps", "2", "--seed", "7", "--adapter", str(file), "--side-by-side", "--chunk", "3"]
    assert main([*words, "--out", str(out)]) == 0
    names = sorted(each.name for each in (tmp_path / "grid-images").iterdir())
    assert names == [f"{row:03}-{seed}{side}.png" for row in (0, 1) for seed in (7, 8) for side in ("-base", "")]
    with Image.open(tmp_path / "grid-images" / "001-8.png") as one:
        pixels, text = np.asarray(one) / 255, one.text  # type: ignore[attr-defined]
        assert one.size == (32, 32)
    assert text["prompt"] == "a blue circle" and text["seed"] == "8"
    assert json.loads(text["settings"])["adapter"] == [str(file)] and json.loads(text["settings"])["steps"] == 2
    with Image.open(out) as grid:
        assert grid.size == (4 * (128 + 2) + 2, 2 * (128 + 2) + 2)
    # each can be drawn again alone, and by diffusers at its seed
    pipe = FluxPipeline.from_pretrained(flux_folder)
    for side, expected in (("-base", None), ("", file)):
        if expected:
            pipe.load_lora_weights(expected)
        theirs = flux_images(pipe, ["a blue circle"], 2, 8)[0]
        ours = np.asarray(Image.open(tmp_path / "grid-images" / f"001-8{side}.png")) / 255
        assert abs(ours - theirs.permute(1, 2, 0).numpy()).max() < 1 / 255
    base = np.asarray(Image.open(tmp_path / "grid-images" / "001-8-base.png")) / 255
    assert abs(base - pixels).max() > 0.01


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_the_suffix_is_the_format(flux_folder: pathlib.Path, tmp_path: pathlib.Path, suffix: str) -> None:
    out = tmp_path / f"x.{suffix}"
    words = ["sample", "--model", str(flux_folder), "--prompts", "a red square", "--each", "1", "--steps", "1"]
    assert main([*words, "--out", str(out)]) == 0
    for file in (out, tmp_path / "x-images" / f"000-0.{suffix}"):
        with Image.open(file) as image:
            assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]
    assert "prompt: a red square\nseed: 0" in image.getexif()[0x010E]


def test_what_sample_cannot_write_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    (tmp_path / "y-images").touch()
    (tmp_path / "none.txt").touch()
    for words, sentence in (
        (["--prompts", "star", "--out", "x.gif"], "out 'x.gif' has no suffix of a format; end it in .png, .jpg"),
        (["--prompts", "star", "--out", str(tmp_path / "y.png")], "y-images' is a file; name a folder"),
        (["--prompts", "star", "--side-by-side"], "--side-by-side goes with --adapter"),
        (["--prompts", str(tmp_path / "none.txt")], "has no line with words in it"),
    ):
        assert main(["sample", *words]) == 2
        assert sentence in capsys.readouterr().err
