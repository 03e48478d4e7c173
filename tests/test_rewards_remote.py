"""The judge over HTTP, against a real server in a thread that misbehaves on purpose."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import socket
import struct
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import fieldsmith as fs
from fieldsmith import servers
from fieldsmith.errors import InputError, RewardError, RunError
from fieldsmith.rewards import load, remote
from fieldsmith.rewards.remote import Options, RemoteJudge, read_address
from fieldsmith.rewards.replies import Token, expected_score, read_number, read_reply, read_yes_no

IMAGE = torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(0))
QUICK = "model=eye&pause=0.01&timeout=5"


def completion(*texts: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, **more} for text in texts]}


class Server:
    """A chat server whose answer to the n-th question (from 0) is `answer(body, n)`.

    That is a dict (sent as JSON), bytes (sent as they are), (status, headers[, bytes]), 'reset', 'hang up', 'huge', or
    a number of seconds to wait before an answer that nobody may hear.
    """

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Any] = lambda body, n: completion("7")
        self.models: Any = {"data": [{"id": "eye"}]}
        self.status = 200
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.times: list[float] = []
        self.in_flight = self.most = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                server.headers.append(self.headers)
                self.say(server.status, json.dumps(server.models).encode())

            def do_POST(self) -> None:
                server.headers.append(self.headers)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.times.append(time.monotonic())
                    server.in_flight += 1
                    server.most = max(server.most, server.in_flight)
                answer = server.answer(body, number)
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = completion("9")
                with server.lock:  # before the client hears the answer and sends its next question
                    server.in_flight -= 1
                self.give(answer)

            def give(self, answer: Any) -> None:
                if answer == "reset":  # linger 0: the client sees a reset, not an end
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                elif answer == "hang up":  # in the middle of a body
                    self.send_response(200)
                    self.send_header("Content-Length", "100")
                    self.end_headers()
                    self.wfile.write(b'{"choices')
                    self.close_connection = True
                elif answer == "huge":  # without saying how much will come
                    self.send_response(200)
                    self.end_headers()
                    with contextlib.suppress(OSError):
                        for _ in range(1000):
                            self.wfile.write(b" " * 10_000)
                    self.close_connection = True
                elif isinstance(answer, tuple):
                    content = answer[2] if len(answer) > 2 else b'{"error": "it is too hot here"}'
                    self.say(answer[0], content, answer[1])
                else:
                    self.say(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def say(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                try:
                    self.send_response(status)
                    for name, value in (headers or {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client has given up

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def judge(self, options: str = QUICK) -> RemoteJudge:
        return RemoteJudge(*read_address(f"{self.base}?{options}", Options))

    def in_turn(self, *answers: Any) -> None:
        """Give these answers, the last one for ever."""
        self.answer = lambda body, n: answers[min(n, len(answers) - 1)]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def images(n: int) -> torch.Tensor:
    return torch.linspace(0, 1, n)[:, None, None, None].expand(n, 3, 4, 4)


def pixels(body: dict[str, Any]) -> numpy.ndarray:
    url = next(part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url")
    return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


# what is asked, and what is read


def test_a_score_is_asked_of_the_image_and_prompt(server):
    given = load(f"remote:{server.base}?{QUICK}")(IMAGE, ["a red {square}"])
    assert given.tolist() == [pytest.approx(0.7)]
    (body,) = server.bodies
    assert body["model"] == "eye" and body["temperature"] == 0
    assert "show: a red {square}?" in body["messages"][0]["content"][-1]["text"]
    expected = (IMAGE[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert (pixels(body) == expected).all()


def test_a_yes_or_no_question(server):
    server.in_turn(completion("Well, no... Yes."), completion("NO"))
    one = server.judge(QUICK + "&answer=yes-no&concurrency=1")
    assert one(images(2), ["a", "b"]).tolist() == [1, 0]
    assert one.name == "remote:eye"


def test_a_question_of_the_users_own(server):
    server.judge(QUICK + "&question=Is%20{prompt}%20sharp?")(IMAGE, ["it"])
    assert server.bodies[0]["messages"][0]["content"][-1]["text"] == "Is it sharp?"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 0.8), ("8/10", 0.8), ("I see 2 squares, so 8 out of 10.", 0.8), ("**7.5**", 0.75), ("10", 1), ("0.", 0),
        ("<think>maybe 3</think>\n6 / 10", 0.6), ("11", None), ("-2", None), ("80/100", None), ("none", None),
        ("", None), ("model v2", None), ("score:4", 0.4),
    ],
)  # fmt: skip
def test_the_last_number_is_read(text, value):
    assert read_number(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(("text", "value"), [("yes", 1), ("No, not yes. No!", 0), ("nothing", None), ("YES\n", 1)])
def test_the_last_yes_or_no_is_read(text, value):
    assert read_yes_no(text) == value


def test_several_images_replies_and_log_probabilities_for_other_judges(server):
    top = [
        {"token": "3", "logprob": -0.2876820724},
        {"token": " 5", "logprob": -1.3862943611},
        {"token": "x", "logprob": -9.0},
    ]
    server.answer = lambda body, n: completion("3", "5", logprobs={"content": [{**top[0], "top_logprobs": top}]})
    other = server.judge(QUICK + "&temperature=0.7")
    (reply,) = other.ask([IMAGE, 1 - IMAGE], ["make it red"], "Was '{prompt}' done?", n=2, logprobs=True)
    (body,) = server.bodies
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert (body["n"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (2, True, 20, 0.7)
    assert reply.texts == ("3", "5")
    token = reply.tokens[0][0]
    assert token.text == "3" and token.alternatives[" 5"] == pytest.approx(-1.3862943611)
    assert expected_score(token, {str(n): float(n) for n in range(6)}) == pytest.approx((0.75 * 3 + 0.25 * 5) / 1)
    assert expected_score(Token("x", 0.0, {"x": 0.0}), {"1": 1.0}) is None


def test_replies_without_log_probabilities_have_no_tokens():
    assert read_reply(completion("7")).tokens == ((),)
    with pytest.raises(IndexError):
        read_reply({"choices": []})


def test_many_replies_need_a_temperature(server):
    with pytest.raises(InputError, match="n=3 replies at temperature 0"):
        server.judge().ask(IMAGE, ["a"], "?", n=3)


def test_images_and_prompts_must_fit_and_be_finite(server):
    with pytest.raises(InputError, match=r"\[2\] images for 1 prompts"):
        server.judge().ask(images(2), ["a"], "?")
    with pytest.raises(RunError, match="1 of 1 images hold NaN"):
        server.judge()(torch.full((1, 3, 2, 2), torch.nan), ["a"])
    assert not server.bodies


def test_no_images_are_no_request(server):
    assert server.judge()(torch.zeros(0, 3, 4, 4), []).shape == (0,)


# many at once


def test_order_is_kept_and_the_limit_of_requests_in_flight_is_respected(server):
    def by_brightness(body: dict[str, Any], n: int) -> dict[str, Any]:
        time.sleep(0.05 if n % 3 == 0 else 0.01)  # later questions overtake earlier ones
        return completion(str(int(pixels(body)[0, 0, 0]) // 25))

    server.answer = by_brightness
    given = server.judge(QUICK + "&concurrency=3")(images(11), ["a"] * 11)
    assert given.tolist() == pytest.approx([round(25.5 * i) // 25 / 10 for i in range(11)])
    assert 1 < server.most <= 3


def test_processes_share_the_limit(server, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    server.answer = lambda body, n: time.sleep(0.02) or completion("5")
    server.judge(QUICK + "&concurrency=4")(images(8), ["a"] * 8)
    assert server.most == 2  # in this one of two


def test_the_limit_holds_over_calls_from_several_threads(server):
    server.answer = lambda body, n: time.sleep(0.02) or completion("5")
    one = server.judge(QUICK + "&concurrency=2")
    threads = [threading.Thread(target=one, args=(images(4), [str(k)] * 4)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.most <= 2 and len(server.bodies) == 12


# the cache


def test_what_was_asked_is_not_asked_again(server):
    one = server.judge()
    first = one(images(3), ["a", "a", "b"])
    assert torch.equal(one(images(3), ["a", "a", "b"]), first) and len(server.bodies) == 3
    one(images(3), ["a", "a", "c"])  # another prompt
    one.ask(images(3), ["a", "a", "b"], "Another question about {prompt}?")
    assert len(server.bodies) == 3 + 1 + 3
    one(images(1).expand(2, 3, 4, 4), ["d", "d"])  # twins in one batch
    assert len(server.bodies) == 8


def test_the_cache_on_disk_outlives_the_judge(server, tmp_path):
    options = f"{QUICK}&cache={tmp_path}/replies"
    server.judge(options)(images(2), ["a", "b"])
    server.in_turn(completion("1"))
    assert server.judge(options)(images(2), ["a", "b"]).tolist() == pytest.approx([0.7, 0.7])
    assert len(server.bodies) == 2
    next((tmp_path / "replies").glob("*.json")).write_text('{"choi')  # cut short: asked again
    assert sorted(server.judge(options)(images(2), ["a", "b"]).tolist()) == pytest.approx([0.1, 0.7])
    assert len(server.bodies) == 3


def test_a_cache_that_is_no_folder_is_refused(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is no folder"):
        server.judge(f"{QUICK}&cache={tmp_path}/file")


# a server that misbehaves, then behaves


@pytest.mark.parametrize(
    "first",
    [
        (500, {}), (503, {}), "reset", b"<html>", b"\xff\xfe", b"[]", b"null", {"choices": []},
        {"choices": [{"message": None}]}, completion("a lovely picture"), completion("I would say 11"), completion(""),
        (429, {"Retry-After": "soon"}), "hang up", completion("nan"), b'{"choices": NaN}', b"[" * 100_000,
        (200, {"Content-Encoding": "gzip"}, gzip.compress(json.dumps(completion("9")).encode(), mtime=0)),
    ],
    ids=lambda first: str(first)[:60],
)  # fmt: skip
def test_trouble_that_passes_is_retried(server, first):
    server.in_turn(first, first, completion("I looked, and I give it 4."))
    assert server.judge()(IMAGE, ["a"]).tolist() == [pytest.approx(0.4)]
    assert len(server.bodies) == 3


def test_unreadable_words_are_asked_again_with_some_chance(server):
    server.in_turn(completion("hm"), completion("4"))
    server.judge()(IMAGE, ["a"])
    assert [body["temperature"] for body in server.bodies] == [0, 0.5]


def test_retry_after_is_obeyed(server):
    server.in_turn((429, {"Retry-After": "0.4"}), completion("4"))
    server.judge()(IMAGE, ["a"])
    assert server.times[1] - server.times[0] >= 0.4


def test_pauses_grow_with_jitter_that_repeats_with_the_seed(server, monkeypatch):
    def pauses(seed: int) -> list[float]:
        asked: list[float] = []

        class Event(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                asked.append(timeout or 0.0)
                return False

        monkeypatch.setattr(remote, "threading", types.SimpleNamespace(Event=Event))
        server.in_turn((500, {}))
        with pytest.raises(RunError):
            server.judge(f"model=eye&pause=2&retries=7&seed={seed}")(IMAGE, ["a"])
        return asked

    one, same, other = pauses(0), pauses(0), pauses(1)
    for attempt, pause in enumerate(one):
        assert min(60, 1 * 2**attempt) <= pause <= min(60, 3 * 2**attempt)
    assert len(one) == 7 and one[-1] == 60  # the longest pause
    assert one == same != other


def test_a_slow_server_times_out_and_is_asked_again(server):
    server.in_turn(0.6, completion("4"))
    assert server.judge("model=eye&pause=0.01&timeout=0.2")(IMAGE, ["a"]).tolist() == [pytest.approx(0.4)]


# a server that does not come back


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {}), "failed after 3 attempts: status 500.*too hot"),
        ("reset", "failed after 3 attempts"),
        (b"<html>", "failed after 3 attempts: it sent no JSON"),
        (b"[1]", r"failed after 3 attempts: it sent \[1\], which is no chat completion"),
        (completion("I cannot help with that"), "failed after 3 attempts: it said 'I cannot help with that'"),
        (completion("42"), r"it said '42' \(about prompt 'a'\); look at its log, then resume"),
        ((400, {}), "failed after 1 attempts: status 400.*too hot"),
        ((404, {}), "failed after 1 attempts: status 404"),
    ],
)
def test_trouble_that_stays_fails_the_run(server, answer, message):
    server.in_turn(answer)
    with pytest.raises(RunError, match=message):
        server.judge(QUICK + "&retries=2")(IMAGE, ["a"])


def test_a_judge_that_is_always_too_slow_fails_the_run(server):
    server.in_turn(0.5)
    with pytest.raises(RunError, match="failed after 2 attempts: timed out"):
        server.judge("model=eye&pause=0.01&timeout=0.1&retries=1")(IMAGE, ["a"])


def test_a_server_that_dies_midway_fails_the_run(server):
    one = server.judge(QUICK + "&retries=1")
    one(IMAGE, ["a"])
    server.close()
    with pytest.raises(RunError, match=r"failed after 2 attempts: .*refused"):
        one(IMAGE, ["b"])
    assert one(IMAGE, ["a"]).tolist() == [pytest.approx(0.7)]  # what is known needs no server


def test_one_failure_stops_the_batch(server):
    server.answer = lambda body, n: (400, {}) if n == 0 else (500, {})
    begun = time.monotonic()
    with pytest.raises(RunError):
        server.judge("model=eye&pause=5&concurrency=2")(images(6), ["a"] * 6)
    assert time.monotonic() - begun < 4 and len(server.bodies) < 6


@pytest.mark.parametrize(
    "answer", ["huge", b"{" + b" " * 2_000_000 + b"}", (400, {}, b"x" * 2_000_000)], ids=["unsaid", "said", "refusal"]
)
def test_an_answer_that_is_huge_is_not_read_to_its_end(server, answer, monkeypatch):
    monkeypatch.setattr(servers, "LARGEST_ANSWER", 2**20)
    server.in_turn(answer, completion("4"))
    with pytest.raises(RewardError, match="failed after 1 attempts: it sent more than 1 MiB"):
        server.judge(QUICK + "&retries=0")(IMAGE, ["a"])
    assert server.judge()(IMAGE, ["a"]).tolist() == [pytest.approx(0.4)]


def test_a_redirect_is_not_followed_but_named(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.in_turn((307, {"Location": f"{server.base}/elsewhere"}))
    with pytest.raises(RewardError, match=r"failed after 1 attempts: status 307, it points to .*/elsewhere; give that"):
        server.judge(QUICK + "&key=JUDGE_KEY")(IMAGE, ["a"])
    assert len(server.bodies) == 1


# before the run


def test_a_server_that_is_not_there_is_bad_input(server):
    server.close()
    with pytest.raises(InputError, match=f"judge at {server.base} does not answer: .*; start it or fix its address"):
        server.judge()


def test_a_host_that_does_not_exist_is_bad_input(monkeypatch):
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InputError, match=r"does not answer: .*not known"):
        load("remote:http://no-such-host:1/v1?model=eye")


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key"), (404, "ends in /v1"), (503, "status 503.*ready")]
)
def test_a_server_that_refuses_is_bad_input(server, status, message):
    server.status = status
    with pytest.raises(InputError, match=message):
        server.judge()


@pytest.mark.parametrize("models", [[], {"data": [{}]}, "x", None])
def test_a_server_of_another_kind_is_bad_input(server, models):
    server.models = models
    with pytest.raises(InputError, match="is no OpenAI-compatible server"):
        server.judge()


def test_the_model_is_checked_and_found_where_there_is_one(server):
    assert server.judge("pause=0").model == "eye"
    with pytest.raises(InputError, match=r"'eyes' is not in the vocabulary of models at .*did you mean 'eye'"):
        server.judge("model=eyes")
    server.models = {"data": [{"id": "one"}, {"id": "two"}]}
    with pytest.raises(InputError, match=r"has 2 models \(one, two\); choose one"):
        server.judge("pause=0")


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.judge(QUICK + "&key=JUDGE_KEY")
    assert server.headers[-1]["Authorization"] == "Bearer secret"
    with pytest.raises(InputError, match=r"environment variable NO_KEY.*is not set"):
        server.judge(QUICK + "&key=NO_KEY")


def test_a_key_is_shown_in_no_message(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.in_turn((400, {}, b"the key secret is wrong"))
    with pytest.raises(RewardError, match=r"status 400, the key \*\*\* is wrong") as caught:
        server.judge(QUICK + "&key=JUDGE_KEY")(IMAGE, ["a"])
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(InputError, match=r"JUDGE_KEY.*is not set to a key") as refusal:
        server.judge(QUICK + "&key=JUDGE_KEY")
    assert "lines" not in str(refusal.value)


def test_a_key_that_is_written_into_the_address_is_refused_and_not_shown(server):
    for words in (f"{server.base}?{QUICK}&key=sk-hidden", f"http://me:hidden@{server.base.removeprefix('http://')}"):
        with pytest.raises(InputError, match=r"put the key into an environment variable.*\?key=VARIABLE") as caught:
            read_address(words, Options)
        assert "hidden" not in str(caught.value)


def test_a_runs_folder_holds_no_key_and_its_answers_judge_it_again(server, monkeypatch, tmp_path, small_flux_folder):
    """Every image that is judged is known by its hash, so that the same run asks nothing any more."""
    monkeypatch.setenv("JUDGE_KEY", "hidden-key-1234")
    server.answer = lambda body, n: completion(str(int(pixels(body).sum()) % 10))
    settings: dict[str, Any] = {
        "prompts": ("red", "blue"),
        "reward": f"remote:{server.base}?{QUICK}&key=JUDGE_KEY&cache={tmp_path / 'answers'}",
        "epochs": 1, "prompts_per_epoch": 2, "rollouts": 4, "steps": 2, "chunk": 8, "evaluate": 1, "previews": 0,
        "ema": None,
    }  # fmt: skip
    first = fs.align(str(small_flux_folder), out=tmp_path / "run", **settings)
    asked = len(server.bodies)
    assert asked == len(list((tmp_path / "answers").iterdir())) > 8
    assert any("hidden-key-1234" in str(headers) for headers in server.headers)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.toml", "report.html", "metrics.jsonl", "metrics.json"} <= {path.name for path in files}
    assert not [path for path in files if b"hidden-key" in path.read_bytes()]
    server.in_turn("reset")
    again = fs.align(str(small_flux_folder), out=tmp_path / "again", **settings)
    assert len(server.bodies) == asked
    assert again.metrics["after"] == first.metrics["after"]


def test_the_keys_of_another_service_are_not_sent(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "private")
    server.judge()(IMAGE, ["a"])
    assert len(server.headers) == 2
    assert not any("private" in value or "none" in value for headers in server.headers for value in headers.values())
    assert not any("Authorization" in headers for headers in server.headers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("modell=x", "'modell' is not in the vocabulary of a judge's options; did you mean 'model'"),
        ("timeout=long", "timeout=long of the judge at .*: expected float"),
        ("timeout=nan", "timeout=nan"),
        ("concurrency=0", "concurrency=0 of the judge at .*: give at least 1"),
        ("retries=-1", "give at least 0"),
        ("answer=yes", "did you mean 'yes-no'"),
    ],
)
def test_bad_options_are_refused(server, options, message):
    with pytest.raises(InputError, match=message):
        server.judge(options)
