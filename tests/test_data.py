"""Folders, captions, datasets and lists of images: what is taken, skipped and refused, and that it is read lazily."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fieldsmith as fs
from experiments.tiny import flux_pipeline, unet_pipeline
from fieldsmith import data, pictures
from fieldsmith.api import distill_inputs, sharpen_inputs
from fieldsmith.cli import main
from fieldsmith.data import load
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.distill.bank import sample_of
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.models.flux import Flux
from fieldsmith.models.unet import UNet
from fieldsmith.pictures import Frame, encoded
from fieldsmith.sessions import UserSessions, frame_of
from fieldsmith.worlds import classes

FRAME = Frame(8)


def save(file: pathlib.Path, level: int = 0, size: tuple[int, int] = (8, 8)) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(file)
    return file


def levels(found: data.Data) -> list[int]:
    return (found.images[:][:, 0, 0, 0] * 255).round().int().tolist()


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as refusal:
        load(*arguments, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# folders


def test_a_folder_is_read_by_name_and_what_is_no_image_is_counted(tmp_path, capsys):
    for i, name in enumerate(("b.PNG", "a.jpg", "deep/c.webp", "deep/d.gif", "e.tif", "f.bmp")):
        save(tmp_path / name, 20 * i)
    for name in ("._a.jpg", ".DS_Store", "notes.txt", ".git/config", ".thumbs/x.png", "list.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    found = load(tmp_path, FRAME)
    assert levels(found) == pytest.approx([20, 0, 40, 60, 80, 100], abs=2)
    assert found.captions == () and found.name == str(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{tmp_path}: 6 files skipped, being hidden or no images (.DS_Store, ._a.jpg, .git/config, ...)"]


def test_animated_files_are_told(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (250, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    save(tmp_path / "b.png", 7)
    assert levels(load(tmp_path, FRAME)) == pytest.approx([250, 7], abs=2)
    assert "1 files animated, of which the first frame is taken (a.gif)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.tif", "cut.bmp", "text.png"])
def test_a_damaged_file_is_refused_before_anything_is_read(tmp_path, name, monkeypatch):
    save(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"text" if name == "text.png" else content[: len(content) // 2])
    monkeypatch.setattr(pictures, "read", None)
    assert f"'{tmp_path / name}' cannot be read (" in refused(tmp_path, FRAME)


def test_whole_files_are_not_decoded_to_be_looked_at(tmp_path, monkeypatch):
    for name in ("a.png", "b.jpg"):
        save(tmp_path / name)
    with (tmp_path / "b.jpg").open("ab") as file:
        file.write(bytes(8))  # some cameras pad
    seen: list[bool] = []
    monkeypatch.setattr(data, "look", lambda file, what=None, decode=False: seen.append(decode))
    load(tmp_path, FRAME)
    assert seen == [False, False]


def test_folders_without_images_are_refused(tmp_path):
    assert f"data '{tmp_path / 'gone'}' is no folder" in refused(tmp_path / "gone", FRAME)
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert "a.png' cannot be read (No such file or directory); remove" in refused(tmp_path, FRAME)
    (tmp_path / "a.png").unlink()
    assert f"folder '{tmp_path}' holds no images; put some there: .png, " in refused(tmp_path, FRAME)
    (tmp_path / "a.txt").write_text("a cat")
    assert "holds no images (but 1 other files, such as 'a.txt')" in refused(str(tmp_path), FRAME, captioned=True)


# captions


def test_captions_come_from_the_folder_that_an_image_lies_in(tmp_path):
    for name in ("owl/1.png", "cat/2.png", "cat/deep/3.png"):
        save(tmp_path / name, int(pathlib.Path(name).stem))
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no caption")
    (tmp_path / "pup").symlink_to(tmp_path / "owl")
    found = load(tmp_path, FRAME, captioned=True)
    assert found.captions == ("cat", "cat", "owl", "pup") and found.classes == ("cat", "empty", "owl", "pup")
    assert levels(found) == [2, 3, 1, 1]


def test_captions_come_from_a_text_beside_each_image(tmp_path, capsys):
    for name, words in (("a", "a cat"), ("deep/b.c", "zwei Hündchen\r\n")):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(words.encode())
    found = load(tmp_path, FRAME, captioned=True)
    assert found.captions == ("a cat", "zwei Hündchen") and found.classes == ()
    assert capsys.readouterr().err == ""
    save(tmp_path / "c.png")
    assert f"1 of 3 images have no caption, such as '{tmp_path / 'c.png'}'; add a .txt file" in refused(
        tmp_path, FRAME, captioned=True
    )
    assert len(load(tmp_path, FRAME).images) == 3  # nobody asked
    (tmp_path / "c.txt").write_text(" \n")
    assert f"caption '{tmp_path / 'c.txt'}' is empty; write what" in refused(tmp_path, FRAME, captioned=True)
    (tmp_path / "c.txt").rename(tmp_path / "d.txt")
    assert f"caption '{tmp_path / 'd.txt'}' has no image beside it" in refused(tmp_path, FRAME, captioned=True)
    (tmp_path / "d.txt").unlink()
    (tmp_path / "c.txt").write_bytes(b"\xff")
    assert "is not UTF-8" in refused(tmp_path, FRAME, captioned=True)


def test_captions_come_from_metadata_of_each_folder_first(tmp_path):
    for i, name in enumerate(("a.png", "deep/b.png", "deep/c.png")):
        save(tmp_path / name, i)
    (tmp_path / "a.txt").write_text("not this")
    lines = [{"file_name": "a.png", "text": "a cat", "size": 3}]
    deep = [{"file_name": "./c.png", "caption": "an owl"}, {"file_name": "b.png", "label": 7}]

    def write(file: pathlib.Path, rows: list[Any]) -> None:
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")

    write(tmp_path / "metadata.jsonl", lines)
    write(tmp_path / "deep" / "metadata.jsonl", deep)
    for folder in (tmp_path, tmp_path / "deep" / ".."):
        found = load(folder, FRAME, captioned=True)
        assert found.captions == ("a cat", "7", "an owl") and levels(found) == [0, 1, 2]
    for rows, says in (
        ([*lines, {"file_name": "z.png", "text": "?"}], "image 'z.png' of line 2 of .* does not exist; add it or"),
        ([{"file_name": "a.png"}], "line 1 of .* lacks a file_name or a text or caption or label; write"),
        ([{"text": "a cat"}], "line 1 of .* lacks a file_name"),
        ([[]], "line 1 of .* is no JSON object"),
        ([], "1 of 3 images have no caption, such as '.*a.png'; add a line of metadata.jsonl"),
    ):
        write(tmp_path / "metadata.jsonl", rows)
        with pytest.raises(InputError, match=says):
            load(tmp_path, FRAME, captioned=True)


def test_a_folder_without_captions_is_refused_where_they_are_needed(tmp_path):
    save(tmp_path / "a.png")
    assert f"data folder '{tmp_path}' has no subfolders; put" in refused(tmp_path, FRAME, captioned=True)
    save(tmp_path / "cat" / "b.png")
    assert f"image '{tmp_path / 'a.png'}' lies in no class's folder" in refused(tmp_path, FRAME, captioned=True)
    for split in ("train", "test"):
        save(tmp_path / "splits" / split / "cat" / "c.png")
    said = refused(tmp_path / "splits", FRAME, captioned=True)
    assert f"has the splits test, train; give '{tmp_path / 'splits' / 'train'}'" in said


# in Python


class Dataset:
    """What of `datasets.Dataset` is used: columns, features with names of labels, rows by number."""

    def __init__(self, **columns: list[Any]):
        self.columns, self.column_names, self.asked = columns, list(columns), []
        self.features = {"label": SimpleNamespace(names=["cat", "dog", "owl"]), "image": object()}

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, key: int | str) -> Any:
        self.asked.append(key)
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}


def flat(level: int) -> Image.Image:
    return Image.new("L", (8, 8), level)


def test_a_dataset_gives_its_images_one_by_one_and_the_names_of_its_labels():
    dataset = Dataset(img=[flat(i) for i in range(10)], label=[2, 0] * 5)
    found = load(dataset, FRAME, captioned=True)
    assert found.captions == ("owl", "cat") * 5 and found.classes == ("cat", "dog", "owl")
    assert set(dataset.asked) == {0, "label"}  # no image but the first was decoded
    assert (found.images[torch.tensor([7])] * 255).unique().tolist() == [7] and 7 in dataset.asked
    written = Dataset(image=[flat(1)] * 2, text=["a cat", "two cats"], label=[0, 1])
    assert load(written, FRAME, captioned=True).captions == ("a cat", "two cats")
    assert load(Dataset(image=[flat(1)]), FRAME).captions == ()
    for column in ({"label": [0, -1]}, {"text": ["a cat", None]}):
        lacking = Dataset(image=[flat(1)] * 2, **column)
        assert f"image 2 of data has no {next(iter(column))}; leave" in refused(lacking, FRAME, captioned=True)


def test_datasets_that_cannot_be_drawn_from_are_refused():
    splits = SimpleNamespace(column_names={"train": ["image"], "test": ["image"]})
    assert "has the splits train, test; give one of them, as dataset['train']" in refused(splits, FRAME)
    assert "data is a dict; give a folder, a dataset, or a list" in refused({"a": 1}, FRAME)
    streams = SimpleNamespace(column_names=["image"], features={})
    assert "load it without streaming=True" in refused(streams, FRAME)
    assert "no images among its columns photo; name one 'image'" in refused(Dataset(photo=[flat(0)]), FRAME)
    assert "no captions among its columns image; name one 'text'" in refused(
        Dataset(image=[flat(0)]), FRAME, captioned=True
    )
    assert "data holds no images; give some" in refused(Dataset(image=[]), FRAME)


def test_lists_generators_and_dicts_are_taken(tmp_path):
    file = save(tmp_path / "a.png", 1)
    pairs = [(file, "cat"), (flat(2), "dog"), (np.full((9, 9), 3, np.uint8), 5), {"image": flat(4), "text": "owl"}]
    for source in (pairs, iter(pairs), (pair for pair in pairs), tuple(pairs)):
        found = load(source, FRAME, captioned=True)
        assert found.captions == ("cat", "dog", "5", "owl") and levels(found) == [1, 2, 3, 4]
    for source in ([str(file), flat(2)], torch.tensor([1, 2])[:, None, None, None].expand(2, 3, 8, 8) / 255):
        found = load(source, FRAME)
        assert levels(found) == [1, 2] and found.captions == ()
    exact = np.random.default_rng(0).random((2, 3, 8, 8)).astype(np.float32)
    for source in (list(exact), exact, list(torch.from_numpy(exact))):
        assert torch.equal(load(source, FRAME).images[:], torch.from_numpy(exact))
    assert "an image of shape (3, 8, 8) from -1 to 1; give tensors" in refused(
        [torch.eye(8).expand(3, 8, 8) * 2 - 1], FRAME
    )
    assert "an image of shape (3, 9, 9)" in refused([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], FRAME)
    assert "image 1 of data has no caption; give pairs" in refused([flat(1)], FRAME, captioned=True)
    assert "image 2 has only photo; give one under 'image'" in refused([flat(1), {"photo": flat(1)}], FRAME)
    assert "image 2 of mine has 1 x 1 pixels" in refused([flat(1), Image.new("L", (1, 1))], FRAME, name="mine")
    assert "image 'gone.png' cannot be read" in refused([file, "gone.png"], FRAME)
    assert refused([], FRAME) == refused(iter([]), FRAME) == "data holds no images; give some"


def test_a_generator_is_read_once_and_kept_small():
    def made() -> Iterator[tuple[Image.Image, str]]:
        for i in range(50):
            yield Image.new("RGB", (500, 500), (i, 0, 0)), str(i % 2)

    tracemalloc.start()
    found = load(made(), FRAME, captioned=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert levels(found) == list(range(50)) and peak < 3_000_000  # one image is 750,000 bytes


# classes


def pairs(**sizes: int) -> list[tuple[Image.Image, str]]:
    return [(flat(i), name) for name, n in sizes.items() for i in range(n)]


def test_captions_of_several_images_each_are_classes_and_others_are_free():
    named = classes.load(pairs(cat=7, dog=2), 8, 1)
    assert named.names == ("cat", "dog") and not named.free
    assert named.labels.tolist() == [0] * 6 + [1] and named.held_labels.tolist() == [0, 1]
    free = classes.load([(flat(i), f"cat number {i}") for i in range(13)], 8, 1)
    assert free.free and len(free.names) == 13 and len(free.held_images) == 2
    assert free.held_labels.tolist() == [5, 11] and (free.held_images[:] * 255)[:, 0, 0, 0].tolist() == [5, 11]
    with pytest.raises(InputError, match="class 'cat number 0' in 'data' has 1 images; it needs at least 2"):
        free.in_order(free.names)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"cat": 4}, "has one class only, 'cat', and guidance is between classes; add another one"),
        ({"cat": 4, "dog": 4}, "has 2 classes, the model 3: 'owl' is missing; add images of it"),
        ({"cat": 4, "dog": 4, "emu": 4}, "other classes than the model's 3: 'emu' is not among cat, dog, owl; call"),
    ],
)
def test_classes_that_are_not_the_teachers_are_refused_before_training(sizes, says, unet_folder, tmp_path, capsys):
    for image, name in pairs(**sizes):
        save(tmp_path / "data" / name / f"{image.getpixel((0, 0))}.png")
    words = ["distill", "--teacher", str(unet_folder), "--data", str(tmp_path / "data"), "--scale", "laptop"]
    assert main([*words, "--steps", "2", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and not (tmp_path / "out").exists()


# lazily, in verbs


def many(folder: pathlib.Path, n: int, size: int = 24) -> pathlib.Path:
    """n images, each of its own colour."""
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (size, size), (i % 256, i // 256, 0)).save(folder / f"{i:04}.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """2,000 images of 200 pixels: 240 MB once they are decoded. Read only."""
    return many(tmp_path_factory.mktemp("many") / "photos", 2_000, 200)


def test_a_folder_costs_its_names_until_it_is_read(photos):
    tracemalloc.start()
    found = load(photos, Frame(24))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.images) == 2_000 and peak / 2_000 < 1_000  # bytes


def test_memory_does_not_grow_with_a_folders_pixels(photos):
    """In a process of its own: of 240 MB that go by, what is kept stays (25 MB at 64 pixels), without holes."""
    script = """
