"""Rewards that need no server: exact and learned judges, pixel formulas, others' networks (tiny), and their sums."""

from __future__ import annotations

import fractions
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy
import pytest
import torch
from torch import Tensor

from experiments.tiny import word_tokenizer
from fieldsmith import rewards
from fieldsmith.errors import InputError, NotFiniteError, RewardError, RunError
from fieldsmith.rewards import Reward, load
from fieldsmith.rewards.learned import FOLDER
from fieldsmith.rewards.pretrained import CLIP_MEAN, CLIP_STD, linear_layers, preprocess
from fieldsmith.rewards.reward import check_images, score_batches, weighted
from fieldsmith.worlds import asked
from fieldsmith.worlds.shapes import PALETTE, ShapesWorld, caption, concepts
from tests.drawn import seeded

WORLD = ShapesWorld(32)
ASKED = asked.load("shapes", 32)
WORDS = ("a", "red", "blue", "square", "circle")
PROMPTS = ["a red square", "a blue circle", "a red circle"]


def drawn(copies: int = 5) -> tuple[Tensor, list[str]]:
    asked = concepts() * copies
    return WORLD.render(asked, seeded(0)), [caption(concept) for concept in asked]


def noise(n: int = 3, height: int = 40, width: int = 52) -> Tensor:
    return torch.rand(n, 3, height, width, generator=seeded(1))


# what the command line's --reward means


def test_the_package_is_light():
    script = "import fieldsmith.rewards, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules) or 'light')"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert output.stdout.strip() == "light", output.stdout + output.stderr


def test_a_sum_is_the_weighted_sum_of_its_parts():
    images, prompts = drawn(1)
    total = load("0.7*right + 0.3*brightness+-2*colour:red", ASKED)
    parts = [load(name, ASKED)(images, prompts) for name in ("right", "brightness", "colour:red")]
    torch.testing.assert_close(total(images, prompts), 0.7 * parts[0] + 0.3 * parts[1] - 2 * parts[2])
    assert total.name == "0.7*right+0.3*brightness+-2*colour:red"


@pytest.mark.parametrize(
    ("words", "terms"),
    [
        ("0.5*clip:/sac+logos+ava1+0.3*right", [(0.5, "clip", "/sac+logos+ava1"), (0.3, "right", None)]),
        ("right-0.1*brightness", [(1, "right", None), (-0.1, "brightness", None)]),
        ("-right+-2*colour:red", [(-1, "right", None), (-2, "colour", "red")]),
        ("jpeg-size-classifier-heldout", [(1, "jpeg-size", None), (-1, "classifier-heldout", None)]),
        ("clip:/a/clip-valid - valid", [(1, "clip", "/a/clip-valid"), (-1, "valid", None)]),
        ("clip:org/clip-vit-1e-3-.5*right", [(1, "clip", "org/clip-vit-1e-3"), (-0.5, "right", None)]),
        ("1e-3*right+json:dumps-json:loads", [(1e-3, "right", None), (1, "json", "dumps"), (-1, "json", "loads")]),
        ("remote:http://h:1/v1?model=a-b+1*valid", [(1, "remote", "http://h:1/v1?model=a-b"), (1, "valid", None)]),
    ],
)
def test_sums_are_cut_at_signs_that_are_in_no_path(words, terms):
    assert rewards.parse(words) == terms


