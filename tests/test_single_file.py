"""A model in one .safetensors file, in the names of its first release: loaded to parity, refused by its headers."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.tiny_text import sd3_pipeline, sd15_pipeline, sdxl_pipeline
from fieldsmith.cli import main
from fieldsmith.errors import InputError
from fieldsmith.models import load
from fieldsmith.models.sd3 import SD3

# the names of Stable Diffusion's first release, against diffusers'
UNET = (
    (r"^add_embedding\.linear_1", "label_emb.0.0"), (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
)  # fmt: skip
RESNET = (
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip


def released_unet(unet: Any) -> dict[str, Tensor]:
    """The UNet's weights under Stable Diffusion's own names; one layer a block, as the tiny pipelines have."""
    found = {}
    for key, weight in unet.state_dict().items():
        name = key
        for ours, theirs in UNET:
            name = re.sub(ours, theirs, name)
        block = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key)
        if block:
            way, level, kind, i, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
            if way == "down":
                place = 2 * level + (2 if kind == "downsamplers" else 1)
                inner = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
            else:
                place = 2 * level + (1 if kind == "upsamplers" else i)
                # an upsampler is the last of its last layer: behind the attention where there is one
                attends = "CrossAttn" in unet.config.up_block_types[level]
                inner = {"resnets": "0", "attentions": "1", "upsamplers": f"{2 if attends else 1}.conv"}[kind]
            rest = rest.removeprefix("conv.") if "sampler" in kind else rest
            name = f"{'input' if way == 'down' else 'output'}_blocks.{place}.{inner}.{rest}"
        if "resnets" in key:
            for ours, theirs in RESNET:
                name = re.sub(rf"\.{ours}(?=\.)", f".{theirs}", name)
        found[f"model.diffusion_model.{name}"] = weight.contiguous()
    return found


def released_sd3(transformer: Any) -> dict[str, Tensor]:
    """SD3's weights under its release's names: queries, keys and values in one layer, and of the last modulations the
    halves that shift before those that scale."""
    names = (
        *SD3.ORIGINAL_NAMES,
        (r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])", r"joint_blocks.\1.x_block.\2.ln_\3"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])", r"joint_blocks.\1.context_block.attn.ln_\2"),
    )
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}.norm1_context."
    found: dict[str, dict[int, Tensor]] = {}
    for key, weight in transformer.state_dict().items():
        layer, _, kind = key.rpartition(".")
        theirs = next((re.sub(ours, name, layer) for ours, name in names if re.fullmatch(ours, layer)), "")
        if key.startswith(("norm_out.", last)):
            weight = torch.cat(weight.chunk(2)[::-1])
        place = re.search(r"(?:to|add)_([qkv])", layer)
        found.setdefault(f"{theirs}.{kind}" if theirs else kind, {})["qkv".find(place[1]) if place else 0] = weight
    whole = {key: torch.cat([parts[i] for i in sorted(parts)]).contiguous() for key, parts in found.items()}
    return {f"model.diffusion_model.{key}": weight for key, weight in whole.items()}


def released_vae(vae: Any) -> dict[str, Tensor]:
    """The autoencoder's weights under Stable Diffusion's own names, of one without attention."""
    levels = len(vae.config.block_out_channels)
    found = {}
    for key, weight in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        name = name.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample")
        found[f"first_stage_model.{name.replace('upsamplers.0', 'upsample')}"] = weight.contiguous()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One pipeline's folder, and another one's UNet in `other.safetensors` beside it."""
    place = tmp_path_factory.mktemp("single")
    words = ("a", "red", "circle")
    sd15_pipeline(words, seed=0).save_pretrained(place / "pipeline")
    save_file(released_unet(sd15_pipeline(words, seed=1).unet), place / "other.safetensors")
    return place


