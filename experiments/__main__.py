"""`python -m experiments STUDY [--field value ...]` repeats a paper's claims; `pretrain RECIPE` makes a zoo model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # libgomp's threads spin while they wait; read as torch is imported

import sys
from collections.abc import Sequence

import tyro

from experiments import pretrain, study
from experiments.align.arms import STUDY as ALIGN
from experiments.distill.arms import STUDY as DISTILL
from experiments.edit.arms import STUDY as EDIT
from experiments.erase.arms import STUDY as ERASE
from experiments.sharpen.arms import STUDY as SHARPEN
from experiments.zoo.scores import STUDY as ZOO
from fieldsmith.errors import InputError, RunError, check_word

STUDIES = {one.name: one for one in (ERASE, ALIGN, DISTILL, SHARPEN, EDIT, ZOO)}


def main(words: Sequence[str] | None = None) -> int:
    """Run one study or recipe; the process's exit code, as fieldsmith's own."""
    name, *flags = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\n\nstudies: {', '.join(STUDIES)}\nrecipes: {', '.join(pretrain.RECIPES)}")
        return 0
    try:
        if name == "pretrain":
            pretrain.main(flags)
            return 0
        check_word(name, (*STUDIES, "pretrain"), "the studies")
        chosen = STUDIES[name]
        study.run(chosen, tyro.cli(chosen.config, args=flags, prog=f"python -m experiments {name}"))
    except (InputError, RunError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
    except KeyboardInterrupt:
        print("experiments: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
