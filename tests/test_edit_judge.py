"""The judge of edits, against a real server in a thread that says what it is told to."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import pytest
import torch

from fieldsmith.errors import InputError, RewardError, RunError
from fieldsmith.rewards import sessions
from fieldsmith.rewards.edits import CONSISTENCY, FOLLOWING, KEPT, EditJudge, EditScores, disagreement, edit_judge

BEFORE = torch.zeros(2, 3, 4, 4)
AFTER = torch.ones(2, 3, 4, 4)
TOLD = ["add a {dog}", "remove the cat"]


def completion(*texts: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]}


def with_tokens(*tokens: str | dict[str, float]) -> dict[str, Any]:
    """One text with log-probabilities: words that are sure, or words with their probabilities, the first being said."""
    content = []
    for token in tokens:
        likely = {token: 1.0} if isinstance(token, str) else token
        top = [{"token": word, "logprob": math.log(p)} for word, p in likely.items()]
        content.append({**top[0], "top_logprobs": top})
    text = "".join(part["token"] for part in content)
    return {"message": {"content": text}, "logprobs": {"content": content}}


class Server:
    """A chat server; `answer(question, n)` gives what it says to a question's text when n replies are asked for."""

    def __init__(self) -> None:
        self.answer: Callable[[str, int], Any] = lambda question, n: completion(*["7"] * n)
        self.bodies: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self.say({"data": [{"id": "eye"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                self.say(server.answer(body["messages"][0]["content"][-1]["text"], body.get("n", 1)))

            def say(self, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def judge(self, options: str = "") -> EditJudge:
        # one at a time, so that answers in turn go to questions in order
        quick = "model=eye&pause=0.01&timeout=5&retries=2&concurrency=1"
        return edit_judge(f"http://127.0.0.1:{self.http.server_port}/v1?{quick}&{options}".rstrip("&"))

    def in_turn(self, *answers: Any) -> None:
        """Give these answers, the last one for ever."""
        self.answer = lambda question, n: answers[min(len(self.bodies), len(answers)) - 1]

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"][-1]["text"] for body in self.bodies]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


# what is asked, and what comes out


def test_two_questions_an_edit_with_both_images(server):
    server.in_turn(*map(completion, ("8", "3", "10", "0/10")))
    scores = server.judge()(BEFORE, AFTER, TOLD)
    assert scores.following.tolist() == pytest.approx([0.8, 0.3])
    assert scores.consistency.tolist() == pytest.approx([1, 0])
    assert scores.spread_following.tolist() == scores.spread_consistency.tolist() == [0, 0]
    assert scores.following.dtype == torch.float32
    assert [FOLLOWING in question for question in server.questions] == [True, True, False, False]
    assert [CONSISTENCY in question for question in server.questions] == [False, False, True, True]
    assert ['instruction was: "add a {dog}".' in question for question in server.questions] == [1, 0, 1, 0]
    kinds = [part["type"] for part in server.bodies[0]["messages"][0]["content"]]
    urls = [part["image_url"]["url"] for part in server.bodies[0]["messages"][0]["content"][:2]]
    assert kinds == ["image_url", "image_url", "text"] and urls[0] != urls[1]
    assert "logprobs" not in server.bodies[0] and server.bodies[0]["max_tokens"] == 1024


def test_consistency_with_the_first_image_names_all_instructions(server):
    server.judge().consistency(BEFORE, AFTER, [["add a dog", "remove it"], ["add a cat"]])
    assert 'The instruction was: "add a dog; then: remove it".' in server.questions[0]
    assert 'The instruction was: "add a cat".' in server.questions[1]


def test_no_edits_are_no_request(server):
    for mode in ("direct", "checklist"):
        scores = server.judge(f"mode={mode}")(BEFORE[:0], AFTER[:0], [])
        assert scores.following.shape == scores.spread_consistency.shape == (0,)
    assert not server.bodies


def test_replies_are_averaged_and_their_spread_told(server):
    server.in_turn(completion("2", "4", "9"), completion("5", "5", "5"))
    judge = server.judge("n=3&temperature=0.7")
    scores = judge(BEFORE[:1], AFTER[:1], TOLD[:1])
    assert scores.following.tolist() == pytest.approx([0.5])
    assert scores.spread_following.tolist() == pytest.approx([math.sqrt((0.09 + 0.01 + 0.16) / 2)])
    assert (scores.consistency.item(), scores.spread_consistency.item()) == (0.5, 0)
    assert [body["n"] for body in server.bodies] == [3, 3] and judge.name == "edits:eye:direct:n=3"
    # the single replies, as measuring a judge needs them
    assert judge.following(BEFORE[:1], AFTER[:1], TOLD[:1]).tolist() == [
        [pytest.approx(0.2)], [pytest.approx(0.4)], [pytest.approx(0.9)]
    ]  # fmt: skip


def test_scores_of_single_replies_or_of_one_each():
    scores = EditScores.of(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([0.25, 0.5]))
    assert scores.following.tolist() == [0.5, 1] and scores.consistency.tolist() == [0.25, 0.5]
    assert scores.spread_following.tolist() == pytest.approx([math.sqrt(0.5), 0])
    assert scores.spread_consistency.tolist() == [0, 0]


def test_what_was_asked_is_not_asked_again(server, tmp_path):
    judge = server.judge(f"n=2&temperature=1&cache={tmp_path}")
    first = judge(BEFORE, AFTER, TOLD)
    assert len(server.bodies) == 4
    judge.consistency(BEFORE, AFTER, [[told] for told in TOLD])  # at turn 1 the first image is the one before
    server.in_turn(completion("1", "1"))
    again = server.judge(f"n=2&temperature=1&cache={tmp_path}")(BEFORE, AFTER, TOLD)
    assert torch.equal(first.following, again.following) and len(server.bodies) == 4


# modes


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("There were 3 cats. Now 2.\n\nScore: 8", 0.8), ("x\n**Score:** 7.5/10", 0.75), ("Final score: 10.", 1),
        ("score = 0 out of 10", 0), ("3 cats\nThe final score is 4", 0.4),
    ],
)  # fmt: skip
def test_reasoning_ends_with_its_score(server, text, score):
    server.in_turn(completion(text))
    assert server.judge("mode=reasoning").following(BEFORE, AFTER, TOLD).tolist() == [[pytest.approx(score)] * 2]
    assert "step by step" in server.questions[0] and "'Score: NUMBER'" in server.questions[0]


@pytest.mark.parametrize(
    "cut", ["First I see 2 cats and the score would be below 5 since", "Score: 7\nor so", "Score: 11", "Score: -2", "7"]
)
def test_reasoning_without_a_last_score_is_asked_again(server, cut):
    server.in_turn(completion(cut), completion("now 1 cat\nScore: 6"))
    assert server.judge("mode=reasoning").following(BEFORE[:1], AFTER[:1], TOLD[:1]).item() == pytest.approx(0.6)
    assert [body["temperature"] for body in server.bodies] == [0, 0.5]


def test_the_expected_score(server):
    likely = {"9": 0.5, " 9": 0.1, "0": 0.2, "x": 0.2}
    server.in_turn({"choices": [with_tokens(likely)]})
    given = server.judge("mode=expected").following(BEFORE[:1], AFTER[:1], TOLD[:1])
    assert given.item() == pytest.approx(0.6 / 0.8)
    assert "from 0 (not at all) to 9 (fully)" in server.questions[0]
    assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 20


@pytest.mark.parametrize(
    "tokens",
    [
        ["<think>", "3", " cats", "</think>", "\n", {" 6": 0.5, "3": 0.5}],
        ["**", {"6": 0.5, "3": 0.5}, "**"],
        [{"6": 0.5, "3": 0.5}, "/", "9"],
    ],
)
def test_the_expected_score_is_read_where_it_is_said(server, tokens):
    server.in_turn({"choices": [with_tokens(*tokens)] * 2})
    given = server.judge("mode=expected&n=2&temperature=1").following(BEFORE[:1], AFTER[:1], TOLD[:1])
    assert given.tolist() == [[pytest.approx(0.5)]] * 2


def test_an_expected_score_needs_one_digit_and_log_probabilities(server):
    server.in_turn(completion("10"))
    with pytest.raises(RunError, match="it said '10'"):
        server.judge("mode=expected").following(BEFORE[:1], AFTER[:1], TOLD[:1])
    assert len(server.bodies) == 3
    server.in_turn(completion("8"))
    with pytest.raises(RunError, match="no log-probabilities of its score '8'; set mode=direct"):
        server.judge("mode=expected").following(BEFORE[:1], AFTER[:1], TOLD[:1])


CHECKS = "Here they are:\n1. Is there a dog?\n2) **Is it one dog?**\n3. Is it whole?\n4. Is it in the picture?\n"


def test_the_server_writes_checks_once_an_instruction(server):
    def answer(question: str, n: int) -> Any:
        if "Write exactly 4" in question:
            return completion(CHECKS)
        return completion(*["1. yes\n2. No\n3. Yes, no part lacks.\n4. yes"] * n)

    server.answer = answer
    scores = server.judge("mode=checklist&n=2&temperature=1")(AFTER, AFTER * 0.5, ["add a dog"] * 2)
    assert scores.following.tolist() == scores.consistency.tolist() == [0.75, 0.75]
    writes = [question for question in server.questions if "Write exactly 4" in question]
    assert len(writes) == 1 and 'instruction: "add a dog"' in writes[0]
    assert [part["type"] for part in server.bodies[0]["messages"][0]["content"]] == ["text"]
    assert server.questions[1].endswith(
        "1. Is there a dog?\n2. Is it one dog?\n3. Is it whole?\n4. Is it in the picture?"
    )
    assert server.questions[-1].endswith(f"4. {KEPT[3]}") and KEPT[0] in server.questions[-1]


def test_checks_of_the_users_own(server):
    server.answer = lambda question, n: completion("yes\nno" if question.endswith("2. Sharp?") else "1. no " * 4)
    judge = server.judge("mode=checklist&checks=Is '{prompt}' done?|Sharp?")
    assert judge(BEFORE, AFTER, TOLD).following.tolist() == [0.5, 0.5]
    assert "1. Is 'add a {dog}' done?\n2. Sharp?" in server.questions[0]
    assert judge(BEFORE, AFTER, TOLD).consistency.tolist() == [0, 0]


def test_checks_that_are_badly_written_or_answered_are_asked_again(server):
    server.in_turn(
        completion("1. Is there a dog?"), completion(CHECKS), completion("yes, all of them"),
        completion("<think>no?\nyes</think>1. yes, 2. yes, 3. no, 4. no"),
    )  # fmt: skip
    assert server.judge("mode=checklist").following(BEFORE[:1], AFTER[:1], TOLD[:1]).item() == 0.5
    assert len(server.bodies) == 4


# trouble


def test_unreadable_replies_fail_the_run_after_retries(server):
    server.in_turn(completion("7", "lovely"))
    with pytest.raises(RunError, match="failed after 3 attempts: it said 'lovely'"):
        server.judge("n=2&temperature=1")(BEFORE[:1], AFTER[:1], TOLD[:1])


def test_a_server_that_gives_fewer_replies_is_told(server):
    server.in_turn(completion("7"))
    with pytest.raises(RunError, match="gave 1 replies where n=4 were asked for; set n=1"):
        server.judge("n=4&temperature=1")(BEFORE, AFTER, TOLD)


def test_images_and_instructions_must_fit(server):
    with pytest.raises(InputError, match=r"\[2, 2\] images for 1 prompts"):
        server.judge()(BEFORE, AFTER, TOLD[:1])
    with pytest.raises(InputError, match=r"images of shape \(3, 4, 4\); a judge of edits reads"):
        server.judge()(BEFORE[0], AFTER[0], TOLD)
    with pytest.raises(RunError, match="hold NaN"):
        server.judge()(BEFORE, AFTER * torch.nan, TOLD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("mode=thinking", "'thinking' is not in the vocabulary of a judge's modes"),
        ("mod=direct", "'mod' is not in the vocabulary of a judge's options; did you mean 'mode'"),
        ("n=two", "n=two of the judge at .*: expected int"),
        ("n=0", "n=0 of the judge at .*: give at least 1"),
        ("n=4", "n=4 of the judge at .* at temperature 0 would be one reply 4 times; add temperature=0.7"),
        ("concurrency=0", "concurrency=0 of the judge at .*: give at least 1"),
        ("answer=yes-no", "has its own questions; leave answer= and question= out"),
        ("question=Why?", "has its own questions"),
        ("checks=Done?", "means nothing in mode=direct; add mode=checklist"),
        ("mode=checklist&checks=Done?|", "has an empty check"),
    ],
)
def test_bad_options_are_refused(server, options, message):
    with pytest.raises(InputError, match=message):
        server.judge(options)


def test_a_bad_address_or_no_server_is_refused():
    with pytest.raises(InputError, match="'here' is no address of a judge; write http://HOST"):
        edit_judge("here?mode=direct")
    with pytest.raises(InputError, match="does not answer"):
        edit_judge("http://127.0.0.1:9/v1?timeout=0.2")


# judges of turns


class Plan:
    """Two sessions of two turns."""

    def prompts(self, turn: int) -> list[str]:
        return [f"{letter}{turn}" for letter in "ab"]


FIRST = torch.full((2, 3, 4, 4), 0.5)


def recorded(calls: list[tuple[float, list[str]]]) -> Callable[..., Any]:
    def judge(before: torch.Tensor, after: torch.Tensor, instructions: list[str]) -> Any:
        calls.append((before.mean().item(), list(instructions)))
        before.zero_(), instructions.clear()
        return [len(calls) / 10] * 2, numpy.array([len(calls) / 100] * 2)

    return judge


@pytest.mark.parametrize("against", ["first", "previous"])
def test_a_function_judges_turns(against):
    calls: list[tuple[float, list[str]]] = []
    judge = sessions.load(recorded(calls), against)
    first = judge(Plan(), 1, BEFORE.clone(), AFTER, FIRST)
    assert first.following.tolist() == pytest.approx([0.1, 0.1]) and first.consistency.tolist() == pytest.approx(
        [0.01] * 2
    )
    second = judge(Plan(), 2, AFTER, AFTER, FIRST)
    assert second.following.tolist() == pytest.approx([0.2, 0.2])
    asked = [(0.0, ["a1", "b1"]), (1.0, ["a2", "b2"])]
    if against == "first":
        asked.append((0.5, ["a1; then: a2", "b1; then: b2"]))
    assert calls == asked
    assert second.consistency.tolist() == pytest.approx([len(asked) / 100] * 2)
    assert AFTER.all() and FIRST.eq(0.5).all() and sessions.load(judge) is judge


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "returned a NoneType that is no pair; return .following, consistency."),
        ([1.0, 2.0, 3.0], "returned a list that is no pair"),
        ([1.0, 2.0], r"\(following\) returned 1.0 for 2 images, the first of prompt 'a1'"),
        (([0.1, 0.2], [0.1, float("nan")]), r"\(consistency\) returned nan for image 2 of 2, prompt 'b1'"),
        (([0.1], [0.1]), r"\(following\) returned a list of 1"),
        ("ab", r"\(following\) returned 'a'"),
    ],
)
def test_a_function_that_gives_no_two_scores_an_edit_is_named(output, message):
    judge = sessions.load(lambda before, after, instructions: output)
    with pytest.raises(RewardError, match=f"^judge '<lambda>' {message}"):
        judge(Plan(), 1, BEFORE, AFTER, FIRST)


