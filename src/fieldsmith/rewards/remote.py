"""A judge behind HTTP: any OpenAI-compatible chat server that sees images (vLLM, SGLang), asked in words.

`reward` makes a reward of one; `RemoteJudge.ask` puts any question about one or several images and gives the replies as
they are, with log-probabilities of their tokens where asked, for judges that read more than one number. A server that
is not there when the run starts is bad input; one that goes away later fails the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError, check_word
from fieldsmith.rewards.replies import Reply, data_uri, read_number, read_reply, read_yes_no
from fieldsmith.rewards.reward import Reward, check_images
from fieldsmith.run import write_atomically
from fieldsmith.servers import Server, Unreadable

SCORE = (
    "How well does this image show: {prompt}? Rate it from 0 (not at all) to 10 (fully); reply with the number alone."
)
YES_NO = "Does this image show: {prompt}? Reply with yes or no alone."


@dataclass(frozen=True)
class Options:
    """What may follow the address, as '?model=M&concurrency=4'."""

    model: str = ""  # empty: the only one that the server has
    answer: Literal["score", "yes-no"] = "score"
    question: str = ""  # with '{prompt}' in it; empty: the one above that fits the answer
    timeout: float = 60.0  # seconds
    retries: int = 4
    pause: float = 1.0  # seconds before the first retry; doubles, with jitter
    concurrency: int = 8  # requests in flight, of all processes of a run
    temperature: float = 0.0
    tokens: int = 256  # longest reply
    key: str = ""  # environment variable that holds the API key
    cache: str = ""  # folder that keeps the replies; empty: memory alone
    seed: int = 0  # of the jitter


Kind = TypeVar("Kind", bound=Options)


class RemoteJudge:
    """One server. Raises InputError if it does not answer, refuses the key, or lacks the model."""

    def __init__(self, base: str, options: Options):
        self.base, self.options = base.rstrip("/"), options
        key = os.environ.get(options.key, "").strip() if options.key else ""
        if options.key and not (key and key.isascii() and key.isprintable()):
            raise InputError(
                f"the environment variable {options.key}, key of the judge at {self.base}, is not set to a key; export "
                "it"
            )
        self._server = Server(self.base, key, options.timeout, options.retries, options.pause, options.seed)
        self.model = self._find_model()
        self.name = f"remote:{self.model}"
        share = max(1, options.concurrency // processes.count())
        self._pool = ThreadPoolExecutor(share, thread_name_prefix="remote-judge")
        self._known: dict[str, dict[str, Any]] = {}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores in [0, 1], (n,). Raises RewardError where the server fails or talks of other things."""
        question = self.options.question or (SCORE if self.options.answer == "score" else YES_NO)
        read = read_number if self.options.answer == "score" else read_yes_no
        replies = self.ask(images, prompts, question, readable=lambda text: read(text) is not None)
        return torch.tensor([read(reply.texts[0]) for reply in replies])

    def ask(
        self,
        images: Tensor | Sequence[Tensor],
        prompts: Sequence[str],
        question: str,
        n: int = 1,
        logprobs: bool = False,
        readable: Callable[[str], bool] = lambda text: True,
    ) -> list[Reply]:
        """One Reply a prompt, in order, each with n texts; '{prompt}' in the question stands for the prompt.

        images: (n, 3, h, w) in [0, 1], or several such, all shown in that order (before and after an edit, say).
        With `logprobs` each text comes with its tokens and the 20 likeliest at each place. A reply that is not
        `readable` is asked for again. Raises InputError at n > 1 without a temperature, RunError at images that hold
        NaN, RewardError as `__call__`.
        """
        if n > 1 and self.options.temperature == 0:
            raise InputError(f"n={n} replies at temperature 0 would be one reply {n} times; set temperature, e.g. 0.7")
        shown = [images] if isinstance(images, Tensor) else list(images)
        if any(len(part) != len(prompts) for part in shown):
            raise InputError(
                f"{[len(part) for part in shown]} images for {len(prompts)} prompts; give one of each a prompt"
            )
        for part in shown:
            check_images(part)
        bodies = []
        for row, prompt in enumerate(prompts):
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": data_uri(part[row])}} for part in shown
            ]
            content.append({"type": "text", "text": question.replace("{prompt}", prompt)})
            bodies.append(self._body(content, n, logprobs))
        keys = [hashlib.sha256(json.dumps(body).encode()).hexdigest() for body in bodies]
        stopped = threading.Event()
        futures: dict[str, Future[dict[str, Any]]] = {}
        for key, body, prompt in zip(keys, bodies, prompts, strict=True):
            if key not in futures:  # equal questions are asked once
                about = f"prompt '{prompt[:120]}'"
                futures[key] = self._pool.submit(self._answer, key, body, readable, about, stopped)
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:
            stopped.set()  # those that wait between two attempts give up too
            for future in futures.values():
                future.cancel()
            raise
        return [read_reply(futures[key].result()) for key in keys]

    def _body(self, content: list[dict[str, Any]], n: int, logprobs: bool) -> dict[str, Any]:
        options = self.options
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": content}],
            "max_tokens": options.tokens, "temperature": options.temperature,
        }  # fmt: skip
        return body | ({"n": n} if n > 1 else {}) | ({"logprobs": True, "top_logprobs": 20} if logprobs else {})

    def _answer(
        self, key: str, body: dict[str, Any], readable: Callable[[str], bool], about: str, stopped: threading.Event
    ) -> dict[str, Any]:
        """The server's answer to one body, from the cache where it was asked before and is readable."""
        file = pathlib.Path(self.options.cache) / f"{key}.json" if self.options.cache else None
        # a file may be missing or cut short, a reply readable to its own question only: then it is asked for again
        with contextlib.suppress(OSError, ValueError):
            if file and key not in self._known:
                self._known[key] = json.loads(file.read_text(encoding="utf-8"))
            return _readable_answer(self._known.get(key), readable)
        read = partial(_readable_answer, readable=readable)
        answer = self._known[key] = self._server.post("/chat/completions", body, read, about, stopped)
        if file:
            with contextlib.suppress(OSError):  # a full disk costs a request later, not the run
                write_atomically(file, json.dumps(answer))
        return answer

    def _find_model(self) -> str:
        """The model to ask for, once the server has answered."""
        import openai  # here: a second that only runs with a server pay

        wanted = self.options.model
        try:
            listed = self._server.get("/models")
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise InputError(
                f"judge at {self.base} refuses the key (status {error.status_code}); name the environment variable "
                "that holds it: ?key=VARIABLE"
            ) from error
        except openai.APIStatusError as error:
            raise InputError(
                f"judge at {self.base} has no list of models ({self._server.describe(error)}); the address of an "
                "OpenAI-compatible server ends in /v1, and it must be ready"
            ) from error
        except openai.APIError as error:
            raise InputError(
                f"judge at {self.base} does not answer: {self._server.describe(error)}; start it or fix its address"
            ) from error
        try:
            models = [str(entry["id"]) for entry in json.loads(listed)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.base} is no OpenAI-compatible server: /models gives no list; fix the address"
            ) from error
        if wanted:
            check_word(wanted, models, f"models at {self.base}")
        elif len(models) != 1:
            raise InputError(
                f"judge at {self.base} has {len(models)} models ({', '.join(models)}); choose one: ?model=MODEL"
            )
        return wanted or models[0]


