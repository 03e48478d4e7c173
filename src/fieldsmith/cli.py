"""The command line: verbs -> configs -> commands, and what went wrong -> one sentence and an exit code.

Exit codes: 0 done, 2 bad input, 3 the run failed (its last good checkpoint stays), 130 interrupted (resumable).
torch is imported only once a command really runs, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import pathlib
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from fieldsmith import __version__, disk, processes
from fieldsmith.errors import InputError, RunError, check_word, is_short_of_memory
from fieldsmith.functions import user_traceback

VERBS = {
    "align": "Raise a reward without losing the rest (reward score matching, every method that it unifies).",
    "edit": "Train an editor on its own multi-turn sessions (MT-EditFlow by NFT or GRPO, its controls, and ours).",
    "erase": "Make a forbidden prompt give what an anchor prompt gives (GEM and six baselines).",
    "distill": "Train a smaller student that keeps both branches of guidance (DASH, its rivals, and ours).",
    "sharpen": "Make fewer samples that lie where the data has none (VSM, five rivals, and ours), and count them.",
    "measure": "Measure a finished run again, with other judges, or complete what a judge that failed left out.",
    "plan": "What a run of one of these would take: parameters, memory by part, forwards, judgements, disk.",
    "diagnose": "Say what is undetermined in a model, and what to run next; nothing is trained.",
    "export": "Write an adapter under the keys that kohya's scripts, ComfyUI or diffusers read.",
    "push": "Upload a finished run to the hub, with a model card.",
    "families": "Print which verb trains which family of pipelines, by LoRA or as a whole.",
    "sample": "Draw a grid of images from a model.",
    "demo": "Each verb once on small models, and the page that leads to what they made.",
}

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
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)  # ends as Ctrl-C does: what is owned is let go of
    if not processes.is_main():  # one process speaks
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        _command(words)
        sys.stdout.flush()  # a closed pipe shows here at the latest
    except SystemExit as end:  # --help; or rich, which makes one of a closed pipe
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            return _closed_pipe() if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
        return _closed_pipe()
    except (InputError, RunError) as error:
        if debug:
            print(user_traceback(error), file=sys.stderr, end="")
        return _stop(str(error), 2 if isinstance(error, InputError) else 3)
    except KeyboardInterrupt:
        return _stop("interrupted; the same command resumes it", 130)
    except BrokenPipeError as error:
        if _is_closed(sys.stdout) or _is_closed(sys.stderr):
            return _closed_pipe()
        return _stop(
            f"{_os_error(error)}. The last good checkpoint stays", 3
        )  # somebody else's pipe, such as a server's
    except OSError as error:
        return _stop(f"{_os_error(error)}. The last good checkpoint stays", 3)
    except (MemoryError, RuntimeError) as error:
        if not is_short_of_memory(error):
            raise
        return _stop("out of memory; lower --chunk, --batch or --resolution. The last good checkpoint stays", 3)
    finally:
        if not processes.is_main():  # a crash is told by the process that it happened to
            sys.stderr = sys.__stderr__
    return 0


def _command(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if words[0] == "--version":
        print(__version__)
        return
    processes.begin()
    verb = words[0]
    check_word(verb, tuple(VERBS), "fieldsmith's verbs")
    # each command is imported when it is asked for: together they take seconds
    if verb in METHODS:
        importlib.import_module("fieldsmith.commands.verbs").run(verb, words[1:])
    else:
        getattr(importlib.import_module(f"fieldsmith.commands.{verb}"), verb)(words[1:])


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt


def _visible(text: str) -> str:
    """The text with control characters written out, so that no file name or answer of a server moves the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _stop(sentence: str, code: int) -> int:
    print(f"fieldsmith: {_visible(sentence)}", file=sys.stderr)
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
