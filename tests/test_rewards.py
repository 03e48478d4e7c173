"""Rewards that need no server: exact and learned judges, pixel formulas, others' networks (tiny), and their sums."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from torch import Tensor

from fieldsmith import rewards
from fieldsmith.errors import InputError, RunError
from fieldsmith.models.tiny import word_tokenizer
from fieldsmith.rewards import Named, checked, load
from fieldsmith.rewards.combined import Asynchronous, weighted
from fieldsmith.rewards.learned import FOLDER
from fieldsmith.rewards.pretrained import CLIP_MEAN, CLIP_STD, linear_layers, preprocess
from fieldsmith.worlds.shapes import PALETTE, ShapesWorld, caption, concepts

WORLD = ShapesWorld(32)
WORDS = ("a", "red", "blue", "square", "circle")
PROMPTS = ["a red square", "a blue circle", "a red circle"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(copies: int = 5) -> tuple[Tensor, list[str]]:
    asked = concepts() * copies
    return WORLD.render(asked, seeded(0)), [caption(concept) for concept in asked]


def noise(n: int = 3, height: int = 40, width: int = 52) -> Tensor:
    return torch.rand(n, 3, height, width, generator=seeded(1))


def constant(value: float, name: str = "constant") -> Named:
    return Named(name, False, lambda images, _: torch.full((len(images),), value))


# what the command line's --reward means


def test_the_package_is_light():
    script = "import fieldsmith.rewards, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules) or 'light')"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert output.stdout.strip() == "light", output.stdout + output.stderr


def test_a_sum_is_the_weighted_sum_of_its_parts():
    images, prompts = drawn(1)
    total = load("0.7*right + 0.3*brightness+-2*colour:red", WORLD)
    parts = [load(name, WORLD)(images, prompts) for name in ("right", "brightness", "colour:red")]
    torch.testing.assert_close(total(images, prompts), 0.7 * parts[0] + 0.3 * parts[1] - 2 * parts[2])
    assert total.name == "0.7*right+0.3*brightness+-2*colour:red"


def test_a_plus_in_a_path_belongs_to_it_unless_a_reward_follows():
    assert rewards._terms("0.5*clip:/sac+logos+ava1+0.3*right") == ["0.5*clip:/sac+logos+ava1", "0.3*right"]
    assert rewards._terms("right+brightnes") == ["right", "brightnes"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("brightnes", "'brightnes' is not in the vocabulary of rewards; did you mean 'brightness'"),
        ("right+brightnes", "did you mean 'brightness'"),
        ("", "is not NAME"),
        ("0.7right", "is not in the vocabulary"),
        ("x*right", "'x\\*right' in reward 'x\\*right' is not NAME"),
        ("0*brightness", "weight 0 of reward 'brightness'"),
        ("brightness:red", "takes no argument"),
        ("position", "write position:left|right|top|bottom"),
        ("position:lef", "did you mean 'left'"),
        ("colour:reds", "did you mean 'red'"),
        ("clip", "needs an argument; write clip:FOLDER"),
        ("clip:./nowhere", "the folder './nowhere' of reward 'clip' does not exist"),
        ("clip:/tmp?head=x", "has no head"),
        ("imagereward:./nowhere", "has 0 weight files"),
        ("python:no_such_package.module:function", "could not be imported"),
        ("python:json:no_such", "could not be imported"),
        ("python:json", "could not be imported"),
        ("python:json:JSONDecoder", "is no function"),
        ("remote:ftp://host", "is no address of a judge"),
    ],
)
def test_what_is_no_reward_is_refused_in_a_sentence(spec, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|").replace("?", r"\?")):
        load(spec, WORLD)


@pytest.mark.parametrize("name", ["right", "shape", "colour", "valid", "count", "position:left"])
def test_a_judge_of_the_world_needs_the_world(name):
    with pytest.raises(InputError, match="is the shapes world's judge"):
        load(name)


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text("def dark(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = load("python:my_judges:dark")
    assert checked(judge)(torch.zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1]
    assert judge.name == "python:my_judges:dark" and not judge.differentiable


# exact judges


@pytest.mark.parametrize("name", ["right", "shape", "colour", "valid", "count"])
def test_judges_of_the_world_pass_its_renders(name):
    images, prompts = drawn()
    given = checked(load(name, WORLD))(images, prompts)
    assert given.mean() >= 0.98 and set(given.tolist()) <= {0.0, 1.0}


def test_each_judge_reads_its_own_attribute():
    images, _ = drawn(1)
    asked = ["a red circle"] * len(images)
    given = {name: load(name, WORLD)(images, asked).sum().item() for name in ("right", "shape", "colour", "valid")}
    assert given == {"right": 1, "shape": 4, "colour": 6, "valid": 24}


def test_open_prompts_ask_only_for_a_valid_image():
    images, _ = drawn(1)
    assert load("right", WORLD)(images, [""] * 24).all()
    assert not load("right", WORLD)(torch.rand(3, 3, 32, 32, generator=seeded(2)), [""] * 3).any()


def test_two_pieces_are_not_one():
    image = torch.full((1, 3, 32, 32), 0.9)
    red = torch.tensor(PALETTE["red"])[:, None, None]
    judge = load("count", WORLD)
    assert judge(image, [""]).item() == 0
    image[0, :, 2:8, 2:8] = red
    assert judge(image, [""]).item() == 1
    image[0, :, 20:26, 20:26] = red
    assert judge(image, [""]).item() == 0


@pytest.mark.parametrize(
    ("rows", "columns", "halves"), [((0, 6), (0, 6), "left top"), ((20, 30), (18, 30), "right bottom")]
)
def test_position_is_the_half_with_the_centroid(rows, columns, halves):
    image = torch.full((1, 3, 32, 32), 0.9)
    image[0, :, slice(*rows), slice(*columns)] = torch.tensor(PALETTE["blue"])[:, None, None]
    for half in ("left", "right", "top", "bottom"):
        assert bool(load(f"position:{half}", WORLD)(image, [""])) == (half in halves)
        assert not load(f"position:{half}", WORLD)(torch.full((1, 3, 32, 32), 0.9), [""])


@pytest.mark.parametrize("name", ["right", "count", "position:top", "jpeg-size"])
def test_black_boxes_refuse_images_that_hold_nan(name):
    images, prompts = drawn(1)
    images[3, 0, 0, 0] = torch.nan
    with pytest.raises(RunError, match="hold NaN"):
        load(name, WORLD)(images, prompts)


# formulas of pixels


def flat(*colours: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, 3, 8, 8)


def test_brightness_darkness_and_saturation_by_hand():
    images = flat((1, 1, 1), (0, 0, 0), (1, 0, 0))
    for name, values in {"brightness": [1, 0, 0.299], "darkness": [0, 1, 0.701], "saturation": [0, 0, 1]}.items():
        torch.testing.assert_close(load(name)(images, [""] * 3), torch.tensor(values).float())


def test_hue_is_highest_at_its_colour_half_on_grey_and_lowest_opposite():
    red = torch.tensor(PALETTE["red"])
    opposite = 2 * red.mean() - red
    images = torch.stack([red, torch.full((3,), 0.5), opposite])[:, :, None, None].expand(-1, 3, 8, 8)
    near, grey, far = load("colour:red")(images, [""] * 3).tolist()
    assert near > 0.99 and grey == pytest.approx(0.5) and far < 0.01


def test_hue_tells_the_colours_of_the_world_apart():
    images, _ = drawn()
    scores = torch.stack([load(f"colour:{colour}")(images, [""] * len(images)) for colour in PALETTE], 1)
    assert (scores.argmax(1) == WORLD.judge(images).colour).float().mean() > 0.99


@pytest.mark.parametrize(
    "name", ["brightness", "darkness", "saturation", "colour:green", "classifier", "classifier-heldout"]
)
def test_gradients_agree_with_differences(name):
    judge = load(name)
    assert judge.differentiable
    image = (WORLD.render(concepts()[:1], seeded(3)) + torch.rand(1, 3, 32, 32, generator=seeded(4))) / 2
    image.requires_grad_()
    (slope,) = torch.autograd.grad(judge(image, ["a red square"]).sum(), image)
    way = torch.randn(image.shape, generator=seeded(5))
    step = 2e-3
    with torch.no_grad():
        rise = judge(image + step * way, ["a red square"]) - judge(image - step * way, ["a red square"])
    assert rise.item() / (2 * step) == pytest.approx((slope * way).sum().item(), rel=0.05, abs=1e-3)


def test_noise_compresses_worse_than_a_flat_image():
    images = torch.cat((torch.rand(1, 3, 32, 32, generator=seeded(6)), torch.full((1, 3, 32, 32), 0.5)))
    rough, smooth = load("jpeg-size")(images, ["", ""]).tolist()
    assert 0.2 < smooth < rough < 5  # kilobytes
    assert load("incompressibility")(images, ["", ""]).tolist() == [rough, smooth]
    assert load("compressibility")(images, ["", ""]).tolist() == [-rough, -smooth]
    assert not load("jpeg-size").differentiable


# learned judges


@pytest.mark.parametrize("name", ["classifier", "classifier-heldout"])
def test_the_classifiers_prefer_what_was_asked(name):
    images, prompts = drawn()
    judge = checked(load(name))
    given, swapped = judge(images, prompts), judge(images.flip(1), prompts)  # red and blue change places
    assert (given > -0.7).float().mean() > 0.98 and (given <= 0).all()
    reds = torch.tensor(["red" in prompt for prompt in prompts])
    assert (swapped[reds] < given[reds] - 1).float().mean() > 0.9


def test_a_classifier_scores_the_mean_of_what_is_named():
    images, _ = drawn(1)
    judge = load("classifier")
    both, colour, shape, nothing = (
        judge(images, [p] * 24) for p in ("a red ring", "a red shape", "a colored ring", "")
    )
    torch.testing.assert_close(both, (colour + shape) / 2)
    assert not nothing.any()


def test_the_classifiers_card_says_how_good_they_are():
    card = json.loads((FOLDER / "card.json").read_text())
    assert all(row["right, by noise"]["0.0"]["low"] > 0.99 for row in card["networks"].values())
    assert all((FOLDER / f"{name}.safetensors").stat().st_size <= 300_000 for name in card["networks"])


def test_the_classifiers_refuse_other_sizes_and_words():
    with pytest.raises(InputError, match="reads 32 x 32"):
        load("classifier")(torch.zeros(1, 3, 16, 16), ["a ring"])
    with pytest.raises(InputError, match="did you mean 'ring'"):
        load("classifier")(torch.zeros(1, 3, 32, 32), ["a rings"])


# others' networks, tiny and random


def clip_folder(folder: pathlib.Path) -> pathlib.Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": 10,
        "max_position_embeddings": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(text_config=text, vision_config=layers | {"image_size": 30, "patch_size": 10}, projection_dim=12)
        )
    model.save_pretrained(folder)
    word_tokenizer(WORDS, 8, bos=True).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=30).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return clip_folder(tmp_path_factory.mktemp("judges") / "clip")


def head_state(width: int) -> dict[str, Tensor]:
    sizes = (width, 1024, 128, 64, 16, 1)
    state = {}
    for number, before, after in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        state[f"layers.{number}.weight"] = torch.randn(after, before, generator=seeded(number)) / before**0.5
        state[f"layers.{number}.bias"] = torch.randn(after, generator=seeded(number + 10))
    return state


def as_pil(images: Tensor) -> list[numpy.ndarray]:
    return list((images * 255).byte().permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("size", [(40, 52), (91, 64), (30, 30), (16, 20)])
def test_torch_prepares_images_as_transformers_does(clip, size):
    from transformers import CLIPImageProcessorPil

    images = (noise(2, *size) * 255).round() / 255
    theirs = CLIPImageProcessorPil.from_pretrained(clip)(as_pil(images + 1e-4), return_tensors="pt")["pixel_values"]
    ours = preprocess(images, 30, CLIP_MEAN, CLIP_STD)
    assert ours.shape == theirs.shape == (2, 3, 30, 30)
    assert (ours - theirs).abs().max() < 1.5 / 255 / min(CLIP_STD)  # 8-bit rounding after each of PIL's two passes


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_clip_scores_equal_a_direct_computation(clip, name):
    from transformers import AutoTokenizer, CLIPModel

    images = noise().requires_grad_()
    judge = load(f"{name}:{clip}")
    given = checked(judge)(images, PROMPTS)
    model = CLIPModel.from_pretrained(clip).eval()
    words = AutoTokenizer.from_pretrained(clip)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"],
            pixel_values=preprocess(images, 30, CLIP_MEAN, CLIP_STD),
        )  # fmt: skip
    scale = 1 if name == "pickscore" else model.logit_scale.exp()
    torch.testing.assert_close(given.detach(), out.logits_per_image.diagonal() / scale)
    (slope,) = torch.autograd.grad(given.sum(), images)
    assert judge.differentiable and slope.abs().flatten(1).sum(1).gt(0).all()


def test_long_prompts_are_cut(clip):
    assert load(f"clip:{clip}")(noise(1), ["a red square " * 20]).shape == (1,)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_aesthetic_is_five_linear_layers_on_the_image_embedding(tmp_path, suffix):
    from safetensors.torch import save_file
    from transformers import CLIPModel

    folder, state = clip_folder(tmp_path), head_state(12)
    file = folder / f"sac+logos+ava1-l14-linearMSE{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    images = noise().requires_grad_()
    given = checked(load(f"aesthetic:{folder}"))(images, PROMPTS)
    with torch.no_grad():
        model = CLIPModel.from_pretrained(folder).eval()
        x = model.visual_projection(model.vision_model(preprocess(images, 30, CLIP_MEAN, CLIP_STD)).pooler_output)
        x = x / x.norm(dim=1, keepdim=True)
        for number in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    torch.testing.assert_close(given.detach(), x[:, 0], rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(given.sum(), images)[0].abs().flatten(1).sum(1).gt(0).all()
    file.rename(tmp_path / f"other{suffix}")
    torch.testing.assert_close(load(f"aesthetic:{folder}?head={tmp_path}/other{suffix}")(images, PROMPTS), given)


def test_an_aesthetic_head_that_does_not_fit_is_refused(clip, tmp_path):
    torch.save(head_state(768), tmp_path / "head.pth")
    with pytest.raises(InputError, match=r"reads 768 numbers and the CLIP .* gives 12"):
        load(f"aesthetic:{clip}?head={tmp_path}/head.pth")
    with pytest.raises(InputError, match="could not be read as weights"):
        load(f"aesthetic:{clip}?head={tmp_path}/none.pth")
    with pytest.raises(InputError, match="0 weight files named like linearMSE"):
        load(f"aesthetic:{clip}")
    with pytest.raises(InputError, match="holds no score head"):
        linear_layers({"weight": torch.zeros(1)}, "x.pth")


def imagereward_folder(folder: pathlib.Path) -> tuple[pathlib.Path, torch.nn.Module, dict[str, Tensor]]:
    """A tiny BLIP with the release's file, under the names that BLIP's authors gave."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {
        "encoder_hidden_size": 16,
        "vocab_size": 10,
        "bos_token_id": 2,
        "sep_token_id": 1,
        "pad_token_id": 0,
    }
    config = BlipConfig(text_config=text, vision_config=layers | {"image_size": 384, "patch_size": 16})
    config.save_pretrained(folder)
    word_tokenizer(WORDS, 8, bos=True).save_pretrained(folder)
    config.vision_config.image_size = 32  # ImageReward is smaller than the BLIP whose config it borrows
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BlipForImageTextRetrieval(config).eval()
    names = {
        "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
        "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
        "vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
        "vision_model.post_layernorm": "visual_encoder.norm", "vision_model.encoder.layers": "visual_encoder.blocks",
        "layer_norm": "norm", "self_attn.projection": "attn.proj", "self_attn": "attn",
    }  # fmt: skip
    head, state = head_state(16), {}
    for key, weight in model.state_dict().items():
        for theirs, original in names.items():
            key = key if key.startswith("text_encoder") else key.replace(theirs, original)
        state[f"blip.{key}"] = weight
    torch.save(state | {f"mlp.{key}": weight for key, weight in head.items()}, folder / "ImageReward.pt")
    return folder, model, head


