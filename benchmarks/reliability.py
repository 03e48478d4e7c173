"""results/reliability/summary.json, out of what each of its scripts found: a JSON file with claims for each of them."""

from __future__ import annotations

import json
import pathlib

from fieldsmith.run import write_atomically

PARTS = ("kills.json", "malformed.json")


def summarise(folder: pathlib.Path) -> None:
    """Write the claims of all parts that are there."""
    there = [folder / name for name in PARTS if (folder / name).is_file()]
    claims = [claim for path in there for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]]
    write_atomically(folder / "summary.json", json.dumps({"claims": claims}, indent=1) + "\n")
