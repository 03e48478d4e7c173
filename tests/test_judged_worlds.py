"""Worlds with a judge of each image: clean images pass, every corruption is noticed, users' judges are asked."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import chess
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments.oracles.chess import ChessWorld, classes, faults, fen_of
from experiments.oracles.corruptions import corruptions_of
from fieldsmith.errors import InputError, RewardError, RunError
from fieldsmith.pictures import Frame
from fieldsmith.worlds import judged, own
from fieldsmith.worlds.cards import CARDS, CardsWorld
from fieldsmith.worlds.catalogue import load
from fieldsmith.worlds.columns import PATTERNS, ColumnsWorld
from fieldsmith.worlds.judged import JudgedWorld

WORLDS = [("columns", 64), ("columns", 32), ("cards", 128), ("cards", 32), ("chess", 256), ("chess", 64)]


def make(name: str, size: int) -> JudgedWorld:
    return ChessWorld(size) if name == "chess" else load(name, size)


MUTATIONS = [(name, size, mutation) for name, size in WORLDS for mutation in corruptions_of(make(name, size))]


@pytest.fixture(scope="module")
def world() -> Callable[[str, int], Any]:
    made: dict[tuple[str, int], Any] = {}
    return lambda name, size: made.setdefault((name, size), make(name, size))


def few(size: int) -> int:
    return {256: 60, 128: 120}.get(size, 300)


@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_clean_images_pass_and_small_noise_is_forgiven(world, name, size):
    it, n = world(name, size), {256: 150, 128: 500}.get(size, 1000)
    images = it.sample(n, 1)
    assert images.shape == (n, it.channels, size, size)
    assert images.min() >= 0 and images.max() <= 1
    verdicts = it.judge(images)
    assert verdicts.valid.all() and verdicts.readable.all() and not any(verdicts.reasons)
    noise = torch.randn(few(size), *images.shape[1:], generator=torch.Generator().manual_seed(2))
    for deviation in (0.02, 0.04):
        noisy = it.judge(images[: few(size)] + deviation * noise)
        assert noisy.valid.float().mean() >= 0.99
        same = [a == b for a, b in zip(noisy.contents, verdicts.contents, strict=False) if a is not None]
        assert all(same)


@pytest.mark.parametrize(("name", "size", "mutation"), MUTATIONS)
def test_every_mutation_is_noticed(world, name, size, mutation):
    it = world(name, size)
    images = corruptions_of(it)[mutation](few(size), 7)
    assert torch.equal(images, corruptions_of(it)[mutation](few(size), 7))
    verdicts = it.judge(images)
    assert verdicts.valid.float().mean() <= 0.01, verdicts.valid.float().mean()
    for valid, reasons, content in zip(verdicts.valid.tolist(), verdicts.reasons, verdicts.contents, strict=True):
        assert bool(reasons) != valid and (content is None) != valid


@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_pure_noise_and_nan_are_unreadable(world, name, size):
    it = world(name, size)
    noise = torch.rand(20, it.channels, size, size, generator=torch.Generator().manual_seed(0))
    verdicts = it.judge(noise)
    assert not verdicts.valid.any() and not verdicts.readable.any()
    images = it.sample(3, 0)
    images[1, 0, 3, 3] = torch.nan
    verdicts = it.judge(images)
    assert verdicts.valid.tolist() == verdicts.readable.tolist() == [True, False, True]
    assert verdicts.reasons[1] == ("unreadable",)
    assert it.judge(images[:0]).valid.shape == (0,)


@pytest.mark.parametrize(("name", "size"), [("columns", 32), ("cards", 32), ("chess", 64)])
def test_draws_repeat_and_leave_global_randomness_alone(world, name, size):
    it = world(name, size)
    state = torch.random.get_rng_state()
    first = it.sample(20, 3)
    it.judge(first)
    assert torch.equal(first, make(name, size).sample(20, 3))
    assert not torch.equal(first, it.sample(20, 4))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("name", "size"), [("columns", 32), ("cards", 32), ("chess", 64)])
def test_other_shapes_are_refused(world, name, size):
    with pytest.raises(InputError, match=rf"judge of {name} reads floats"):
        world(name, size).judge(torch.zeros(2, 4, size, size))
    with pytest.raises(InputError, match="uint8"):
        world(name, size).judge(world(name, size).sample(2, 0).to(torch.uint8))


# what images show


@pytest.mark.parametrize("size", [64, 32])
def test_columns_show_their_pattern(size):
    held = ((True, True, True), (False, True, False))
    it = ColumnsWorld(size, hold_out=held)
    assert it.support == 5
    seen = it.judge(it.sample(300, 0)).contents
    assert set(seen) == set(PATTERNS) - set(held) and not any(map(it.novel, seen))
    seen = it.judge(it.sample(50, 0, held_out=True)).contents
    assert set(seen) == set(held) and all(map(it.novel, seen))
    with pytest.raises(InputError, match="no pattern of the columns is held out"):
        ColumnsWorld(size).sample(1, 0, held_out=True)
    with pytest.raises(InputError, match="hold_out="):
        ColumnsWorld(size, hold_out=((False, False, False),))


def test_the_published_columns_have_the_published_white_counts():
    counts = [{int(count) for count in placed.sum((1, 2))} for placed in ColumnsWorld(64).placed]
    assert counts == [{64, 65}, {64}, {69, 70}]


def test_grey_smear_is_noticed():
    it = ColumnsWorld(64)
    ghost = torch.maximum(it.sample(100, 0), 0.4 * it.sample(100, 1))
    ghost = ghost[(ghost == 0.4).flatten(1).sum(1) > 50]
    verdicts = it.judge(ghost)
    assert not verdicts.valid.any() and all("grey smear" in output for output in verdicts.reasons)


@pytest.mark.parametrize("size", [128, 64, 32])
def test_cards_show_their_hand_and_held_out_hands_never_train(size):
    it = CardsWorld(size)
    assert it.support + len(it.hands[1]) == 91_390
    assert len(it.hands[1]) / 91_390 == pytest.approx(0.1, abs=0.005)
    generator = judged.generator_of(5)
    hands = it.draw_hands(100, generator)
    assert it.judge(it.sample(100, 5)).contents == tuple(tuple(sorted(hand)) for hand in hands.tolist())
    many = it.draw_hands(20_000, generator).sort(1).values.unique(dim=0).tolist()
    assert not any(it.novel(tuple(hand)) for hand in many)
    assert all(it.novel(hand) for hand in it.judge(it.sample(100, 5, held_out=True)).contents)
    with pytest.raises(InputError, match="no hand of cards is held out"):
        CardsWorld(size, held_out_share=0).sample(1, 0, held_out=True)


@pytest.mark.parametrize("size", [128, 64, 32])
def test_cards_are_far_apart_from_each_other(size):
    tiles = CardsWorld(size).tiles[:40].flatten(1)
    apart = torch.cdist(tiles, tiles) + 1e9 * torch.eye(40)
    assert apart.min() > 20 * 0.04, CARDS[int(apart.argmin()) // 40]  # in deviations of the noise that is forgiven


def test_the_reasons_of_cards_name_what_is_wrong(world):
    it = world("cards", 128)
    for mutation, word in {
        "duplicate card": "duplicate card",
        "recoloured suit": "wrong colour",
        "wrong index": "index disagrees with pips",
        "scrambled quadrant": "unreadable pips",
    }.items():
        reasons = it.judge(corruptions_of(it)[mutation](50, 1)).reasons
        assert all(any(reason.startswith(word) for reason in output) for output in reasons), mutation


def test_chess_shows_its_placement_and_held_out_positions_never_train(world):
    it = world("chess", 64)
    placements = it.positions(300, 2)
    seen = it.judge(it.render(placements)).contents
    assert seen == tuple(fen_of(placement) for placement in placements)
    assert torch.equal(classes(seen[0]), placements[0]) and chess.Board(seen[0]).board_fen() == seen[0]
    assert not any(map(it.novel, seen)) and it.support is None
    assert all(map(it.novel, it.judge(it.sample(40, 2, held_out=True)).contents))


def test_chess_takes_either_side_to_move():
    check = "rnbqkbnr/ppp2ppp/8/1B1pp3/4P3/8/PPPP1PPP/RNBQK1NR"  # Black is in check, so Black is to move
    assert chess.Board(check).status() == chess.STATUS_OPPOSITE_CHECK
    assert faults(classes(check)) == ()
    assert faults(classes("k3R3/8/8/8/8/8/8/K3r3")) == ("opposite check",)
    assert "no white king" in faults(classes("k7/8/8/8/8/8/8/8"))


def test_the_reasons_of_chess_name_what_is_wrong(world):
    it = world("chess", 64)
    for mutation, word in {
        "missing king": "king",
        "two kings": "too many kings",
        "nine pawns": "pawns",
        "pawn on the back rank": "pawns on backrank",
        "both sides in check": "opposite check",
    }.items():
        reasons = it.judge(corruptions_of(it)[mutation](50, 1)).reasons
        assert all(any(word in reason for reason in output) for output in reasons), mutation
    image = it.sample(1, 0)
    image[0, :, 32:40, 32:40] = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert "malformed square e4" in it.judge(image).reasons[0]


def test_chess_reads_positions_from_games(tmp_path):
    file = tmp_path / "games.pgn"
    moves = "1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. Ba4 Nf6 5. O-O Be7 6. Re1 b5 7. Bb3 d6 8. c3 O-O *"
    file.write_text('[Event "one"]\n\n' + moves + '\n\n[Event "two"]\n\n1. d4 d5 2. c4 e6 *\n', encoding="utf-8")
    it = ChessWorld(64, plies=(1, 90), pgn=file)
    seen = it.judge(it.sample(50, 0)).contents
    assert None not in seen and 2 < len(set(seen)) <= 20
    with pytest.raises(InputError, match="no positions after 60 to 90 plies"):
        ChessWorld(64, plies=(60, 90), pgn=file).sample(1, 0)
    with pytest.raises(InputError, match="is no file"):
        ChessWorld(64, pgn=tmp_path / "none.pgn")


# blind spots of the published validators (VSM notes, section 4), which ours do not share


def published_columns(images: Tensor) -> Tensor:
    """Valid where there are 50 white pixels and some column has about as many as its shape."""
    white = images[:, 0, :63, :63] > 127 / 255
    counts = white.reshape(-1, 63, 3, 21).sum((1, 3))
    low, high = torch.tensor([63, 60, 68]), torch.tensor([67, 68, 72])
    return (white.sum((1, 2)) >= 50) & ((counts >= low) & (counts <= high)).any(1)


def published_cards(images: Tensor, tiles: Tensor) -> Tensor:
    """Valid where every quadrant correlates in grey with some card at 0.95 or more."""
    grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    n, half = len(images), images.shape[-1] // 2
    quadrants = (images * grey).sum(1).reshape(n, 2, half, 2, half).transpose(2, 3).flatten(3).flatten(1, 2)
    x, t = (part - part.mean(-1, keepdim=True) for part in (quadrants, (tiles[:40] * grey).sum(1).flatten(1)))
    scores = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(t, dim=-1).T
    return scores.amax(-1).amin(-1) >= 0.95


def test_published_columns_miss_what_stands_beside_a_valid_shape(world):
    it = world("columns", 64)
    assert published_columns(it.sample(300, 0)).all()
    for mutation in (
        "duplicate beside a valid shape",
        "wrong column beside a valid shape",
        "half eroded beside a valid shape",
    ):
        images = corruptions_of(it)[mutation](300, 0)
        assert published_columns(images).all() and not it.judge(images).valid.any(), mutation


def test_published_cards_miss_colours_duplicates_and_noise(world):
    it = world("cards", 128)
    assert published_cards(it.sample(100, 0), it.tiles).all()
    for mutation, missed in (("duplicate card", 1), ("recoloured suit", 0.95), ("wrong index", 0.1)):
        images = corruptions_of(it)[mutation](100, 0)
        assert published_cards(images, it.tiles).float().mean() >= missed, mutation
        assert not it.judge(images).valid.any()


# a folder and the user's judge


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(13):
        Image.new("RGB", (20, 12), (i * 20, 0, 0)).save(tmp_path / "in" / f"{i:02}.png")
    (tmp_path / "mine.py").write_text(
        "calls = []\n"
        "def red(images):\n    return [bool(image[0].mean() > 0.5) for image in images]\n"
        "def said(images):\n    return [(False, 'too dark')] * len(images)\n"
        "def tensor(images):\n    return images[:, 0].mean((1, 2)) > 0.5\n"
        "def numbers(images):\n    return [0.3] * len(images)\n"
        "def short(images):\n    return [True]\n"
        "def nothing(images):\n    images.zero_()\n"
        "def captions(images, prompts):\n    return [True] * len(images)\n"
        "def late(images):\n    calls.append(1)\n    return [True] * len(images) if len(calls) < 2 else 1 / 0\n",
        encoding="utf-8",
    )
    return tmp_path / "in"


def mine(folder, name: str) -> own.ImageWorld:
    return own.of(folder, f"{folder.parent / 'mine.py'}:{name}", Frame(8))


def test_a_folder_is_drawn_from_and_every_sixth_image_held_out(folder):
    it = mine(folder, "red")
    levels = {round(float(image[0].mean()) * 255) for image in it.sample(300, 0)}
    held = {round(float(image[0].mean()) * 255) for image in it.sample(300, 0, held_out=True)}
    assert held == {100, 220} and levels == {20 * i for i in range(13)} - held
    assert it.support is None and not it.novel(None)
    assert torch.equal(it.sample(5, 1), mine(folder, "red").sample(5, 1))


def test_a_judge_is_a_function_in_a_file_or_a_module(folder, monkeypatch):
    images = torch.stack([torch.full((3, 8, 8), level) for level in (0.2, 0.9, torch.nan)])
    for name in ("red", "tensor"):
        verdicts = mine(folder, name).judge(images)
        assert verdicts.valid.tolist() == [False, True, False] and verdicts.readable.tolist() == [True, True, False]
        assert verdicts.reasons == (("invalid",), (), ("unreadable",)) and verdicts.contents == (None,) * 3
    assert mine(folder, "said").judge(images).reasons[1] == ("too dark",)
    monkeypatch.syspath_prepend(folder.parent)
    assert load(str(folder), 8, "mine:red").judge(images).valid.tolist() == [False, True, False]


def test_a_failing_judge_is_named(folder):
    images = torch.zeros(3, 3, 8, 8)
    with pytest.raises(RewardError, match=r"mine.py:short' returned 1 answers to 3 images"):
        mine(folder, "short").judge(images)
    with pytest.raises(RewardError, match=r"mine.py:numbers' returned 0.3 for image 1 of 3; return a bool"):
        mine(folder, "numbers").judge(images)
    with pytest.raises(RewardError, match=r"mine.py:nothing' returned None for 3 images; return a list"):
        mine(folder, "nothing").judge(images)
    with pytest.raises(
        RewardError, match=r"mine.py:captions' takes \(images, prompts\), but it is called with \(images\)"
    ):
        mine(folder, "captions")
    late = mine(folder, "late")
    late.judge(images)
    with pytest.raises(
        RewardError, match=r"raised ZeroDivisionError: division by zero \(mine.py, line 18\) for 3 images"
    ):
        late.judge(images)
    for wrong, output in (
        ("mine.py", "is no file.py:name or package.module:name"),
        ("no_such_module:f", "ModuleNotFoundError"),
        (f"{folder.parent / 'mine.py'}:absent", "has no 'absent'"),
        (f"{folder.parent / 'none.py'}:f", "FileNotFoundError"),
        (f"{folder.parent / 'mine.py'}:calls", "is a list, not a function"),
    ):
        with pytest.raises(InputError, match=output):
            own.of(folder, wrong, Frame(8))


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """An address and the answers it gives, in turn: a status, or a function of the question; the last one repeats."""
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            output = b"" if isinstance(answer, int) else json.dumps(answer(body["images"])).encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Content-Length", str(len(output)))
            self.end_headers()
            self.wfile.write(output)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/judge", answers
    http.shutdown()
    http.server_close()
    thread.join()


def red(images: list[str]) -> dict[str, Any]:
    levels = [Image.open(io.BytesIO(base64.b64decode(image))).getpixel((0, 0))[0] for image in images]
    return {"valid": [level > 127 for level in levels], "reasons": [[f"level {level}"] for level in levels]}


def test_a_judge_behind_http_is_asked_in_parts_and_again(folder, server, monkeypatch):
    address, answers = server
    monkeypatch.setattr(own, "PAUSE", 0.01)
    answers += [503, red]
    it = load(str(folder), 8, address)
    levels = torch.arange(100) / 100
    verdicts = it.judge(levels[:, None, None, None].expand(100, 3, 8, 8))
    assert torch.equal(verdicts.valid, levels >= 0.5)
    assert verdicts.reasons[20] == ("level 51",) and verdicts.reasons[99] == ()
    answers[:] = [lambda images: {"valid": [True] * len(images)}]
    assert it.judge(torch.zeros(3, 3, 8, 8)).valid.all()
    answers[:] = [lambda images: {"valid": [True]}]
    with pytest.raises(RunError, match=rf"{address} failed after 4 attempts: .*1 answers and 3 reasons to 3 images"):
        it.judge(torch.zeros(3, 3, 8, 8))
    answers[:] = [404]
    with pytest.raises(RunError, match="failed after 1 attempts: status 404"):
        it.judge(torch.zeros(3, 3, 8, 8))


def test_a_judge_that_is_not_there_is_bad_input(folder, monkeypatch):
    monkeypatch.setattr(own, "PAUSE", 0.01)
    with pytest.raises(InputError, match=r"127.0.0.1:9/judge failed after 4 attempts: .*refused"):
        own.of(folder, "http://127.0.0.1:9/judge", Frame(8)).judge(torch.zeros(1, 3, 8, 8))


def test_what_cannot_be_loaded_is_refused_with_the_mend(folder):
    for arguments, output in (
        (("column",), "did you mean 'columns'"),
        (("nowhere/at/all",), "known worlds: columns, cards, shapes;"),
        ((str(folder), None, None, 3, "crop", "white", False, True), "needs a judge"),
        (("cards", None, "a:b"), "has a judge of its own"),
        (("columns", 48), "64 or 32"),
        (("cards", 33), "128, 64 or 32"),
    ):
        with pytest.raises(InputError, match=output):
            load(*arguments)
    (folder / "bad.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"bad.png' cannot be read"):
        mine(folder, "red")
    with pytest.raises(InputError, match="64, 128 or 256"):
        ChessWorld(32)
    assert [load(name).size for name in ("columns", "cards")] == [64, 128]
