"""The command line: verbs -> configs -> commands, and what went wrong -> one sentence and an exit code.

Exit codes: 0 done, 2 bad input, 3 the run failed (its last good checkpoint stays), 130 interrupted (resumable).
torch is imported only once a command really runs, so that --help answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {
    "align": "Raise a reward without losing the rest (reward score matching, every method that it unifies).",
    "edit": "Train an editor on its own multi-turn sessions (MT-EditFlow by NFT or GRPO, its controls, and ours).",
    "erase": "Make a forbidden prompt give what an anchor prompt gives (GEM and six baselines).",
    "distill": "Train a smaller student that keeps both branches of guidance (DASH, its rivals, and ours).",
    "sharpen": "Make fewer samples that lie where the data has none (VSM, five rivals, and ours), and count them.",
    "plan": "What a run of one of these would take: parameters, memory by part, forwards, judgements, disk.",
    "audit": "Measure, before training, which estimator, strengths and trust region fit a model and reward.",
    "diagnose": "Measure what guidance a student kept, how sharp a score is along its paths, how an editor bears its "
    "own results, or how far to trust a judge of edits.",
    "export": "Write an adapter under the keys that kohya's scripts, ComfyUI or diffusers read.",
    "families": "Print which verb trains which family of pipelines, by LoRA or as a whole.",
    "sample": "Draw a grid of images from a model.",
    "evaluate": "Judge what a model draws, prompt by prompt.",
    "demo": "Each verb once on small models, and the page that leads to what they made.",
}

METHODS = ("align", "distill", "edit", "erase", "sharpen")


def usage() -> str:
    from fieldsmith import __version__

    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        (
            f"fieldsmith {__version__}: control what a diffusion or flow model produces, without breaking the rest.",
            "",
            "usage: fieldsmith VERB [--model M] [--preset NAME] [--config FILE.toml] [--field value ...] --out DIR",
            "       fieldsmith VERB --help    every field with its default and meaning",
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
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from fieldsmith import __version__

        print(__version__)
        return 0
    from fieldsmith import processes
    from fieldsmith.errors import InputError, RunError, check_word

    if not processes.is_main():  # one process speaks
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        processes.begin()
        verb = words[0]
        check_word(verb, tuple(VERBS), "fieldsmith's verbs")
        if verb in METHODS:
            importlib.import_module("fieldsmith.commands.verbs").run(verb, words[1:])
        else:
            module = "models" if verb in ("sample", "evaluate") else verb
            getattr(importlib.import_module(f"fieldsmith.commands.{module}"), verb)(words[1:])
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except InputError as error:
        return _forward(str(error), 2)
    except RunError as error:
        return _forward(str(error), 3)
    except KeyboardInterrupt:
        return _forward("interrupted; the same command resumes it", 130)
    except MemoryError:
        return _forward("out of memory; lower --chunk or --batch. The last good checkpoint stays", 3)
    except OSError as error:
        return _forward(f"{error.strerror or error}: {error.filename or 'the disk'}. The last good checkpoint stays", 3)
    except RuntimeError as error:
        if "out of memory" in str(error).lower():
            return _forward("out of memory; lower --chunk or --batch. The last good checkpoint stays", 3)
        raise
    finally:
        if not processes.is_main():  # a crash is said by whom it happened to
            sys.stderr = sys.__stderr__
    return 0


def _forward(sentence: str, code: int) -> int:
    print(f"fieldsmith: {sentence}", file=sys.stderr)
    return code
