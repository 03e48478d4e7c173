"""Images with labels: the digits, the shapes world by composition, folders of one's own, and the classifier of them."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.measure.classifier import train_classifier
from fieldsmith.worlds import classes
from fieldsmith.worlds.classes import Classes, digits, load, shapes
from fieldsmith.worlds.shapes import ShapesWorld, parse


@pytest.fixture(scope="module")
def few_shapes() -> Classes:
    """The world with a smaller pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classes, "POOL", 4_000)
        return shapes(16, 3)


def distinct(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


# digits


def test_the_digits_are_split_once_and_for_all():
    data = digits()
    assert data.images.shape == (1500, 1, 8, 8) and data.held_images.shape == (297, 1, 8, 8)
    assert data.names == tuple("0123456789") and data.name == "digits"
    assert data.labels.shape == (1500,) and data.held_labels.shape == (297,)
    assert not distinct(data.images) & distinct(data.held_images)
    assert float(data.images.min()) == 0 and float(data.images.max()) == 1
    assert int(torch.bincount(data.labels).min()) > 120 and int(torch.bincount(data.held_labels).min()) > 15
    again = load("digits", 8, 1, seed=7)
    assert torch.equal(again.images, data.images) and torch.equal(again.held_labels, data.held_labels)


def test_the_digits_carry_their_own_labels():
    from sklearn.datasets import load_digits

    found = load_digits()
    known = {
        (image / 16).astype(np.float32).tobytes(): label
        for image, label in zip(found.images, found.target, strict=True)
    }
    data = digits()
    for images, labels in ((data.images, data.labels), (data.held_images, data.held_labels)):
        assert [known[image[0].numpy().tobytes()] for image in images] == labels.tolist()


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (8, 3)])
def test_models_of_another_shape_cannot_have_the_digits(size, channels):
    with pytest.raises(InputError, match=f"8 x 8 with 1 channel; this model takes {size} x {size} with {channels}"):
        load("digits", size, channels)


# shapes


def test_the_shapes_judge_reads_what_the_labels_say(few_shapes):
    data, world = few_shapes, ShapesWorld(16)
    assert len(data.names) == 24 and data.names[0] == "red circle" and data.names[-1] == "yellow star"
    assert data.images.shape == (4000, 3, 16, 16) and data.held_images.shape == (800, 3, 16, 16)
    for label, name in enumerate(data.names):
        rows = data.held_labels == label
        assert int(rows.sum()) > 10  # the composition that captions leave out is among them
        seen = world.judge(data.held_images[rows])
        assert float(seen.shows(parse(name)).float().mean()) > 0.85, name


def test_shapes_that_are_held_out_are_new_and_follow_from_the_seed(few_shapes, monkeypatch):
    monkeypatch.setattr(classes, "POOL", 200)
    first, again, other = shapes(16, 3), load("shapes", 16, 3), load("shapes", 16, 3, seed=1)
    assert torch.equal(first.images, again.images) and torch.equal(first.held_labels, again.held_labels)
    drawn = [distinct(part) for data in (first, other) for part in (data.images, data.held_images)]
    assert sum(map(len, drawn)) == len(set.union(*drawn)) == 2 * (200 + 40)


def test_models_of_another_shape_cannot_have_the_shapes():
    with pytest.raises(InputError, match="has 3 channels; this model takes 1"):
        load("shapes", 16, 1)
    with pytest.raises(InputError, match="size=8: the shapes world is drawn and judged at 16 or 32 pixels"):
        load("shapes", 8, 3)


# folders


LEVELS = {"cat": 20, "dog": 160}


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two classes of nine plain images, each of its own colour."""
    for name, level in LEVELS.items():
        (tmp_path / name).mkdir()
        for i, suffix in enumerate((".png", ".PNG", ".bmp") * 3):
            pixels = np.full((12, 20, 3), 0, np.uint8) + np.array([level + 5 * i, level, 10], np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}{suffix}")
        (tmp_path / name / "notes.txt").write_text("not an image")
    (tmp_path / "readme.txt").write_text("neither a class")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_read_with_a_class_a_subfolder(pictures, channels):
    data = load(str(pictures), 8, channels)
    assert data.names == ("cat", "dog") and data.name == str(pictures)
    assert data.images.shape == (16, channels, 8, 8) and data.held_labels.tolist() == [0, 1]
    together, labels = torch.cat((data.images[:], data.held_images[:])), torch.cat((data.labels, data.held_labels))
    assert labels.bincount().tolist() == [9, 9]
    assert len(distinct(together)) == 18  # none twice: what is held out is not trained on
    level = together[:, 0].mean((1, 2)) * 255
    assert bool((level[labels == 0] < 70).all() and (level[labels == 1] > 130).all())
    if channels == 3:  # channels stay apart
        torch.testing.assert_close(together[:, 2], torch.full_like(together[:, 2], 10 / 255))
    again = load(pictures, 8, channels)
    assert torch.equal(again.images[:], data.images[:]) and torch.equal(again.held_labels, data.held_labels)


def test_every_class_is_in_both_parts_however_few_its_images(tmp_path):
    for name, n in (("many", 40), ("two", 2), ("seven", 7)):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("L", (4, 4), i).save(tmp_path / name / f"{i:02}.png")
    data = load(str(tmp_path), 4, 1)
    assert data.names == ("many", "seven", "two")
    assert data.labels.bincount().tolist() == [34, 6, 1] and data.held_labels.bincount().tolist() == [6, 1, 1]


def test_places_in_an_image_stay_where_they_are(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[1, 6] = (255, 128, 0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    image = load(str(tmp_path), 8, 3).images[:1][0]
    assert image[:, 1, 6].tolist() == pytest.approx([1, 128 / 255, 0]) and float(image.sum()) == pytest.approx(
        383 / 255
    )


def test_folders_that_cannot_be_data_are_refused(pictures, tmp_path):
    def refused(path: pathlib.Path | str) -> str:
        with pytest.raises(InputError) as refusal:
            load(str(path), 8, 1)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    assert "data 'digitz' is no folder; give digits, shapes, fashion, or a folder" in refused("digitz")
    assert "is no folder" in refused(pictures / "readme.txt")
    assert f"data folder '{pictures / 'cat'}' has no subfolders" in refused(pictures / "cat")
    (pictures / "owl").mkdir()
    assert f"class 'owl' in '{pictures}' has 0 images; it needs at least 2" in refused(pictures)
    for name in ("1.png", "2.png"):
        (pictures / "owl" / name).write_bytes(b"no image")
    assert "1.png' cannot be read (it is no image); remove it" in refused(pictures)


# the classifier


def test_a_classifier_reads_held_out_digits():
    data = digits()
    before = torch.random.get_rng_state()
    judge = train_classifier(data.images, data.labels, data.name, steps=150, batch=64)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert float((judge.read(data.held_images) == data.held_labels).float().mean()) > 0.95
    assert judge(data.held_images).shape == (297, 64) and "digits" in judge.name
    assert not any(p.requires_grad for p in (*judge.body.parameters(), *judge.head.parameters()))


def test_a_classifier_reads_held_out_shapes(few_shapes):
    data = few_shapes
    judge = train_classifier(data.images, data.labels, data.name, steps=250, batch=64, lr=1e-2)
    assert float((judge.read(data.held_images) == data.held_labels).float().mean()) > 0.95


def test_the_seed_decides_a_classifiers_features():
    data = digits()
    first, again, other = (
        train_classifier(data.images, data.labels, "digits", steps=4, batch=16, seed=seed)(data.held_images)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-2)
