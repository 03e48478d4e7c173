"""The command line: verbs -> configs -> commands, and what went wrong -> one sentence and an exit code.

Exit codes: 0 done, 2 bad input, 3 the run failed (its last good checkpoint stays), 130 interrupted (resumable).
torch is imported only once a command really runs, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import pathlib
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from fieldsmith import __version__, disk, processes
from fieldsmith.commands import VERBS
from fieldsmith.errors import InputError, RunError, check_word, is_short_of_memory
from fieldsmith.functions import user_traceback

TRY = (
    "fieldsmith sample --model zoo:shapes-flux --prompts triangle circle --out shapes.png",
    "fieldsmith diagnose zoo:shapes-flux --targets triangle --samples 8 --out runs/diagnosis",
    "fieldsmith erase --targets triangle --anchors circle --out runs/no-triangle",
)

METHODS = ("align", "distill", "edit", "erase", "sharpen")


def usage() -> str:
    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        (
            f"fieldsmith {__version__}: control what a diffusion or flow model produces, without breaking the rest.",
            "",
            "usage: fieldsmith VERB [--model M] [--preset NAME] [--config FILE.toml] [--field value ...] --out DIR",
            "       fieldsmith VERB --help    the settings that matter; --help-all: every one",
            "       fieldsmith VERB --quiet   nothing but errors; --json: one JSON object at the end, for programs",
            "       fieldsmith --debug VERB   also print the lines of your own function that failed",
            "",
            "verbs:",
            *lines,
            "",
            "to try, in a minute or two each:",
            *(f"  {command}" for command in TRY),
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    # libgomp's threads spin while they wait, which makes a busy machine many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug, quiet, as_json = (flag in words for flag in ("--debug", "--quiet", "--json"))
    words = [word for word in words if word not in ("--debug", "--quiet", "--json")]
    as_json = as_json and not {"-h", "--help", "--help-all"} & set(words)
    stop = partial(_end, as_json=as_json)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)  # ends as Ctrl-C does: what is owned is let go of
    if not processes.is_main():  # one process speaks
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        answer = _told(words, quiet, as_json)
        if as_json:
            print(json.dumps({"command": " ".join(words[:1]), **(answer or {})}, default=str))
        sys.stdout.flush()  # a closed pipe shows here at the latest
    except SystemExit as end:  # --help; or rich, which makes one of a closed pipe
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            return _closed_pipe() if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
        return _closed_pipe()
    except (InputError, RunError) as error:
        if debug:
            print(user_traceback(error), file=sys.stderr, end="")
        return stop(str(error), 2 if isinstance(error, InputError) else 3)
    except KeyboardInterrupt:
        return stop("interrupted; the same command resumes it", 130)
    except BrokenPipeError as error:
        if _is_closed(sys.stdout) or _is_closed(sys.stderr):
            return _closed_pipe()
        return stop(
            f"{_os_error(error)}. The last good checkpoint stays", 3
        )  # somebody else's pipe, such as a server's
    except OSError as error:
        return stop(f"{_os_error(error)}. The last good checkpoint stays", 3)
    except (MemoryError, RuntimeError) as error:
        if not is_short_of_memory(error):
            raise
        return stop("out of memory; lower --chunk, --batch or --resolution. The last good checkpoint stays", 3)
    finally:
        if not processes.is_main():  # a crash is told by the process that it happened to
            sys.stderr = sys.__stderr__
    return 0


def _told(words: list[str], quiet: bool, as_json: bool) -> dict[str, Any] | None:
    """Run a command, with what it says to people kept off stdout where a program reads that, or said to nobody."""
    with contextlib.ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if quiet or as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        return _command(words)


def _command(words: list[str]) -> dict[str, Any] | None:
    """Run one command; what it tells a program (commands/answers.py)."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return None
    if words[0] == "--version":
        print(__version__)
        return None
    processes.begin()
    verb = words[0]
    check_word(verb, tuple(VERBS), "fieldsmith's verbs")
    # each command is imported when it is asked for: together they take seconds
    if verb in METHODS:
        told = importlib.import_module("fieldsmith.commands.verbs").run(verb, words[1:])
    else:
        told = getattr(importlib.import_module(f"fieldsmith.commands.{verb}"), verb)(words[1:])
    return told  # type: ignore[no-any-return]


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt


def _visible(text: str) -> str:
    """The text with control characters written out, so that no file name or answer of a server moves the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _end(sentence: str, code: int, as_json: bool) -> int:
    """Print why a command ends, for people or for programs."""
    text = json.dumps({"error": sentence, "exit": code}) if as_json else f"fieldsmith: {_visible(sentence)}"
    print(text, file=sys.stderr)
    return code


NETWORK = (
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.ENETDOWN, errno.EPIPE,
)  # fmt: skip


def _os_error(error: OSError) -> str:
    """Where an error of the system comes from: the network, the disk with its path and what is free there, or its own
    words. What a user's function raises is a RewardError already (functions.call)."""
    reason = error.strerror or str(error) or type(error).__name__
    # gaierror: a host's name that is unknown; URLError and the like are OSErrors as well
    library = type(error).__module__.partition(".")[0] in ("urllib", "requests", "urllib3", "ssl")
    if isinstance(error, (TimeoutError, socket.gaierror)) or error.errno in NETWORK or library:
        return f"the network failed: {reason}"
    if isinstance(error.filename, (str, bytes, os.PathLike)) and error.filename:
        path = pathlib.Path(os.fsdecode(error.filename))
        left = disk.free(path) if error.errno in disk.FULL else None
        space = f" ({disk.size(left)} free)" if left is not None else ""
        return f"the disk: {reason}: '{path}'{space}"
    return f"the disk: {reason}" if error.errno in disk.FULL else reason


def _is_closed(stream: Any) -> bool:
    """Whether who read a stream has gone; True where the system does not say."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLERR)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or a stream that is no file
        return True


def _closed_pipe() -> int:
    """Who read the output has gone, as in `| head`: end without a word, with 128 + SIGPIPE."""
    with contextlib.suppress(OSError, ValueError):  # a stream that is no file
        # what is still buffered goes nowhere, instead of a message when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