def test_files_with_signs_in_their_names_are_part_of_a_sum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-judge.py").write_text("def dark(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    total = load("brightness-0.5*./my-judge.py:dark+my-judge.py:dark")
    torch.testing.assert_close(total(torch.full((2, 3, 4, 4), 0.25), ["a", "b"]), torch.full((2,), 0.25 + 0.375))


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
        ("no_such_package.module:function", "cannot be loaded: ModuleNotFoundError"),
        ("json:no_such", "'json' has no 'no_such'; name a function that it has"),
        ("json:dump_s", "did you mean 'dumps'"),
        ("json:JSONDecoder", "is a type, not a function"),
        ("nowhere/mine.py:score", "file 'nowhere/mine.py' does not exist"),
        ("colr:red", "did you mean 'colour'"),
        ("remote:ftp://host", "is no address of a judge"),
    ],
)
def test_what_is_no_reward_is_refused_in_a_sentence(spec, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|").replace("?", r"\?")):
        load(spec, ASKED)


@pytest.mark.parametrize("name", ["right", "shape", "colour", "valid", "count", "position:left"])
def test_a_judge_of_the_world_needs_the_world(name):
    with pytest.raises(InputError, match="is the judge of a world"):
        load(name)


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text("def dark(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for words in ("my_judges:dark", f"{tmp_path}/my_judges.py:dark"):
        judge = load(words)
        assert judge(torch.zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1]
        assert judge.name == words and not judge.differentiable


# exact judges


@pytest.mark.parametrize("name", ["right", "shape", "colour", "valid", "count"])
def test_judges_of_the_world_pass_its_renders(name):
    images, prompts = drawn()
    given = load(name, ASKED)(images, prompts)
    assert given.mean() >= 0.98 and set(given.tolist()) <= {0.0, 1.0}


def test_each_judge_reads_its_own_attribute():
    images, _ = drawn(1)
    asked = ["a red circle"] * len(images)
    given = {name: load(name, ASKED)(images, asked).sum().item() for name in ("right", "shape", "colour", "valid")}
    assert given == {"right": 1, "shape": 4, "colour": 6, "valid": 24}


def test_open_prompts_ask_only_for_a_valid_image():
    images, _ = drawn(1)
    assert load("right", ASKED)(images, [""] * 24).all()
    assert not load("right", ASKED)(torch.rand(3, 3, 32, 32, generator=seeded(2)), [""] * 3).any()


def test_two_pieces_are_not_one():
    image = torch.full((1, 3, 32, 32), 0.9)
    red = torch.tensor(PALETTE["red"])[:, None, None]
    judge = load("count", ASKED)
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
        assert bool(load(f"position:{half}", ASKED)(image, [""])) == (half in halves)
        assert not load(f"position:{half}", ASKED)(torch.full((1, 3, 32, 32), 0.9), [""])


@pytest.mark.parametrize("name", ["right", "count", "position:top", "jpeg-size"])
def test_black_boxes_refuse_images_that_hold_nan(name):
    images, prompts = drawn(1)
    images[3, 0, 0, 0] = torch.nan
    with pytest.raises(RunError, match="hold NaN"):
        load(name, ASKED)(images, prompts)


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
    judge = load(name)
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


def clip_folder(folder: pathlib.Path, words: tuple[str, ...] = WORDS, length: int = 8) -> pathlib.Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": len(words) + 5,
        "max_position_embeddings": length,
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
    word_tokenizer(words, length, bos=True).save_pretrained(folder)
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
    given = judge(images, PROMPTS)
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
    given = load(f"aesthetic:{folder}")(images, PROMPTS)
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
    given = judge(images, PROMPTS)
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


def test_batches_are_judged_while_the_next_is_made():
    made: list[int] = []
    first_judged = threading.Event()

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        if prompts[0] == "0":
            assert first_judged.wait(5)  # held until the second batch is made
        return images.mean((1, 2, 3))

    def batches():
        for i in range(3):
            made.append(i)
            if i == 1:
                first_judged.set()
            yield torch.full((2, 3, 2, 2), i / 4), [str(i)] * 2

    given = score_batches(load(judge), batches())
    assert given.tolist() == [0, 0, 0.25, 0.25, 0.5, 0.5] and made == [0, 1, 2]


def test_after_a_failure_no_further_batch_is_judged():
    asked: list[str] = []

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(prompts[0])
        time.sleep(0.2)
        raise KeyError("no key")

    with pytest.raises(RewardError, match="raised KeyError: 'no key'"):
        score_batches(load(judge), ((noise(1), [str(i)]) for i in range(9)))
    assert len(asked) < 4


def test_a_differentiable_reward_gives_no_graph_in_batches():
    images = noise().requires_grad_()
    assert not score_batches(load("brightness"), [(images, PROMPTS), (images, PROMPTS)]).requires_grad


# whatever a user's function does


def returning(output: object, name: str = "odd") -> Reward:
    return Reward(name, False, lambda images, prompts: output)


ZEROS = torch.zeros(3)


@pytest.mark.parametrize(
    "output",
    [
        [0, 0.5, 1], (False, True, 1), [torch.tensor(0.0), torch.tensor(0.5), torch.tensor(1)],
        numpy.array([0, 0.5, 1]), numpy.array([0, 0.5, 1], ">f4")[::1], list(numpy.array([0, 0.5, 1], numpy.float16)),
        torch.tensor([0, 0.5, 1]).double(), torch.tensor([0, 0.5, 1]).bfloat16(),
        [fractions.Fraction(0), fractions.Fraction(1, 2), 1],
    ],
    ids=lambda output: f"{type(output).__name__}",
)  # fmt: skip
def test_numbers_may_come_in_any_container(output):
    given = returning(output)(noise(), PROMPTS)
    assert given.dtype == torch.float32 and given.tolist()[::2] == [0, 1] and given[1] in (0.5, 1)


FIRST = r"for 3 images, the first of prompt 'a red square'; return one finite number an image"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(3, 1), rf"returned float32 of shape \(3, 1\) {FIRST}"),
        (torch.zeros(2), rf"returned float32 of shape \(2,\) {FIRST}"),
        (torch.zeros(()), rf"returned float32 of shape \(\) {FIRST}"),
        (numpy.zeros((3, 2)), rf"returned float64 of shape \(3, 2\) {FIRST}"),
        (numpy.zeros(4), rf"returned float64 of shape \(4,\) {FIRST}"),
        ([0.5, 0.5], rf"returned a list of 2 that begins with 0.5 {FIRST}"),
        ([], rf"returned a list of 0 {FIRST}"),
        ([[0.5], [0.5], [0.5]], "returned a list of 1 that begins with 0.5 for image 1 of 3, prompt 'a red square'"),
        ([0.5, None, 1], "returned None for image 2 of 3, prompt 'a blue circle'"),
        ([0.5, 1, "good"], "returned 'good' for image 3 of 3, prompt 'a red circle'"),
        (["good"] * 3, "returned 'good' for image 1 of 3"),
        (numpy.array(["a", "b", "c"]), rf"returned <U1 of shape \(3,\) {FIRST}"),
        ([0.5, 1j, 1], r"returned 1j for image 2 of 3"),
        (torch.zeros(3, dtype=torch.complex64), rf"returned complex64 of shape \(3,\) {FIRST}"),
        (numpy.zeros(3, complex), rf"returned complex128 of shape \(3,\) {FIRST}"),
        ([torch.zeros(1)] * 3, r"returned float32 of shape \(1,\) for image 1 of 3"),
        ([10**400, 0, 0], rf"returned a list of 3 that begins with 1.* {FIRST}"),
        (None, rf"returned None {FIRST}"), (0.5, rf"returned 0.5 {FIRST}"), ("good", rf"returned 'good' {FIRST}"),
        ({"score": 1}, rf"returned a value of type dict {FIRST}"),
        ({1, 2, 3}, rf"returned a value of type set {FIRST}"),
        ((x for x in (1, 2, 3)), rf"returned a value of type generator {FIRST}"),
        (object(), rf"returned a value of type object {FIRST}"),
        (torch.zeros(3, device="meta"), "returned float32"), (torch.zeros(3).to_sparse(), "returned float32"),
        (torch.tensor([0, torch.nan, torch.inf]), r"returned nan for image 2 of 3, prompt '.*' \(and 1 more\); return"),
        ([0, 1, float("inf")], "returned inf for image 3 of 3, prompt 'a red circle'; return"),
        (numpy.array([-numpy.inf, 0, 0]), "returned -inf for image 1 of 3"),
        (numpy.array([0, 1e300, 0]), r"returned 1e\+300 for image 2 of 3"),
    ],
)  # fmt: skip
def test_what_is_not_one_finite_number_an_image_is_refused(output, message):
    with pytest.raises(RewardError, match=f"^reward 'odd' {message}"):
        returning(output)(noise(), PROMPTS)