import sys, psutil, torch
from fieldsmith import data, pictures
process, rows = psutil.Process(), torch.randperm(2_000)
for pictures.KEPT in (0, 2**28):
    states = pictures.encoded(data.load(sys.argv[1], pictures.Frame(64)).images, lambda images: images * 2 - 1)
    states[rows[:50]]
    before = process.memory_info().rss
    for some in rows.split(50):
        states[some]
    print((process.memory_info().rss - before) // 1_000_000)
"""
    run = subprocess.run([sys.executable, "-c", script, str(photos)], capture_output=True, text=True, check=True)
    nothing, everything = map(int, run.stdout.split())
    assert nothing < 40 and everything < 80


def test_training_begins_before_a_folder_is_read(photos, monkeypatch):
    read: list[Any] = []
    whole = pictures.read
    monkeypatch.setattr(pictures, "read", lambda image, *rest: [read.append(image), whole(image, *rest)][1])
    model = UNet(unet_pipeline(size=24, widths=(8, 8), attention=False, clip=True), "tiny")
    begun: list[int] = []
    fs.sharpen(
        model, photos, judge=lambda images: [True] * len(images), method="plain", steps=3, batch=8, samples=4,
        sampler_steps=2, callback=lambda step, log: begun.append(len(read)),
    )  # fmt: skip
    assert begun[0] <= 20 and begun[-1] <= begun[0] + 3 * 8  # what is looked at first, and a batch a step
    assert len(read) < 300  # with what is measured afterwards


def test_an_image_that_breaks_while_training_ends_the_run_with_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "KEPT", 0)
    folder = many(tmp_path / "photos", 8)
    model = UNet(unet_pipeline(size=24, widths=(8, 8), attention=False, clip=True), "tiny")

    def callback(step: int, log: dict[str, float]) -> None:
        if step == 2:
            for file in folder.iterdir():
                file.write_bytes(b"overwritten")

    settings = {"method": "plain", "steps": 5, "batch": 4, "samples": 0, "out": tmp_path / "run"}
    with pytest.raises(RunError, match=r"'.*\d.png' cannot be read \(it is no image\).*; the last good checkpoint"):
        fs.sharpen(model, folder, judge=lambda images: [True] * len(images), callback=callback, **settings)
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == "step-00000002"


def test_a_text_model_learns_from_captions_that_are_all_different(tmp_path):
    """Nobody can name classes then, and distances are on pixels."""
    words = [" ".join(some) for some in itertools.product(("a", "red", "blue"), ("square", "circle"), ("a", "red"))]
    for i, caption in enumerate(words):
        save(tmp_path / f"{i:02}.png", 20 * i, (16, 16))
        (tmp_path / f"{i:02}.txt").write_text(caption)
    teacher = Flux(flux_pipeline(("a", "red", "blue", "square", "circle"), vae_channels=(8, 8, 8)), "tiny", 16)
    result = fs.distill(
        teacher, tmp_path, 1.5, scale="laptop", curriculum="uniform", steps=2, batch=4, bank=0,
        sampler_steps=1, evaluate=3,
    )  # fmt: skip
    curve = result.metrics["after"]["1.0"]
    assert "accuracy" not in curve and curve["distance"] >= 0 and result.metrics["judge"] == "pixels 8x8"
    assert [pair.label for pair in result.pairs] == [words[i] for i in (0, 1, 2)]


def test_a_diagnosis_takes_what_a_verb_takes():
    names = ("cat", "dog", "owl")
    teacher = UNet(unet_pipeline(size=8, channels=1, widths=(8, 16), class_rows=4), "tiny", classes=names)
    asked = {"teacher": teacher, "tuples": 20, "samples": 0, "steps": 2}
    for data_ in (pairs(owl=3, cat=2, dog=2), Dataset(image=[flat(i) for i in range(6)], label=[0, 1, 2] * 2)):
        found = fs.diagnose(teacher, "guidance", data=data_, **asked)
        assert "noised data" in found.numbers["states"]
    with pytest.raises(InputError, match="'owl' is missing"):
        fs.diagnose(teacher, "guidance", data=pairs(cat=2, dog=2), **asked)


def test_fit_and_background_reach_the_images_of_every_verb(tmp_path):
    for name in ("a", "b"):
        for i in range(2):
            image = Image.new("RGBA", (16, 8), (255, 0, 0, 0))
            image.paste((0, 255, 0, 255), (4, 0, 12, 8))
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"{i}.png")
    shown = {"fit": "pad", "background": "#0000ff"}
    distilled = distill_inputs(DistillConfig(data=str(tmp_path), **shown)).data(8, 3).images[:1]
    config = SharpenConfig(data=str(tmp_path), judge="math:sqrt", **shown)
    sharpened = sharpen_inputs(config, judge=lambda images: [True] * len(images)).world(3, 8, False).images[:1]
    edited = UserSessions.of([(tmp_path / "a" / "0.png", ["x"])], frame_of(8, **shown)).clean(0)
    for images in (distilled, sharpened, edited):
        assert images[0, :, 0, 0].tolist() == [0, 0, 1] == images[0, :, 4, 0].tolist()  # bar, then what is transparent
        assert images[0, :, 4, 4].tolist() == [0, 1, 0]


def test_a_bank_knows_lazily_read_data_again(photos):
    few = [file for i, file in enumerate(sorted(photos.iterdir())) if i % 10 == 0]
    double = lambda images: images * 2  # noqa: E731
    first, again = (sample_of(encoded(load(few, FRAME).images, double)) for _ in range(2))
    assert torch.equal(first, again) and len(first) == 64 * 3 * 8 * 8 + 1
    for other in (few[:-1], [few[1], *few[1:]]):
        changed = sample_of(encoded(load(other, FRAME).images, double))
        assert changed.shape != first.shape or not torch.equal(changed, first)
