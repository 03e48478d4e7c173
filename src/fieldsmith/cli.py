"""The command line: verbs -> configs -> commands, and what went wrong -> one sentence and an exit code.

Exit codes: 0 done, 2 bad input, 3 the run failed (its last good checkpoint stays), 130 interrupted (resumable).
torch is imported only once a command really runs, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
from collections.abc import Sequence

from fieldsmith import __version__, processes
from fieldsmith.errors import InputError, RunError, check_word
from fieldsmith.functions import user_traceback

VERBS = {
    "align": "Raise a reward without losing the rest (reward score matching, every method that it unifies).",
    "edit": "Train an editor on its own multi-turn sessions (MT-EditFlow by NFT or GRPO, its controls, and ours).",
    "erase": "Make a forbidden prompt give what an anchor prompt gives (GEM and six baselines).",
    "distill": "Train a smaller student that keeps both branches of guidance (DASH, its rivals, and ours).",
    "sharpen": "Make fewer samples that lie where the data has none (VSM, five rivals, and ours), and count them.",
    "plan": "What a run of one of these would take: parameters, memory by part, forwards, judgements, disk.",
    "diagnose": "Measure a model, a reward or a judge: guidance, smoothness, exposure, concepts, audit, judge.",
    "export": "Write an adapter under the keys that kohya's scripts, ComfyUI or diffusers read.",
    "families": "Print which verb trains which family of pipelines, by LoRA or as a whole.",
    "sample": "Draw a grid of images from a model.",
    "demo": "Each verb once on small models, and the page that leads to what they made.",
}

METHODS = ("align", "distill", "edit", "erase", "sharpen")


def usage() -> str:
    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        (
            f"fieldsmith {__version__}: control what a diffusion or flow model produces, without breaking the rest.",
            "",
            "usage: fieldsmith VERB [--model M] [--preset NAME] [--config FILE.toml] [--field value ...] --out DIR",
            "       fieldsmith VERB --help    every field with its default and meaning",
            "       fieldsmith --debug VERB   also print the lines of your own function that failed",
            "",
            "verbs:",
            *lines,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    # libgomp's threads spin while they wait, which makes a busy machine many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
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
    except BrokenPipeError:
        return _closed_pipe()
    except MemoryError:
        return _stop("out of memory; lower --chunk or --batch. The last good checkpoint stays", 3)
    except OSError as error:
        return _stop(f"{_os_error(error)}. The last good checkpoint stays", 3)
    except RuntimeError as error:
        if "out of memory" in str(error).lower():
            return _stop("out of memory; lower --chunk or --batch. The last good checkpoint stays", 3)
        raise
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


def _stop(sentence: str, code: int) -> int:
    print(f"fieldsmith: {sentence}", file=sys.stderr)
    return code


def _os_error(error: OSError) -> str:
    """What the system refused: the file it was about, the network, or its own words."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        return f"{reason}: '{error.filename}'"
    # gaierror: a host's name that is unknown
    network = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
    return f"the network failed: {reason}" if network else reason


def _closed_pipe() -> int:
    """Who read the output has gone, as in `| head`: end without a word, with 128 + SIGPIPE."""
    with contextlib.suppress(OSError, ValueError):  # a stream that is no file
        # what is still buffered goes nowhere, instead of a message when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
