"""JSON over HTTP, for judges that are servers: openai's client, asked again where trouble may pass.

The client sends and parses nothing by itself here: it gives bytes, once. What is ours, and why: retries (its own cannot
be interrupted and do not know of answers that make no sense), a limit on an answer's size (it has none), and no
redirects (it would send the key along).
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from fieldsmith.errors import RewardError

if TYPE_CHECKING:
    import openai

LONGEST_PAUSE = 60.0  # seconds between two attempts, whatever the server or the back-off asks
LARGEST_ANSWER = 64 * 2**20  # bytes; 16 replies of 1,024 tokens with 20 log-probabilities each are about 20 MB

T = TypeVar("T")


class Unreadable(ValueError):
    """An answer that does not say what was asked; it is asked for again."""


class Server:
    """One address, whose answers are JSON. A `key` is sent as a bearer token and shown in no message."""

    def __init__(
        self, address: str, key: str = "", timeout: float = 60.0, retries: int = 4, pause: float = 1.0, seed: int = 0
    ):
        """`timeout`, and `pause` before the first retry, in seconds; it doubles each time, with jitter by `seed`."""
        import openai  # here, as in `post`: a second that only runs with a server pay

        self.address = address.rstrip("/")
        self.retries, self.pause, self.seed = retries, pause, seed
        self._key = key
        # what the environment says of OpenAI's own servers is for those
        headers: dict[str, Any] = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
        headers["Accept-Encoding"] = "identity"
        self._options: Any = {} if key else {"headers": {"Authorization": openai.Omit()}}
        http = openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"response": [_limit_size]})
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=self.address, timeout=timeout, max_retries=0, default_headers=headers,
            http_client=http,
        )  # fmt: skip

    def get(self, path: str) -> bytes:
        """What the server gives at a path, asked once. Raises openai.APIError, which `describe` puts into words."""
        return self._client.get(self.address + path, cast_to=httpx2.Response, options=self._options).content

    def post(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[Any], T],
        about: str,
        stopped: threading.Event | None = None,
    ) -> T:
        """`read` of the server's JSON answer to a body; `read` raises Unreadable at what must be asked again.

        `stopped` ends the waiting between two attempts. Raises RewardError where trouble stays, which names what the
        question is `about`.
        """
        import openai

        stopped = stopped or threading.Event()
        jitter = random.Random(f"{self.seed} {json.dumps(body)}")
        trouble, retry_after = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                pause = min(LONGEST_PAUSE, self.pause * 2 ** (attempt - 1) * (0.5 + jitter.random()))
                if stopped.wait(max(retry_after, pause)):
                    break
            retry_after = 0.0
            try:
                response = self._client.post(
                    self.address + path, body=body, cast_to=httpx2.Response, options=self._options
                )
                return read(json.loads(response.content))
            except openai.APIStatusError as error:
                trouble = self.describe(error)
                if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                    break  # the same request would be refused again
                retry_after = _retry_after(error.response)
            except openai.APIConnectionError as error:
                trouble = self.describe(error)
            except Unreadable as error:
                trouble = str(error)
                if "temperature" in body:  # at temperature 0 the same words would come again
                    body = body | {"temperature": max(0.5, body["temperature"])}
            except (ValueError, RecursionError) as error:
                trouble = f"it sent no JSON ({error})"
        raise RewardError(
            f"judge at {self.address} failed after {attempt + 1} attempts: {trouble} (about {about}); look at its log, "
            "then resume the run"
        )

    def describe(self, error: openai.APIError) -> str:
        """What went wrong between here and the server, in a few words and without the key."""
        import openai

        if isinstance(error, openai.APIStatusError):
            response = error.response
            words = response.text.strip()[:200] or response.reason_phrase
            if response.is_redirect:
                words = f"it points to {response.headers.get('Location')}; give that address"
            words = f"status {error.status_code}, {words}"
        elif isinstance(error, openai.APITimeoutError):
            words = "timed out"
        else:
            cause = error.__cause__ or error
            words = str(cause) or type(cause).__name__
        return words.replace(self._key, "***") if self._key else words


class _Limited(httpx2.SyncByteStream):
    """An answer's bytes, up to LARGEST_ANSWER of them."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.stream:
            size += len(part)
            if size > LARGEST_ANSWER:
                raise httpx2.ReadError(f"it sent more than {LARGEST_ANSWER >> 20} MiB")
            yield part

    def close(self) -> None:
        self.stream.close()


def _limit_size(response: httpx2.Response) -> None:
    if response.headers.get("Content-Encoding", "identity") != "identity":  # a small body may unpack to a huge one
        raise httpx2.DecodingError("it compresses its answers, although it was asked not to")
    response.stream = _Limited(response.stream)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to be left alone; 0 where it names none (a date counts as none)."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(response.headers.get("Retry-After", 0))))
    except ValueError:
        return 0.0