def reward(argument: str) -> Reward:
    """The reward at 'http://HOST:PORT/v1?model=M&...'. Raises InputError at a bad address, option or server."""
    judge = RemoteJudge(*read_address(argument, Options))
    return Reward(judge.name, False, judge)


def read_address(argument: str, kind: type[Kind]) -> tuple[str, Kind]:
    """The server's address and the options behind its '?'. Raises InputError at a bad address or option."""
    base, _, query = argument.partition("?")
    if not re.match(r"https?://[^/]+", base):
        raise InputError(f"'{base}' is no address of a judge; write http://HOST:PORT/v1?model=MODEL")
    secret = "put the key into an environment variable and name that: ?key=VARIABLE"
    if "@" in base.split("/")[2]:  # a config and a page would show it
        raise InputError(f"the address of the judge at {base.rpartition('@')[2]} holds a password; {secret}")
    fields: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        check_word(name, list(fields), "a judge's options")
        try:
            values[name] = fields[name](value)
        except ValueError as error:
            raise InputError(f"{name}={value} of the judge at {base}: expected {fields[name].__name__}") from error
    options = kind(**values)
    if options.key and not options.key.isidentifier():  # perhaps the key itself
        raise InputError(f"key of the judge at {base} is not the name of an environment variable; {secret}")
    check_word(options.answer, ("score", "yes-no"), "a judge's answers")
    least = {"timeout": 1e-3, "retries": 0, "pause": 0, "concurrency": 1, "temperature": 0, "tokens": 1}
    for name, lowest in least.items():
        if not lowest <= getattr(options, name) < 1e9:
            raise InputError(f"{name}={getattr(options, name)} of the judge at {base}: give at least {lowest}")
    if options.cache:
        try:
            pathlib.Path(options.cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cache={options.cache} of the judge at {base} is no folder ({error}); name one"
            ) from error
    return base, options


def _readable_answer(answer: Any, readable: Callable[[str], bool]) -> dict[str, Any]:
    """The answer, if each of its texts is readable; raises Unreadable otherwise."""
    try:
        reply = read_reply(answer)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unreadable(f"it sent {json.dumps(answer)[:200]}, which is no chat completion") from error
    for text in reply.texts:
        if not readable(text):
            raise Unreadable(f"it said '{text.strip()[:200]}'")
    return dict(answer)