def test_a_file_gives_its_denoiser_and_the_folder_the_rest(folder):
    model = load(folder / "other.safetensors", config_from=folder / "pipeline")
    wanted, base = sd15_pipeline(("a", "red", "circle"), seed=1).unet, load(folder / "pipeline")
    weights = model.network.state_dict()
    assert weights.keys() == wanted.state_dict().keys()
    for key, weight in wanted.state_dict().items():
        assert torch.equal(weights[key], weight), key
    assert torch.equal(model.encode(["a red circle"]).parts["embeds"], base.encode(["a red circle"]).parts["embeds"])
    x, t = model.noise(1, torch.Generator().manual_seed(0)), torch.tensor([0.5])
    condition = model.encode(["a circle"])
    ours = model.predict(x, t, condition).value
    theirs = wanted(x, 499, encoder_hidden_states=condition.parts["embeds"]).sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_files_own_autoencoder_and_encoder_of_words_are_used(tmp_path):
    base, wanted = (sd15_pipeline(("a", "red", "circle"), seed=seed) for seed in (0, 1))
    base.save_pretrained(tmp_path / "pipeline")
    encoder = {
        f"text_model.{key.removeprefix('text_model.')}": w for key, w in wanted.text_encoder.state_dict().items()
    }
    words = {f"cond_stage_model.transformer.{key}": weight.clone() for key, weight in encoder.items()}
    images = released_unet(wanted.unet) | released_vae(wanted.vae)
    save_file(images | words, tmp_path / "whole.safetensors")
    strange = {key.replace("text_model", "roberta"): weight for key, weight in words.items()}
    save_file(images | strange, tmp_path / "strange.safetensors")
    with pytest.raises(InputError, match="its encoder of words is in no layout that diffusers reads"):
        load(tmp_path / "strange.safetensors", config_from=tmp_path / "pipeline")
    model = load(tmp_path / "whole.safetensors", config_from=tmp_path / "pipeline")
    for part in ("unet", "vae", "text_encoder"):
        theirs, ours = getattr(wanted, part).state_dict(), getattr(model.pipeline, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs), part


@pytest.mark.parametrize(
    ("pipeline", "part", "released"),
    [(sdxl_pipeline, "unet", released_unet), (sd3_pipeline, "transformer", released_sd3)],
    ids=["sdxl", "sd3"],
)
def test_files_of_other_families_give_their_denoisers(tmp_path, pipeline, part, released):
    pipeline(("a", "red", "circle"), seed=0).save_pretrained(tmp_path / "pipeline")
    wanted = getattr(pipeline(("a", "red", "circle"), seed=1), part).state_dict()
    save_file(released(getattr(pipeline(("a", "red", "circle"), seed=1), part)), tmp_path / "one.safetensors")
    weights = load(tmp_path / "one.safetensors", config_from=tmp_path / "pipeline").network.state_dict()
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.usefixtures("few_steps")
def test_it_trains_and_draws_from_the_command_line(folder, tmp_path):
    words = ["--model", str(folder / "other.safetensors"), "--config-from", str(folder / "pipeline")]
    short = [
        "--reward",
        "brightness",
        "--prompts",
        "a circle",
        "--preset",
        "draft",
        "--scale",
        "laptop",
        "--steps",
        "2",
    ]
    short += ["--epochs", "1", "--updates", "1", "--rollouts", "2", "--evaluate", "0", "--rank", "2"]
    assert main(["align", *words, *short, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "adapter").is_dir()
    assert main(["plan", "align", *words, *short]) == 0
    assert main(["sample", *words, "--prompts", "a circle", "--each", "1", "--steps", "2",
                 "--out", str(tmp_path / "a.png")]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"], "is of family flux, and .* is of"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "is of family sd3, and .* is of family sd"),
        (["model.diffusion_model.input_blocks.1.0.in_layers.0.weight", "model.diffusion_model.label_emb.0.0.weight"],
         "is of family sdxl, and .* is of family sd15; give a pipeline of its family"),
        (["encoder.weight"], "holds no denoiser of a known family"),
    ],
    ids=["flux", "sd3", "sdxl", "none"],
)  # fmt: skip
def test_a_file_of_another_family_is_refused_before_its_weights_are_read(folder, tmp_path, monkeypatch, keys, says):
    file = tmp_path / "foreign.safetensors"
    save_file({key: torch.zeros(1) for key in keys}, file)
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=says):
        load(file, config_from=folder / "pipeline")


def test_a_file_without_its_config_and_what_is_no_file_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="is one file, without config and tokenizer; add --config-from FOLDER_OR_ID"):
        load(folder / "other.safetensors")
    with pytest.raises(InputError, match=r"config_from '.*' goes with a .safetensors file"):
        load(folder / "pipeline", config_from=folder / "pipeline")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "other.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="is no safetensors file, or was cut short"):
        load(cut, config_from=folder / "pipeline")
    small = tmp_path / "small.safetensors"
    save_file(released_unet(sd15_pipeline(("a",), widths=(8, 16), text_width=16).unet), small)
    with pytest.raises(InputError, match="could not be loaded, is it whole"):
        load(small, config_from=folder / "pipeline")
