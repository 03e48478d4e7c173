"""`fieldsmith diagnose judge` against servers that know the truth and say it with a bias, or with noise."""

from __future__ import annotations

import base64
import io
import json
import pathlib
import random
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import fieldsmith as fs
from fieldsmith.cli import main
from fieldsmith.diagnoses.judge import UPSCALE, Advice, verdict_of
from fieldsmith.errors import InputError
from fieldsmith.measure.judges import Recommendation
from fieldsmith.rewards.edits import CONSISTENCY, MODES
from fieldsmith.worlds import asked
from fieldsmith.worlds.scenes import OPERATIONS, ScenesWorld
from fieldsmith.worlds.scenes_graded import KINDS, graded
from fieldsmith.worlds.scenes_judge import judge

GROUPS = 6


def levels(images: torch.Tensor) -> bytes:
    return bytes((images * 255).round().byte().numpy().tobytes())


class Server:
    """A chat server that recognises an edit by its pixels: `say(truth, mode)` is a score in [0, 1] from its truth."""

    def __init__(self) -> None:
        edits = graded(ScenesWorld(24), GROUPS, 0)
        truth = {
            levels(edits.after[row, kind]): (float(edits.following[row, kind]), float(edits.consistency[row, kind]))
            for row in range(GROUPS)
            for kind in range(len(KINDS))
        }
        self.say: Callable[[float, str], float] = lambda truth, mode: truth
        self.down_after = 10**9
        self.bodies: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self.give({"data": [{"id": "eye"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                *shown, question = body["messages"][0]["content"]
                mode = "reasoning" if "step by step" in question["text"] else "direct"
                mode = "expected" if "to 9 (fully)" in question["text"] else mode
                url = shown[1]["image_url"]["url"].partition(",")[2]
                pixels = numpy.asarray(Image.open(io.BytesIO(base64.b64decode(url))))[::UPSCALE, ::UPSCALE]
                known = truth[pixels.transpose(2, 0, 1).tobytes()][CONSISTENCY in question["text"]]
                scores = [10 * min(1.0, max(0.0, server.say(known, mode))) for _ in range(body.get("n", 1))]
                texts = [f"Score: {score:.2f}" if mode == "reasoning" else f"{score:.2f}" for score in scores]
                if mode == "expected":
                    texts = ["7"] * len(texts)  # without log-probabilities
                self.give(
                    {"choices": [{"message": {"content": text}} for text in texts]},
                    500 if len(server.bodies) > server.down_after else 200,
                )

            def give(self, answer: Any, status: int = 200) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def address(self, options: str) -> str:
        # one at a time, so that noise is drawn in one order
        quick = "model=eye&pause=0.01&timeout=5&retries=1&concurrency=1"
        return f"remote:http://127.0.0.1:{self.http.server_port}/v1?{quick}&{options}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def measured(server: Server, out: pathlib.Path, options: str = "mode=direct") -> dict[str, Any]:
    words = ["diagnose", "judge", "--judge", server.address(options), "--samples", str(GROUPS), "--out", str(out)]
    assert main(words) == 0
    return dict(json.loads((out / "metrics.json").read_text()))


def noisy(deviation: float) -> Callable[[float, str], float]:
    draw = random.Random(0)
    return lambda truth, mode: truth + draw.gauss(0, deviation)


# the edits


def test_graded_edits_have_the_truth_that_they_were_made_with():
    groups = 100
    edits = graded(ScenesWorld(24), groups, 0)
    operations = [plan.turns[0].operation for plan in edits.sessions.plans]
    assert set(operations) == set(OPERATIONS)
    assert edits.after.shape == (groups, len(KINDS), 3, 24, 24) and edits.following.shape == (groups, len(KINDS))
    following = dict(zip(KINDS, edits.following.unbind(1), strict=True))
    consistency = dict(zip(KINDS, edits.consistency.unbind(1), strict=True))
    assert following["as planned"].eq(1).all() and consistency["as planned"].gt(0.99).all()
    assert following["unchanged"].eq(0).all() and consistency["unchanged"].gt(0.99).all()
    assert following["wrong colour"].lt(0.6).all() and consistency["wrong colour"].gt(0.99).all()
    assert following["extra"].gt(0.6).all() and following["extra"].mean() > 0.97
    assert all(consistency[kind].lt(0.95).all() for kind in ("wrong cell", "extra", "tint"))
    assert 0.8 < consistency["blur"].mean() < 0.95
    assert consistency["tint"].mean() < 0.6 and following["tint"].mean() > 0.9
    for operation, kind, value in (("add", "wrong cell", 0), ("remove", "wrong cell", 0), ("recolour", "wrong cell", 1),
                                   ("count", "missing", 1), ("reshape", "missing", 0)):  # fmt: skip
        rows = torch.tensor([one == operation for one in operations])
        assert following[kind][rows].sub(value).abs().max() < 0.1, (operation, kind)


def test_graded_edits_are_different_images_that_the_worlds_judge_can_read_again():
    edits = graded(ScenesWorld(24), 30, 1)
    apart = (edits.after[:, :, None] - edits.after[:, None]).abs().amax((3, 4, 5))
    assert (apart + torch.eye(len(KINDS))).min() > 0.02
    found = judge(edits.sessions, 1, edits.before, edits.after[:, 0])
    assert found.done.all() and found.kept.gt(0.99).all()
    assert torch.equal(edits.after, (edits.after * 255).round() / 255)


def test_graded_edits_follow_from_the_seed():
    first, again, other = (graded(ScenesWorld(18), 3, seed) for seed in (5, 5, 6))
    assert torch.equal(first.after, again.after) and not torch.equal(first.after, other.after)
    with pytest.raises(InputError, match="groups=0"):
        graded(ScenesWorld(24), 0, 0)


# the command


def test_a_biased_judge_needs_one_reply(tmp_path, server, capsys):
    server.say = lambda truth, mode: 0.4 + 0.5 * truth
    found = measured(server, tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.toml", "metrics.json", "report.html"}
    assert (found["method"], found["instrument"], found["judge"]) == ("diagnose", "judge", "remote:eye")
    assert found["replies"] == 4 and found["refused"] == {}
    assert found["recommended"]["4"]["mode"] == "direct" and found["recommended"]["4"]["n"] == 1
    one = found["modes"]["direct"]["following"]
    assert one["bias_at"]["0.0"]["value"] == pytest.approx(0.4, abs=0.06)
    assert one["bias_at"]["1.0"]["value"] == pytest.approx(-0.1, abs=0.01)
    assert one["slope_within"]["value"] == pytest.approx(0.5, abs=0.01) and one["variance"]["value"] == 0
    assert one["correlation_within"]["value"] > 0.99 and one["replies_needed"] == 1
    assert found["kinds"]["following"]["unchanged"] == {"truth": 0, "direct": pytest.approx(0.4)}
    assert list(found["kinds"]["consistency"]) == list(KINDS)
    text = " ".join(capsys.readouterr().err.split())
    assert "Use mode=direct and n=1: direct with" in text
    page = (tmp_path / "run" / "report.html").read_text()
    assert "To be trusted" in page and page.count("data:image/png") == 4 * (1 + len(KINDS))
    (command,) = re.findall(r"fieldsmith edit --judge &#34;(.+?)&#34;", page)
    assert shlex.split(command.replace("&amp;", "\\&"))[0].endswith("mode=direct&n=1") and "temperature=0.7" in command
    body = server.bodies[0]
    assert (body["n"], body["temperature"]) == (4, 0.7)


def test_a_noisy_judge_needs_several(tmp_path, server):
    server.say = noisy(0.4)
    found = measured(server, tmp_path / "run", "mode=reasoning&n=6")
    one = found["modes"]["reasoning"]["both"]
    assert found["recommended"]["4"] == {**found["recommended"]["4"], "mode": "reasoning", "n": 4}
    assert found["recommended"]["16"]["n"] == one["replies_needed"] > 4
    assert one["variance"]["value"] > 0.03 and one["correlation_within"]["value"] < 0.9
    reached = [found["recommended"][calls]["correlation_within"] for calls in ("1", "4", "16")]
    for name in ("following", "consistency", "both"):
        assert [part[name] for part in reached] == sorted(part[name] for part in reached)
    assert reached[1]["following"] > reached[1]["consistency"] and "By question that is" in found["words"]


@pytest.mark.parametrize(("worse", "good"), [(0.8, True), (0.5, None), (0.2, False), (-0.3, False)])
def test_the_question_that_a_judge_answers_worse_decides(worse, good):
    reached = {"both": 0.9, "following": 0.95, "consistency": worse}
    assert verdict_of(Advice(Recommendation("direct", 2, ""), reached))[0] is good


def test_of_two_modes_the_one_that_ranks_better_for_its_cost_is_named(tmp_path, server, capsys):
    random_reply = noisy(0.5)
    server.say = lambda truth, mode: random_reply(truth, mode) if mode == "reasoning" else 0.4 + 0.5 * truth
    found = measured(server, tmp_path / "run", "mode=reasoning&mode=expected&mode=direct&n=2")
    assert list(found["modes"]) == ["reasoning", "direct"] and found["recommended"]["4"]["mode"] == "direct"
    # a server without log-probabilities is measured in its other modes
    assert list(found["refused"]) == ["expected"] and "gave no log-probabilities" in found["refused"]["expected"]
    assert "mode expected failed" in " ".join(capsys.readouterr().err.split())
    assert "mode expected failed" in (tmp_path / "run" / "report.html").read_text()


def test_a_judge_that_says_one_thing_is_not_to_be_trusted(tmp_path, server):
    server.say = lambda truth, mode: 0.7
    found = measured(server, tmp_path / "run", "mode=direct&n=2")
    assert found["recommended"] == {}
    assert "no better than chance in mode direct; take another model" in found["words"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Not to be trusted" in page and "fieldsmith edit --judge" not in page


def test_all_modes_are_asked_where_none_is_named(tmp_path, server, capsys):
    server.down_after = 0
    words = ["diagnose", "judge", "--judge", server.address("n=2"), "--samples", "2", "--out", str(tmp_path / "run")]
    assert main(words) == 3  # it was there when the run began
    text = " ".join(capsys.readouterr().err.split())
    assert all(f"mode {mode} failed" in text for mode in MODES) and "failed after 2 attempts: status 500" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("address", "more", "says"),
    [
        ("remote:http://127.0.0.1:9/v1?model=eye", [], "judge at http://127.0.0.1:9/v1 does not answer"),
        ("http://127.0.0.1:9/v1", [], "judge 'http://127.0.0.1:9/v1' is unknown; use remote:"),
        ("exact", [], "'exact' is not in the vocabulary of judges"),
        ("exact", ["--world", "moon"], "invalid choice 'moon' for argument '--world'"),
        ("remote:nowhere", [], "'nowhere' is no address of a judge"),
        ("mode=guess", [], "'guess'"),
        ("n=1", [], "n=1 reply has no variance to measure; give n=2 or more"),
        ("n=0", [], "n=0 of the judge at .*: give at least 1"),
        ("temperature=0", [], "n=4 of the judge at .* at temperature 0 would be one reply 4 times"),
        ("model=ear", [], "'ear'"),
        ("checks=Done?&mode=direct", [], "means nothing in mode=direct"),
        ("", ["--samples", "1"], "samples=1 is too few"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, server, capsys, address, more, says):
    full = address if ":" in address or address == "exact" else server.address(address)
    assert main(["diagnose", "judge", "--judge", full, *more, "--out", str(tmp_path / "run")]) == 2
    sentence = " ".join(capsys.readouterr().err.split())
    assert re.search(says, sentence), sentence
    assert not re.search(r"[.!] [A-Z]|Traceback", sentence), sentence
    assert not (tmp_path / "run").exists() and not server.bodies


# a judge of images


@pytest.mark.parametrize("world", ["shapes", "emoji"])
def test_a_judge_of_images_is_held_to_the_exact_one(tmp_path, world):
    exact = asked.load(world, {"shapes": 32, "emoji": 48}[world])
    assert exact is not None

    def right(images, concepts):
        small = images[..., ::UPSCALE, ::UPSCALE]
        seen = exact.world.judge(small)
        return [float(seen.shows(exact.parse(words))[i]) for i, words in enumerate(concepts)]

    found = fs.diagnose(None, "judge", judge=right, world=world, samples=6, out=tmp_path / "run").numbers
    assert found["agrees"]["value"] == 1 and found["agrees"]["n"] == 12 and found["world"] == world
    assert found["sees it where it is"]["n"] >= 6 and found["sees it where it is not"]["value"] == 0
    assert "By what was asked for" in (tmp_path / "run" / "report.html").read_text()
    blind = fs.diagnose(None, "judge", judge=lambda images, concepts: [1.0] * len(images), world=world, samples=60)
    assert blind.numbers["sees it where it is not"]["value"] == 1 and blind.numbers["answer"]["word"] != "To be trusted"
    assert 0.4 < blind.numbers["agrees"]["value"] < 0.75 and "agrees with the exact judge in" in blind.words


def test_a_judge_of_other_things_is_refused(tmp_path):
    def shows(images, concepts):
        return [1.0] * len(images)

    shows.names = ("a cat",)
    with pytest.raises(InputError, match="is not in the vocabulary of what judge"):
        fs.diagnose(None, "judge", judge=shows, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
