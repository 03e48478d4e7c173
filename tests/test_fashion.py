"""Fashion-MNIST: its four files, read from a folder; the recipes that train on it; the committed classifier."""

from __future__ import annotations

import gzip
import json
import pathlib
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.__main__ import main as experiment
from fieldsmith import cli
from fieldsmith.errors import InputError
from fieldsmith.measure.classifier import load_classifier, train_classifier
from fieldsmith.measure.sweep import Sweep
from fieldsmith.models import load as load_model
from fieldsmith.pictures import levels
from fieldsmith.worlds import classes, fashion
from fieldsmith.worlds.classes import fashion_mnist


def idx(numbers: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{numbers.ndim}I", 0, 8, numbers.ndim, *numbers.shape)
    return gzip.compress(header + numbers.tobytes())


def write(folder: pathlib.Path, first: list[int] = fashion.FIRST) -> pathlib.Path:
    """Files of the same format and labels, in which a class is a grey level: 40 images to train on, 20 to test on."""
    folder.mkdir(exist_ok=True)
    for part, labels in (("train", first + [i % 10 for i in range(32)]), ("t10k", [i % 10 for i in range(20)])):
        of = np.array(labels, np.uint8)
        images = np.broadcast_to(of[:, None, None] * 25, (len(of), 28, 28))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(of))
    return folder


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / "fashion")


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (16, 1), (28, 3)])
def test_its_files_are_read_at_any_size(folder, size, channels):
    for data in (fashion_mnist(folder, size, channels), classes.load(str(folder), size, channels)):
        assert data.name == "fashion" and data.names == fashion.NAMES and len(data.names) == 10
        assert data.images.shape == (40, channels, size, size) and data.held_images.shape == (20, channels, size, size)
        assert data.labels[:8].tolist() == fashion.FIRST
        for images, labels in ((data.images, data.labels), (data.held_images, data.held_labels)):
            assert torch.equal((images[:] * 255).round().flatten(1).unique(dim=1), labels[:, None].float() * 25)
        assert (data.classifier is not None) == ((size, channels) == (28, 1))


def test_pixels_stay_where_they_are(folder):
    image = np.arange(28 * 28, dtype=np.uint16).reshape(28, 28).astype(np.uint8)
    images = np.broadcast_to(image, (40, 28, 28))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(idx(images))
    seen = fashion_mnist(folder).images[torch.tensor([3])]
    assert torch.equal((seen[0, 0] * 255).round().to(torch.uint8), torch.from_numpy(image))


def test_other_and_damaged_files_are_refused(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="another data set than Fashion-MNIST"):
        fashion_mnist(write(tmp_path / "mnist", [5, 0, 4, 1, 9, 2, 1, 3]))
    file = folder / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for content, says in (
        (whole[:-20], "cannot be read .*; install Debian's dataset-fashion-mnist, or give the folder"),
        (b"no gzip", "cannot be read"),
        (idx(np.zeros((20, 27, 28), np.uint8)), "is not Fashion-MNIST's; fetch it again"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "is not Fashion-MNIST's"),
        (None, "No such file or directory.; install"),
    ):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=says):
            fashion_mnist(folder)
        if content is None:
            break
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "nowhere")
    assert cli.main(["distill", "--data", "fashion", "--steps", "2", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "nowhere/train-images-idx3-ubyte.gz' cannot be read (No such file" in said and "Traceback" not in said


def test_its_recipes_train_and_say_what_they_made(folder, tmp_path, capsys):
    out = tmp_path / "judge"
    words = ["pretrain", "fashion-classifier", "--folder", str(folder), "--steps", "30", "--batch", "16"]
    assert experiment([*words, "--out", str(out)]) == 0
    card = json.loads((out / "card.json").read_text())
    assert card["right on the test set"]["n"] == 20 and set(card["by class"]) == set(fashion.NAMES)
    assert "folder" not in card["settings"] and str(tmp_path) not in (out / "card.json").read_text()
    data = fashion_mnist(folder)
    kept = load_classifier(out, "fashion")
    share = float((kept.read(data.held_images) == data.held_labels).float().mean())
    assert pytest.approx(share) == card["right on the test set"]["value"] > 0.2  # of ten classes, after 30 steps
    words = ["pretrain", "fashion-unet", "--folder", str(folder), "--steps", "2", "--batch", "4", "--widths", "8", "16"]
    assert experiment([*words, "--out", str(tmp_path / "teacher")]) == 0
    teacher = load_model(str(tmp_path / "teacher" / "model"))
    assert teacher.classes == fashion.NAMES and teacher.size == (28, 28) and teacher.channels == 1
    card = json.loads((tmp_path / "teacher" / "model" / "card.json").read_text())
    assert card["data"] == "fashion" and "folder" not in card["settings"]
    assert experiment(["pretrain", "fashion-classifier", "--folder", "gone", "--out", str(tmp_path / "x")]) == 2
    assert "give the folder of Fashion-MNIST's four .gz files" in capsys.readouterr().err


def test_a_classifier_that_was_saved_is_the_same(folder, tmp_path):
    data = fashion_mnist(folder)
    made = train_classifier(data.images, data.labels, "fashion", steps=3, batch=8)
    made.save(tmp_path)
    kept = load_classifier(tmp_path, "fashion")
    assert kept.name == made.name and torch.equal(kept(data.held_images), made(data.held_images))
    assert torch.equal(kept.read(data.held_images), made.read(data.held_images))
    assert not any(p.requires_grad for part in (kept.body, kept.head) for p in part.parameters())


# the committed classifier


def sheet() -> tuple[torch.Tensor, torch.Tensor]:
    """100 photographs of the test set, a row a class: images (100, 1, 28, 28) in [0, 1] and labels."""
    with Image.open(pathlib.Path(__file__).parent / "fashion.png") as image:
        pixels = levels(image)[0].float() / 255
    return pixels.unflatten(0, (10, 28)).unflatten(2, (10, 28)).transpose(1, 2).reshape(100, 1, 28, 28), torch.arange(
        100
    ) // 10


def test_the_committed_classifier_reads_photographs_that_it_never_saw():
    images, labels = sheet()
    judge = load_classifier(fashion.CLASSIFIER, "fashion")
    card = json.loads((fashion.CLASSIFIER / "card.json").read_text())
    tested = card["right on the test set"]
    assert tested["value"] > 0.91 and tested["n"] == 10_000
    # the sheet is the first ten of each class, neither easy nor hard
    assert float((judge.read(images) == labels).float().mean()) >= 0.85
    assert judge(images).shape == (100, 64) and card["parameters"] < 150_000


def test_a_sweep_is_judged_by_the_committed_classifier(folder):
    data = fashion_mnist(folder)
    sweep = Sweep(data, None, images=10)
    images, _ = sheet()
    assert sweep.judge_name == "classifier of fashion, 64 features" and sweep.real.shape == (60, 64)
    scores = sweep.scores(images[::10], images[::10])
    assert scores["accuracy"] >= 0.7 and scores["drift"] == 0
    assert torch.equal(sweep.judge.read(images), load_classifier(fashion.CLASSIFIER, "fashion").read(images))
