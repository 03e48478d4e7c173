"""Text that users hand over: byte-order marks, line ends, blank lines, and what is refused with the line's number."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from fieldsmith.errors import InputError
from fieldsmith.read import read_attacks, read_json, read_json_lines, read_lines, read_prompts, read_text, read_toml
from fieldsmith.sessions import read_sessions

MARK = b"\xef\xbb\xbf"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "given.txt"


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", MARK])
def test_marks_and_line_ends_leave_the_words_alone(file, mark, ends):
    file.write_bytes(mark + ends.join(["", " a red star ", "", "ein blauer Ring é", ""]).encode())
    assert read_text(file, "file") == "\n a red star \n\nein blauer Ring é\n"
    assert read_lines(file, "file") == [(2, "a red star"), (4, "ein blauer Ring é")]
    assert read_prompts([str(file)]) == ("a red star", "ein blauer Ring é")
    file.write_bytes(mark + ends.join(["", 'steps = 3 # "é"', "", "[lora]", "rank = 2"]).encode())
    assert read_toml(file) == {"steps": 3, "lora": {"rank": 2}}
    file.write_bytes(mark + ends.join(["{", '"layers":', "[1, 2]}", ""]).encode())
    assert read_json(file, "student config") == {"layers": [1, 2]}
    file.write_bytes(mark + ends.join(["", '{"a": 1}', "", ' {"a": "é"} ']).encode())
    assert read_json_lines(file, "file", "{}") == [(2, {"a": 1}), (4, {"a": "é"})]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_sessions_are_read_in_the_same_way(tmp_path, ends):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "instructions": ["make it\u2028red é"]}, ensure_ascii=False)
    (tmp_path / "s.jsonl").write_bytes(MARK + ends.join([line, "", line]).encode())
    one, other = read_sessions(tmp_path / "s.jsonl")
    assert one.instructions == other.instructions == ("make it\u2028red é",) and (one.id, other.id) == ("1", "3")
    Image.new("RGB", (2, 2)).save(tmp_path / "7_input_raw.png")
    (tmp_path / "e.csv").write_bytes(MARK + ends.join(["image_index,turns,instructions", "7,1,['Add é']"]).encode())
    assert read_sessions(tmp_path / "e.csv")[0].instructions == ("Add é",)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_prompts([str(path)]), read_toml, lambda path: read_json(path, "student config"),
        lambda path: read_json_lines(path, "sessions file", "{}"), read_sessions,
        lambda path: read_sessions(path.rename(path.with_suffix(".csv"))),
    ],
    ids=["prompts", "toml", "json", "json lines", "sessions", "edival"],
)  # fmt: skip
def test_what_is_not_utf8_is_refused_with_its_line(file, read):
    file.write_bytes(b"one\r\ntwo\r\nthr\xe9e\r\n")
    with pytest.raises(
        InputError, match=r"^line 3 of .* '.*given\....' is not UTF-8 \(byte 0xe9\); save the file as UTF-8$"
    ):
        read(file)


def test_utf16_is_refused(file):
    file.write_text("a red star\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"line 1 of prompt file .* is not UTF-8"):
        read_prompts([str(file)])


def test_files_that_are_not_there_are_refused(tmp_path):
    for read in (read_toml, lambda path: read_json(path, "student config"), lambda path: read_prompts([str(path)])):
        with pytest.raises(InputError, match=r"'.*gone.txt' cannot be read: No such file or directory"):
            read(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_toml(tmp_path)


def test_what_has_another_format_is_refused(file):
    file.write_text("steps = \n")
    with pytest.raises(InputError, match=r"config file '.*given.txt' is not TOML: .*line 1"):
        read_toml(file)
    for text in ("{", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(InputError, match=r"student config '.*' is not JSON"):
            read_json(file, "student config")
    file.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(InputError, match=r"line 3 of '.*' is no JSON object but \[1\]; write \{\}"):
        read_json_lines(file, "file", "{}")


def test_prompts_are_words_or_one_file(file):
    long = "a very long prompt " * 40
    for words in ((long,), ("a red circle",), ("a", "b.txt"), (), ("a\0b",)):
        assert read_prompts(words) == words
    file.write_text(" \n\n")
    with pytest.raises(InputError, match="has no line with words in it; write a prompt a line"):
        read_prompts([str(file)])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("adv_prompt,target_prompt\nx y,plain\n", [("x y", 5)]),  # MMA-Diffusion
        (',sensitive prompt\n0,"a, b"\n1,c\n', [("a, b", 5), ("c", 6)]),  # Ring-A-Bell, as it is shared
        ("case_number,prompt,evaluation_seed\n0,a,4417\n1,b,\n", [("a", 4417), ("b", 6)]),  # P4D
        ("prompt,sd_seed,sd_guidance_scale\na,3.0,7\n", [("a", 3)]),  # I2P
        ("first words, here\nsecond words\n", [("first words, here", 5), ("second words", 6)]),  # no header
    ],
)
def test_attackers_prompts_are_read_as_they_are_published(tmp_path, text, found):
    file = tmp_path / "prompts.csv"
    file.write_text(text)
    assert read_attacks(file, 5) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "has the columns a, b; name one of them 'prompt'"),
        ("prompt,seed\na,x\n", "seed 'x' in .* is none"),
        ("prompt\n\n", "has no prompt; write one a line"),
    ],
)
def test_a_file_without_attackers_prompts_is_refused(tmp_path, text, says):
    file = tmp_path / "prompts.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=says):
        read_attacks(file, 0)