@pytest.mark.parametrize("error", [KeyError("colour"), SystemExit(1), RecursionError("deep"), OSError(28, "disk full")])
def test_what_a_function_raises_is_named_with_its_line_and_chained(error):
    def judge(images, prompts):
        raise error

    with pytest.raises(RewardError, match=r"^reward 'judge' raised") as caught:
        load(judge)(noise(), PROMPTS)
    line = judge.__code__.co_firstlineno + 1
    assert caught.value.__cause__ is error
    assert f"(test_rewards.py, line {line}) for 3 images, the first of prompt 'a red square'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_message_is_cut_to_one_line():
    def judge(images, prompts):
        raise ValueError("far too much\n" * 500)

    with pytest.raises(RewardError) as caught:
        load(judge)(noise(1), ["a"])
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_wrong_signature_is_refused_before_anything_runs():
    with pytest.raises(RewardError, match=r"reward 'one' takes \(images\), but it is called with \(images, prompts\)"):
        load(named("one", lambda images: images))
    with pytest.raises(RewardError, match="takes"):
        load(lambda images, prompts, model: 0)
    load(lambda *both: 0), load(lambda images, prompts, model=None: 0)
    with pytest.raises(InputError, match="reward 3 is a int, not a function"):
        load(3)


def named(name: str, function):
    function.__name__ = name
    return function