def test_a_judge_of_turns_that_raises_or_takes_other_arguments_is_named():
    judge = sessions.load(lambda before, after, instructions: 1 / 0)
    with pytest.raises(RewardError, match=r"raised ZeroDivisionError.*for 2 images, the first of prompt 'a1'"):
        judge(Plan(), 1, BEFORE, AFTER, FIRST)
    with pytest.raises(RunError, match="2 of 2 images hold NaN"):
        judge(Plan(), 1, BEFORE, AFTER * torch.nan, FIRST)
    with pytest.raises(
        RewardError, match=r"takes \(images, prompts\), but it is called with \(before, after, instruct"
    ):
        sessions.load(lambda images, prompts: 0)


def test_words_name_a_judge_of_turns(server, tmp_path):
    (tmp_path / "mine.py").write_text("def fine(before, after, instructions):\n    return [1, 1], [0, 0]\n")
    judge = sessions.load(f"{tmp_path}/mine.py:fine")
    assert judge(Plan(), 1, BEFORE, AFTER, FIRST).following.tolist() == [1, 1]
    assert isinstance(sessions.load("exact", "previous"), sessions.Exact)
    base = f"http://127.0.0.1:{server.http.server_port}/v1"
    remote = sessions.load(f"remote:{base}?concurrency=1", "first")
    assert remote(Plan(), 2, BEFORE, AFTER, FIRST).consistency.tolist() == pytest.approx([0.7, 0.7])
    assert 'instruction was: "a1; then: a2"' in server.questions[-2]
    for words, message in (("exakt", "judge 'exakt' is unknown"), ("remote:here", "is no address of a judge")):
        with pytest.raises(InputError, match=message):
            sessions.load(words)


