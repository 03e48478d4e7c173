"""Session files: what is read, written, loaded and refused."""

from __future__ import annotations

import json
import pathlib

import numpy
import pytest
import torch
from PIL import Image

from fieldsmith.errors import InputError
from fieldsmith.sessions import (
    Session,
    UserSessions,
    frame_of,
    load_images,
    read_sessions,
    sessions_of,
    write_sessions,
)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), (255, 0, 51)).save(tmp_path / name)
    return tmp_path


def written(folder: pathlib.Path, *lines: object, name: str = "sessions.jsonl") -> pathlib.Path:
    path = folder / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def line(**changes: object) -> dict[str, object]:
    return {"image": "a.png", "instructions": ["one", "two"]} | changes


# JSON lines


def test_lines_are_read_in_order(folder):
    path = written(folder, line(), "", line(image="b.png", id="second", instructions=["trois", " quatre é "]), "")
    first, second = read_sessions(path)
    assert first == Session("1", (folder / "a.png").resolve(), ("one", "two"))
    assert second == Session("second", (folder / "b.png").resolve(), ("trois", "quatre é"))


def test_images_are_found_from_the_file_and_not_from_here(folder, monkeypatch):
    (folder / "deep").mkdir()
    monkeypatch.chdir(folder / "deep")
    (one,) = read_sessions(written(folder, line(image="deep/../a.png")))
    assert one.image == (folder / "a.png").resolve()
    absolute = written(folder, line(image=str(folder / "b.png")))
    assert read_sessions(absolute)[0].image == (folder / "b.png").resolve()


def test_images_outside_of_the_files_folder_are_read_only_where_that_is_allowed(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "link.png").symlink_to(folder / "a.png")
    for image in ("../a.png", str(folder / "a.png"), "link.png"):
        path = written(folder / "deep", line(image=image))
        with pytest.raises(
            InputError, match=r"at line 1 of '.*' lies outside of '.*deep'; move it there.*outside-images"
        ):
            read_sessions(path)
        assert read_sessions(path, outside=True)[0].image == (folder / "a.png").resolve()


def test_what_is_written_is_read_back(folder):
    sessions = read_sessions(written(folder, line(), line(image="b.png", id="é")))
    path = folder / "new" / "place" / "again.jsonl"
    write_sessions(path, sessions)
    assert read_sessions(path, outside=True) == sessions
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["image"] == "../../a.png"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"no session is there \(the file or list is empty\); give some such as \{"),
        (["", " "], "list is empty"),
        ([line(), '{"image": '], "line 2 of .* is no JSON; write"),
        (["[1]"], r"line 1 of .* is no JSON object but \[1\]"),
        ([{"instructions": ["one"]}], "line 1 of .* names no image"),
        ([line(image=3)], "line 1 of .* names no image"),
        ([line(), line(image="c.png")], "image 'c.png' of line 2 of .* does not exist; put it into"),
        ([line(image=".")], r"image '\.' of line 1 of .* does not exist"),
        ([{"image": "a.png"}], "line 1 of .* has no list of instructions"),
        ([line(instructions=[])], "line 1 of .* has no list of instructions"),
        ([line(instructions="one")], "line 1 of .* has no list of instructions"),
        ([line(instructions=["one", 2])], "instruction 2 at line 1 of .* is 2; write it as text"),
        ([line(instructions=["one", " "])], "instruction 2 at line 1 of .* is ' '"),
        ([line(id=True)], "id True at line 1 of .* is no text"),
        ([line(id="x"), line(), line(id="x")], "id 'x' is at line 1 and line 3"),
        (
            [line(id="x"), line(instructions=["one"])],
            r"session 'x' \(line 1\) has 2 turns, '2' \(line 2\) has 1 in .*; give all the same number",
        ),
    ],
)
def test_bad_lines_are_refused(folder, lines, message):
    with pytest.raises(InputError, match=message):
        read_sessions(written(folder, *lines))


def test_a_file_that_is_not_there_or_no_text_is_refused(folder):
    for path in (folder / "none.jsonl", folder):
        with pytest.raises(InputError, match="does not exist; name a file of lines"):
            read_sessions(path)
    (folder / "bytes.jsonl").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(
        InputError, match=r"line 1 of sessions file .* is not UTF-8 \(byte 0xff\); save the file as UTF-8"
    ):
        read_sessions(folder / "bytes.jsonl")


# in Python