def test_imagereward_equals_a_direct_computation(tmp_path):
    from transformers import AutoTokenizer

    folder, model, head = imagereward_folder(tmp_path)
    images = noise().requires_grad_()
    judge = load(f"imagereward:{folder}")
    given = checked(judge)(images, PROMPTS)
    words = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    with torch.no_grad():
        out = model(
            words["input_ids"], preprocess(images, 32, CLIP_MEAN, CLIP_STD), attention_mask=words["attention_mask"]
        )
        x = out.question_embeds[:, 0]
        for number in (0, 2, 4, 6, 7):
            x = x @ head[f"layers.{number}.weight"].T + head[f"layers.{number}.bias"]
    torch.testing.assert_close(
        given.detach(), (x[:, 0] - 0.16717362830052426) / 1.0333394966054072, rtol=1e-4, atol=1e-5
    )
    assert judge.differentiable and torch.autograd.grad(given.sum(), images)[0].abs().flatten(1).sum(1).gt(0).all()


def test_imagereward_with_a_part_missing_is_refused(tmp_path):
    folder, _, _ = imagereward_folder(tmp_path)
    state = torch.load(folder / "ImageReward.pt")
    torch.save({key: w for key, w in state.items() if "blocks.1.norm2" not in key}, folder / "ImageReward.pt")
    with pytest.raises(InputError, match=r"layers\.1\.layer_norm2\.weight is missing"):
        load(f"imagereward:{folder}")