def test_a_function_may_say_its_name_and_that_it_is_differentiable():
    def bright(images, prompts):
        return images.mean((1, 2, 3))

    assert (load(bright).name, load(bright).differentiable) == ("bright", False)
    bright.name, bright.differentiable = "light", True
    one = load(bright)
    assert (one.name, one.differentiable) == ("light", True) and load(one) is one
    images = noise().requires_grad_()
    assert torch.autograd.grad(one(images, PROMPTS).sum(), images)[0].ne(0).all()


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_function_that_changes_its_images_or_prompts_changes_nothing(differentiable):
    def greedy(images, prompts):
        score = images.square().mean((1, 2, 3))
        images.zero_()
        prompts.clear()
        return score

    images, prompts = noise().requires_grad_(differentiable), list(PROMPTS)
    before = images.detach().clone()
    given = Reward("greedy", False, greedy)(images, prompts)
    assert torch.equal(images.detach(), before) and prompts == PROMPTS and not given.requires_grad
    if differentiable:

        def dims(images, prompts):
            images *= 0.5
            return images.mean((1, 2, 3))

        slope = torch.autograd.grad(Reward("dims", True, dims)(images, PROMPTS).sum(), images)[0]
        torch.testing.assert_close(slope, torch.full_like(slope, 0.5 / slope[0].numel()))
        assert torch.equal(images.detach(), before)


def test_what_a_function_keeps_and_changes_later_is_not_the_reward():
    kept = torch.zeros(3)
    judge = Reward("kept", False, lambda images, prompts: kept)
    given = judge(noise(), PROMPTS)
    kept.fill_(5)
    assert not given.any()


def test_images_that_hold_nan_are_not_the_rewards_fault():
    images = noise()
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(
        NotFiniteError, match=r"1 of 3 images hold NaN or infinity, which comes from the model and not from its judge"
    ) as caught:
        returning(ZEROS)(images, PROMPTS)
    assert not isinstance(caught.value, RewardError)
    with pytest.raises(NotFiniteError, match="hold NaN or infinity"):
        check_images(images)
    check_images(noise())


def test_our_own_sentences_pass_through_a_sum():
    with pytest.raises(RewardError, match=r"^reward 'odd' returned None"):
        weighted([(1, load("brightness")), (0.5, returning(None))])(noise(), PROMPTS)
    with pytest.raises(InputError, match="reads 32 x 32"):
        load("brightness+classifier")(noise(1), ["a ring"])


def test_a_result_has_the_precision_of_the_images_and_float32_at_least():
    judge = returning(torch.zeros(3, dtype=torch.float64))
    types = {dtype: judge(noise().to(dtype), PROMPTS).dtype for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    assert types == {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def test_no_images_are_no_question():
    assert returning(None)(noise(0), []).shape == (0,)


def test_a_judge_that_claims_a_gradient_must_give_one():
    claimed = Reward("liar", True, lambda images, _: images.detach().mean((1, 2, 3)))
    with pytest.raises(RewardError, match="'liar' is said to be differentiable"):
        claimed(noise().requires_grad_(), PROMPTS)
    assert claimed(noise(), PROMPTS).shape == (3,)


@pytest.mark.parametrize(("images", "prompts"), [(noise(), ["one"]), (noise()[0], ["one"]), (noise()[:, :1], PROMPTS)])
def test_images_and_prompts_must_fit(images, prompts):
    with pytest.raises(InputError, match=r"a reward reads \(n, 3, h, w\)"):
        returning(ZEROS)(images, prompts)
