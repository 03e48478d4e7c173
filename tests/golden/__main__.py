"""`python -m tests.golden [PART ...]` compares all or some parts with what is frozen; `--write PART` freezes one anew.

A part may be named with one of its entries: train/erase-gem, results/edit, flags/align. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.golden import parts

SHOWN = 12  # differences of a part that are printed


def named(word: str) -> tuple[str, tuple[str, ...]]:
    """A part and the entries of it that a word names."""
    part, _, name = word.partition("/")
    if part not in parts.PARTS or (name and name not in parts.PARTS[part].names):
        raise SystemExit(f"'{word}' is unknown; known: {', '.join(parts.PARTS)}, each with /ENTRY")
    return part, (name,) if name else ()


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.golden", description=__doc__)
    parser.add_argument("part", nargs="*")
    parser.add_argument("--write", metavar="PART", action="append", default=[])
    given = parser.parse_args()
    for part, names in map(named, given.write):
        if part == "results":
            raise SystemExit("results are compared with the committed files; their own studies write them")
        parts.write(part, names)
        print(f"{part}: written", flush=True)
    if given.write:
        return 0
    bad = 0
    for part, names in map(named, given.part or parts.PARTS):
        began = time.monotonic()
        found = parts.check(part, names)
        bad += bool(found)
        words = f"{len(found)} differences" if found else "ok"
        print(f"{'/'.join((part, *names))}: {words} ({time.monotonic() - began:.0f} s)", flush=True)
        for line in found[:SHOWN]:
            print(f"  {line.removeprefix(' / ')}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