def test_a_folder_of_something_else_is_no_clip(tmp_path, clip):
    with pytest.raises(InputError, match="is not what it needs"):
        load(f"clip:{tmp_path}")
    from safetensors.torch import load_file, save_file

    folder = clip_folder(tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: w for k, w in state.items() if "visual_projection" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"is no whole CLIPModel: it lacks visual_projection\.weight"):
        load(f"clip:{folder}")


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_sentence(monkeypatch):
    from transformers import CLIPModel

    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    with pytest.raises(InputError, match=r"could not be fetched from the hub.*couldn't connect\)$"):
        load("pickscore:nobody/nothing")


# rewards made of rewards


def test_a_sum_is_differentiable_only_if_all_parts_are():
    bright, hue = load("brightness"), load("colour:red")
    assert weighted([(1, bright), (2, hue)]).differentiable
    mixed = weighted([(1, bright), (2, load("jpeg-size"))])
    assert not mixed.differentiable
    assert not mixed(noise().requires_grad_(), PROMPTS).requires_grad
    with pytest.raises(InputError, match="a sum of no rewards"):
        weighted([])


def test_asynchronous_judges_meanwhile_in_order():
    begun, go = threading.Event(), threading.Event()

    def slow_at_first(images: Tensor, prompts: list[str]) -> Tensor:
        if prompts[0] == "first":
            begun.set()
            assert go.wait(5)
        return images.mean((1, 2, 3))

    with Asynchronous(Named("slow", False, slow_at_first), workers=2) as judge:
        images = torch.full((1, 3, 2, 2), 0.25)
        first = judge.submit(images, ["first"])
        assert begun.wait(5)
        images.fill_(0.5)  # the caller's buffer is its own again
        second = judge.submit(images, ["second"])
        assert second.result(5).item() == 0.5 and not first.done()
        go.set()
        assert [x.item() for x in judge.results()] == [0.25, 0.5]
        assert list(judge.results()) == []


