"""A few kills of benchmarks/kills.py; results/reliability has many. See there for what is compared."""

from __future__ import annotations

import json

from tests.golden import parts


def test_runs_that_are_killed_resume_to_the_same_bytes_and_what_is_done_is_not_done_again(tmp_path):
    """In a process of its own, from which runs are forked: one that has run torch's threads is none to fork from."""
    words = ["benchmarks.kills", "--only", "erase", "sharpen", "--out", str(tmp_path), "--count", "2"]
    found = []
    for _ in range(2):
        outcome = parts.launch([words], parts.ROOT)
        assert outcome.codes == [0], outcome.said
        found.append((tmp_path / "kills.json").read_text())
    assert [(trial["verb"], trial["number"]) for trial in json.loads(found[0])["trials"]] == [
        ("erase", 0), ("erase", 1), ("sharpen", 0), ("sharpen", 1)
    ]  # fmt: skip
    assert found[1] == found[0]
    (claim,) = json.loads((tmp_path / "summary.json").read_text())["claims"]
    assert claim["id"] == "reliability.kills_resumed_share" and claim["value"] == 1
