"""Judges that packages, folders, servers and users bring: each beside a direct computation, and what is refused."""

from __future__ import annotations

import pathlib

import numpy
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fieldsmith import concepts, rewards
from fieldsmith.errors import InputError, RewardError
from fieldsmith.measure import detect
from fieldsmith.measure.detect import NUDE, Pictures, Prompt, Seen, agreement
from fieldsmith.rewards import ocr
from fieldsmith.rewards.pretrained import load_clip
from tests.test_rewards import clip_folder
from tests.test_rewards_remote import Server, completion, server  # noqa: F401  (a fixture)

NAMES = ["red circle", "blue square", "red square"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return clip_folder(tmp_path_factory.mktemp("judges") / "clip")


def classifier_folder(folder: pathlib.Path) -> pathlib.Path:
    """A tiny random ViT that names three of ImageNet's classes."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    labels = {0: "tench, Tinca tinca", 1: "English springer", 2: "church, church building"}
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        id2label=labels, label2id={name: place for place, name in labels.items()},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return classifier_folder(tmp_path_factory.mktemp("judges") / "vit")


def pictures(n: int = 3, side: int = 40) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(3))


def written(words: str, size: int = 40) -> Tensor:
    """Black words on white, (1, 3, 128, 256)."""
    image = Image.new("RGB", (256, 128), "white")
    ImageDraw.Draw(image).text((16, 40), words, fill="black", font=ImageFont.load_default(size))
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None] / 255


def test_clip_is_the_softmax_over_the_names(clip):
    from transformers import CLIPImageProcessorPil, CLIPModel

    images, judge = pictures(), detect.load(f"clip:{clip}?template=a {{}}&threshold=0.4")
    loaded = load_clip("a test", str(clip))
    scores = judge.score(images, NAMES)
    model = CLIPModel.from_pretrained(clip)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(
        list((images * 255).round().byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt"
    )["pixel_values"]
    tokens = loaded.tokenizer([f"a {name}" for name in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        direct = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
        ).logits_per_image.softmax(1)
    assert torch.allclose(scores, direct, atol=2e-3) and judge.threshold == 0.4
    assert (scores.argmax(1) == direct.argmax(1)).all()


def test_a_classifier_is_its_own_processor_and_network_and_has_several_names_a_class(classifier):
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    judge, images = detect.load(f"classifier:{classifier}"), pictures()
    assert judge.known("a Tench") == judge.known("tinca tinca") == "tench, Tinca tinca"
    pixels = ViTImageProcessorPil.from_pretrained(classifier)(
        list((images * 255).round().byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        direct = ViTForImageClassification.from_pretrained(classifier)(pixel_values=pixels).logits.softmax(1)
    assert torch.equal(judge.score(images, judge.names[:2]), direct[:, :2])
    with pytest.raises(InputError, match="'terrier' is not in the vocabulary of what judge 'classifier:"):
        judge.known("terrier")


def test_nudenet_is_asked_as_it_asks_itself_and_counts_the_papers_classes(tmp_path, monkeypatch):
    nudenet = pytest.importorskip("nudenet")
    judge, image = detect.load("nudenet"), pictures(1, 64)
    assert judge.threshold == 0.6 and len(judge.names) == 9
    assert judge.known("a naked woman") == judge.known("nudity") == "nudity"
    assert judge.known("belly exposed") == "belly exposed"
    file = tmp_path / "image.png"
    Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    given = []
    boxes = [
        {"class": NUDE[1], "score": 0.7}, {"class": NUDE[1], "score": 0.4}, {"class": "FACE_FEMALE", "score": 0.9},
        {"class": NUDE[4], "score": 0.3},
    ]  # fmt: skip
    monkeypatch.setattr(nudenet.NudeDetector, "detect", lambda self, pixels: given.append(pixels) or boxes)
    assert judge.score(image, ["nudity", "belly exposed", "feet exposed"])[0].tolist() == pytest.approx([0.7, 0.7, 0])
    from nudenet.nudenet import _read_image

    assert numpy.array_equal(_read_image(given[0])[0], _read_image(str(file))[0])  # the channels' order of a file


def test_nudenet_sees_nothing_in_noise():
    pytest.importorskip("nudenet")
    assert detect.load("nudenet").score(pictures(2, 64), ["nudity"]).max() < 0.6


def test_words_are_read_and_scored_by_their_letters():
    pytest.importorskip("rapidocr")
    judge, images = detect.load("ocr"), torch.cat([written("STOP HERE"), written("OPEN"), torch.ones(1, 3, 128, 256)])
    assert judge.known('a sign that says "Stop"') == "Stop" and judge.known("text") == "text"
    scores = judge.score(images, ["Stop", "open", "text"])
    assert (scores >= judge.threshold).tolist() == [[True, False, True], [False, True, True], [False] * 3]
    with pytest.raises(InputError, match="cannot see 'a cat'"):
        judge.known("a cat")
    score = rewards.load("ocr")
    assert score(images[:2], ['the word "stop here"', "the word 'closed'"]).tolist()[0] == 1
    with pytest.raises(InputError, match="prompt 'a sign' has none"):
        score(images[:1], ["a sign"])


@pytest.mark.parametrize(
    ("lines", "words", "value"),
    [(["NO ENTRY"], "entry", 1), (["NO EN", "TRY"], "no entry", 1), (["STOB"], "stop", 0.75), ([], "stop", 0),
     (["abc"], "…", 0)],
)  # fmt: skip
def test_letters_are_counted_without_case_spaces_and_line_ends(lines, words, value):
    assert ocr.score([(line, 0.9) for line in lines], words) == pytest.approx(value)


def test_a_remote_model_is_asked_yes_or_no_about_what_an_image_was_asked_for_alone(server: Server):  # noqa: F811
    server.answer = lambda body, n: completion(
        "Yes." if "circle" in body["messages"][0]["content"][1]["text"] else "no"
    )
    judge = detect.load(f"remote:{server.base}?model=eye&pause=0.01&timeout=5")
    asked = [Prompt("a red circle", "red circle"), Prompt("a square", "blue square"), Prompt("circles", "red circle")]
    seen = Pictures(judge, ("red circle", "blue square")).judge(pictures())
    assert seen.answers(asked).tolist() == [True, False, True] and len(server.bodies) == 3
    assert server.bodies[0]["messages"][0]["content"][1]["text"].startswith("Does this image show: red circle?")
    assert seen.names() == ["red circle", "none of these", "red circle"] and len(server.bodies) == 3
    assert seen.shows("red circle").tolist() == [True] * 3 and len(server.bodies) == 4  # the one that was not asked


def test_a_function_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def shows(images, concepts):\n    return [concept == 'cat' for concept in concepts]\n\n\n"
        "shows.names = ('cat', 'dog')\n\n\ndef odd(images, concepts):\n    return [0.5]\n"
    )
    judge = detect.load(f"{file}:shows")
    assert judge.known("the Cat") == "cat" and judge.score(pictures(2), ["cat", "dog"]).tolist() == [[1, 0], [1, 0]]
    with pytest.raises(InputError, match="'cow' is not in the vocabulary of what judge"):
        judge.known("cow")
    with pytest.raises(RewardError, match=r"judge '.*mine.py:odd' returned a list of 1"):
        detect.load(f"{file}:odd").score(pictures(2), ["cat"])
    assert detect.load(lambda images, concepts: images.mean((1, 2, 3))).score(pictures(2), ["x"]).shape == (2, 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("nudnet", "'nudnet' is not in the vocabulary of judges; did you mean 'nudenet'"),
        ("clip", "judge 'clip' needs a folder or a hub id; write clip:FOLDER"),
        ("clip:nowhere", "the folder 'nowhere' of judge 'clip' does not exist"),
        ("clip:{clip}?template=a photo", "template 'a photo' of judge 'clip' should have one {{}}"),
        ("clip:{clip}?threshold=high", "threshold=high of judge"),
        ("clip:{clip}?treshold=1", "did you mean 'threshold'"),
        ("classifier:{clip}", "'{clip}' of judge 'classifier' is not what it needs|is no whole"),
        ("nudenet:{junk}", "the detector {junk} is damaged or no NudeNet"),
        ("ocr:fast", "judge 'ocr' takes no argument"),
        ("remote:localhost", "'localhost' is no address of a judge"),
        ("absent.py:shows", "judge 'absent.py:shows' cannot be loaded"),
    ],
)
def test_what_is_no_judge_is_refused_in_a_sentence(clip, tmp_path, words, sentence):
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"\x08\x07\x12\x0etruncated")
    if "nudenet:" in words:
        pytest.importorskip("nudenet")
    if "ocr" in words:
        pytest.importorskip("rapidocr")
    with pytest.raises(InputError) as refused:
        detect.load(words.format(clip=clip, junk=junk))
    said = str(refused.value)
    assert any(part.format(clip=clip, junk=junk) in said for part in sentence.split("|")) and "\n" not in said


def test_a_package_that_is_missing_is_named(monkeypatch):
    import sys

    for package, judge in (("nudenet", "nudenet"), ("rapidocr", "ocr")):
        monkeypatch.setitem(sys.modules, package, None)
        ocr.engine.cache_clear()
        with pytest.raises(InputError, match=rf"needs the package {package}; pip install fieldsmith\[judges\]"):
            detect.load(judge)


def test_blank_images_are_invalid_and_labels_are_places_among_all_names():
    judge = detect.load(
        lambda images, concepts: [float(image[0].mean()) if concepts[0] == "b" else 0 for image in images]
    )
    images = torch.stack([torch.full((3, 8, 8), 0.9), pictures(1, 8)[0], torch.zeros(3, 8, 8)])
    seen = Seen(judge, images, ("a", "b"))
    assert seen.valid.tolist() == [False, True, False]
    assert seen.shows("b").tolist()[0] and seen.labels().tolist()[::2] == [2, 0]


def test_agreement_is_of_those_that_show_it_and_of_those_that_do_not():
    truth, said = torch.tensor([True] * 4 + [False] * 6), torch.tensor([True] * 3 + [False] * 6 + [True])
    found = agreement(said, truth)
    assert found["agrees"].value == 0.8 and found["sees it where it is"].value == 0.75
    assert found["sees it where it is not"].value == pytest.approx(1 / 6)
    assert agreement(said[:4], truth[:4])["sees it where it is not"] is None


# lists of concepts


def test_lists_have_what_their_papers_have():
    sizes = {"imagenette": 10, "i2p": 7, "unlearncanvas-objects": 20, "unlearncanvas-styles": 50}
    assert {name: len(concepts.load([name])) for name in sizes} == sizes
    assert set(concepts.PACKAGED) == {*sizes, "styles", "celebrities"}
    assert "horses" in concepts.around("a cat") and "cats" not in concepts.around("a cat")
    assert not concepts.around("a teapot")


def test_a_list_with_doubles_or_without_concepts_is_refused(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("# mine\na cat\ndog\nCat\n")
    for words, sentence in (
        ([str(file)], "'Cat' stands twice in concept list"), (["dog", "a dog"], "'a dog' stands twice in neighbours"),
        (["celebrities"], "concept list 'celebrities' names no concept; copy"), (["absent.txt"], "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            concepts.load(words)
    file.write_text("# mine\na cat\ndog\n")
    assert concepts.load([str(file)]) == ("a cat", "dog")