def test_asynchronous_raises_what_the_judge_raised():
    with Asynchronous(constant(float("inf"), "wild")) as judge:
        judge.submit(noise(), PROMPTS)
        with pytest.raises(RunError, match="'wild' gave NaN or infinity for 3 of 3"):
            list(judge.results())
    with pytest.raises(InputError, match="workers=0"):
        Asynchronous(constant(1.0), workers=0)


# what every judge is held to


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 1), r"gave \(3, 1\) for 3 images"),
        (torch.zeros(2), r"gave \(2,\) for 3 images"),
        ([0.0, 0.0, 0.0], "gave list for 3 images"),
        (torch.tensor([0, torch.nan, torch.inf]), "NaN or infinity for 2 of 3"),
    ],
)
def test_a_result_that_is_not_n_finite_numbers_is_refused(given, message):
    with pytest.raises(RunError, match=message):
        checked(Named("odd", False, lambda *_: given))(noise(), PROMPTS)


def test_a_checked_result_is_float32():
    assert (
        checked(Named("b", False, lambda *_: torch.tensor([True, False, True])))(noise(), PROMPTS).dtype
        == torch.float32
    )
    assert checked(Named("d", False, lambda *_: torch.zeros(3).double()))(noise(), PROMPTS).dtype == torch.float32


def test_a_judge_that_claims_a_gradient_must_give_one():
    claimed = checked(Named("liar", True, lambda images, _: images.detach().mean((1, 2, 3))))
    with pytest.raises(RunError, match="'liar' is said to be differentiable"):
        claimed(noise().requires_grad_(), PROMPTS)
    assert claimed(noise(), PROMPTS).shape == (3,)


@pytest.mark.parametrize(("images", "prompts"), [(noise(), ["one"]), (noise()[0], ["one"]), (noise()[:, :1], PROMPTS)])
def test_images_and_prompts_must_fit(images, prompts):
    with pytest.raises(InputError, match=r"a reward reads \(n, 3, h, w\)"):
        checked(constant(1.0))(images, prompts)
