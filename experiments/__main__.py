"""`python -m experiments STUDY [--field value ...]` repeats a paper's claims; `pretrain RECIPE` makes a zoo model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # libgomp's threads spin while they wait; read as torch is imported

import sys
from collections.abc import Sequence

import tyro

from experiments import align, distill, edit, erase, pretrain, sharpen
from fieldsmith.errors import InputError, RunError, check_word

STUDIES = {
    "erase": (erase.ReproduceErase, erase.main),
    "align": (align.ReproduceAlign, align.main),
    "distill": (distill.ReproduceDistill, distill.main),
    "sharpen": (sharpen.ReproduceSharpen, sharpen.main),
    "edit": (edit.ReproduceEdit, edit.main),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one study or recipe; the process's exit code, as fieldsmith's own."""
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\n\nstudies: {', '.join(STUDIES)}\nrecipes: {', '.join(pretrain.RECIPES)}")
        return 0
    try:
        if name == "pretrain":
            pretrain.main(rest)
            return 0
        check_word(name, (*STUDIES, "pretrain"), "the studies")
        kind, run = STUDIES[name]
        run(tyro.cli(kind, args=rest, prog=f"python -m experiments {name}"))
    except (InputError, RunError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
    except KeyboardInterrupt:
        print("experiments: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