# a judge that disagrees with itself


def scores(following: list[float], spread: float, consistency: list[float] | None = None) -> EditScores:
    f = torch.tensor(following)
    g = torch.linspace(0, 1, len(f)) if consistency is None else torch.tensor(consistency)
    return EditScores(f, g, torch.full_like(f, spread), torch.zeros_like(f) + (0 if consistency is None else spread))


def test_a_judge_that_tells_edits_apart_is_left_alone():
    assert disagreement(scores([0.0, 1.0], 0.7), 4) is None  # deviation of 0 and 1: .707
    assert disagreement(scores([0.5, 0.5], 0.0), 4) is None
    assert disagreement(scores([0.5, 0.5], 0.3), 1) is None  # one reply says nothing of noise
    assert disagreement(scores([0.5], 0.3), 4) is None


def test_a_judge_that_disagrees_with_itself_is_named_with_numbers():
    output = disagreement(scores([0.4, 0.6], 0.3), 4)  # .02 < .09 / 4: nothing but noise
    assert output == (
        "the judge's 4 replies on one edit differ by 0.30 in instruction following, its scores of 2 edits by 0.14, so "
        "it ranks them by chance; more replies than n=4 will not help: lower the temperature, set mode=expected or "
        "take another model"
    )
    # .0841 - .09 / 4 = .0616 of variance is left for the edits: 10 * .09 / .0616 = 14.6
    far = 0.29 / math.sqrt(2)
    output = disagreement(scores([0.5 - far, 0.5 + far], 0.3), 4)
    assert output is not None and output.endswith("so it ranks them by chance; set n=15 (now 4)")
    both = disagreement(scores([0.4, 0.6], 0.3, [0.9, 0.9]), 4)
    assert both is not None and "in content consistency, its scores of 2 edits by 0.00" in both


def test_a_judge_of_pure_noise_is_found(server):
    generator = torch.Generator().manual_seed(0)
    server.answer = lambda question, n: completion(*map(str, torch.randint(11, (n,), generator=generator).tolist()))
    found = server.judge("n=4&temperature=1")(torch.rand(12, 3, 2, 2), torch.rand(12, 3, 2, 2), ["a"] * 12)
    output = disagreement(found, 4)
    assert output is not None and "instruction following" in output and "content consistency" in output