def test_dicts_with_paths_or_images_are_sessions_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    blue = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    first, second, third = sessions_of(
        [line(), {"image": blue, "instructions": ("one", "two"), "id": "x"}, Session("y", folder / "b.png", ("a", "b"))]
    )
    assert first == Session("1", (folder / "a.png").resolve(), ("one", "two")) and second.image is blue
    assert third.id == "y"
    task = UserSessions.of(iter([first, second, third]), frame_of(2)).sample(5, 0, 1)
    assert len(task) == 5 and task.turns == 1 and sorted({one.id for one in task.sessions}) == ["1", "x", "y"]
    images = task.clean(0)
    for row, one in enumerate(task.sessions):
        assert images[row, :, 0, 0].tolist() == pytest.approx([1, 1, 1] if one.id == "x" else [1, 0, 0.2])
    assert task.prompts(1)[0] == task.sessions[0].instructions[0]
    with pytest.raises(InputError, match="image of session 'x' is in no file"):
        write_sessions(folder / "s.jsonl", [second])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "these sessions: no session is there"),
        ([line(), 3], "session 2 is a int; give a dict such as"),
        ([line(image="c.png")], "image 'c.png' of session 1 does not exist"),
        ([{"image": "a.png"}], "session 1 has no list of instructions"),
        ([line(id="x"), line(id="x")], "id 'x' is at session 1 and session 2 of these sessions"),
        ([line(), line(instructions=["one"])], r"'2' \(session 2\) has 1 in these sessions"),
    ],
)
def test_bad_entries_are_refused(folder, monkeypatch, entries, message):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=message):
        sessions_of(entries)


# EdiVal

HEADER = "image_index,turns,task_type,instructions,format_instructions,bg_consistency,unchanged_objects"
EDIVAL = [
    HEADER,
    "0,1,['subject_add'],['Add bench'],['Add [bench]'],True,[]",
    "0,2,\"['subject_add', 'count_change']\",\"['Add bench', '\"\"Change the count of leaf to 4\"\"']\",[],True,[]",
    "7,1,['text_change'],\"[\"\"Replace the text 'A' with 'B'\"\"]\",[],True,[]",
    '7,2,"[\'text_change\', \'x\']","[""Replace the text \'A\' with \'B\'"", \'Change mouse to ""wood""\']",[],True,[]',
]


@pytest.mark.parametrize("place", ["", "input_images_resize_512"])
def test_edivals_rows_become_one_session_an_image(folder, place):
    (folder / place).mkdir(exist_ok=True)
    for name in ("0_input_raw.jpg", "7_input_raw.png"):
        Image.new("RGB", (2, 2)).save(folder / place / name)
    first, second = read_sessions(written(folder, *EDIVAL, name="edival.csv"))
    assert first == Session(
        "0", (folder / place / "0_input_raw.jpg").resolve(), ("Add bench", "Change the count of leaf to 4")
    )
    assert second.id == "7" and second.image.name == "7_input_raw.png"
    assert second.instructions == ("Replace the text 'A' with 'B'", 'Change mouse to "wood"')


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,instructions"], "lacks EdiVal's column image_index, turns; .* else write JSON lines"),
        ([HEADER], "list is empty"),
        ([""], "lacks EdiVal's column"),
        (EDIVAL[:2], r"'0_input_raw.jpg' \(or .png\) of line 2 of .*unpack EdiVal's input_images_resize_512.zip into"),
        ([HEADER, "0,one,[],['a'],[],True,[]"], "turns 'one' at line 2 of .* is no number"),
        ([HEADER, "0"], "turns 'None' at line 2"),
        ([HEADER, "0,1,[],Add a bench,[],True,[]"], "instructions at line 2 of .* are no list"),
    ],
)
def test_bad_rows_are_refused(folder, lines, message):
    with pytest.raises(InputError, match=message):
        read_sessions(written(folder, *lines, name="edival.csv"))


# images


def session(path: pathlib.Path) -> Session:
    return Session("x", path, ("one",))


def test_images_are_loaded_as_they_are(tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 256, (6, 6, 3), numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    given = load_images([session(tmp_path / "rgb.png"), session(tmp_path / "grey.png")], frame_of(6))
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    assert given.dtype == torch.float32 and given.shape == (2, 3, 6, 6)
    assert torch.equal(given[0], expected) and torch.equal(given[1], expected[:1].expand(3, 6, 6))
    assert load_images([], frame_of(6)).shape == (0, 3, 6, 6)


def test_another_shape_is_cut_to_its_middle_and_resized(tmp_path):
    image = Image.new("RGB", (24, 8), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 16, 8))  # the central square
    image.save(tmp_path / "wide.png")
    given = load_images([session(tmp_path / "wide.png")], frame_of(4))
    assert torch.equal(given[0], torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 4, 4))


def test_photographs_are_turned_upright(tmp_path):
    image = Image.new("RGB", (2, 2), (255, 255, 255))
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    image.save(tmp_path / "turned.png", exif=exif)
    given = load_images([session(tmp_path / "turned.png")], frame_of(2))
    assert given[0, 0].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "cut"])
def test_an_unreadable_image_is_refused(tmp_path, content):
    path = tmp_path / "bad.png"
    if content is None:
        noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), numpy.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:5000]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"image '.*bad\.png' of session 'x' cannot be read .*; remove it"):
        load_images([session(path)], frame_of(8))


def test_a_size_below_one_is_refused():
    with pytest.raises(InputError, match="size=0: images need at least 1 pixel"):
        load_images([], frame_of(0))
