"""What a resumed run may not change without a word: code of the user's own, data, weights; of versions it is told."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest

import fieldsmith as fs
from fieldsmith import origins
from fieldsmith.cli import main
from fieldsmith.errors import InputError
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.rewards import Reward
from fieldsmith.run import Run

CODE = "def score(images, prompts):\n    return [0.5] * len(prompts)\n"


def brightness(images: Any, prompts: Any) -> Any:
    return images.mean((1, 2, 3))


def align(reward: str) -> AlignConfig:
    return AlignConfig(model="zoo:shapes-flux", prompts=("a",), reward=reward)


def test_code_is_known_by_its_text(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    config = align(f"0.7*{file}:score+0.3*right")
    first = origins.of(config)
    os.utime(file, (1, 1))
    assert list(first) == ["code mine.py"] and origins.of(config) == first
    file.write_text(CODE.replace("0.5", "0.6"))
    assert origins.of(config) != first


def test_functions_are_found_in_what_wraps_them_and_ours_are_none_of_the_users():
    reward = Reward("brightness", True, brightness)
    assert list(origins.of(align("right"), [reward], None)) == ["code test_origins.py"]
    assert origins.of(align("right"), Run, fs.load, {"a": 1}) == {}


def test_data_are_known_by_names_sizes_and_times(tmp_path):
    folder = tmp_path / "Bilder 日本"
    (folder / "cat").mkdir(parents=True)
    for name in ("cat/a.png", "cat/b.png", "labels.csv"):
        (folder / name).write_bytes(b"12345678")
        os.utime(folder / name, (1, 1))
    config = DistillConfig(data=str(folder))
    first = origins.of(config)
    assert list(first) == ["data"]
    os.utime(folder / "cat" / "a.png", (2, 2))
    changed = origins.of(config)
    (folder / "cat" / "b.png").rename(folder / "cat" / "c.png")
    assert len({one["data"] for one in (first, changed, origins.of(config))}) == 3


def test_weights_of_the_zoo_are_known_by_content_those_of_the_hub_by_their_snapshot(tmp_path):
    folder = tmp_path / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert origins.weights(folder) == "0123abcd"
    other = tmp_path / "model"
    other.mkdir()
    (other / "weights").write_bytes(b"1")
    before = origins.weights(other, content=True), origins.weights(other)
    os.utime(other / "weights", (1, 1))
    origins._content.cache_clear()
    assert origins.weights(other, content=True) == before[0] and origins.weights(other) != before[1]


def begun(folder: pathlib.Path, checkpoint: bool, **origin: str) -> None:
    run = Run(folder, "align", {"lr": 1})
    run.compare(origin)
    run.begin()
    if checkpoint:
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)


def test_a_difference_is_named_and_asked_to_be_confirmed(tmp_path):
    begun(tmp_path, True, model="1", data="1")
    with pytest.raises(InputError, match="began with another data; put back what it was, or add --resume-changed"):
        Run(tmp_path, "align", {"lr": 1}).compare({"model": "1", "data": "2"})
    run = Run(tmp_path, "align", {"lr": 1, "resume_changed": True})
    run.compare({"model": "1", "data": "2"})
    run.begin()
    Run(tmp_path, "align", {"lr": 1}).compare({"model": "1", "data": "2"})  # which it goes on with from now on


def test_before_the_first_checkpoint_nothing_is_asked(tmp_path):
    begun(tmp_path, False, model="1")
    Run(tmp_path, "align", {"lr": 1}).compare({"model": "2"})


def test_other_versions_are_told(tmp_path):
    begun(tmp_path, True)
    file = tmp_path / "config.toml"
    file.write_text(file.read_text().replace('torch = "', 'torch = "0.'))
    assert "began with torch 0." in Run(tmp_path, "align", {"lr": 1}).changes


@pytest.mark.parametrize("fails", ["score", "held"])
def test_a_run_whose_code_changed_asks_and_what_comes_after_training_can_be_repeated_alone(tmp_path, capsys, fails):
    """A held-out reward that fails after training costs neither the weights nor, once it answers, page and metrics."""
    file, flag = tmp_path / "mine.py", tmp_path / "away"
    file.write_text(
        f"import os\nasked = []\n\ndef score(images, prompts):\n    asked.append(1)\n"
        f"    if os.path.exists({str(flag)!r}) and {fails!r} == 'score' and len(asked) > 1:\n"
        f"        raise OSError('server away')\n    return [float(image.mean()) for image in images]\n\n"
        f"def held(images, prompts):\n    if os.path.exists({str(flag)!r}):\n        raise OSError('server away')\n"
        f"    return [0.5] * len(prompts)\n"
    )
    out = tmp_path / "run"
    words = [
        "align", "--model", "zoo:shapes-flux-small", "--prompts", "a red circle", "a blue square", "--preset", "nft",
        "--reward", f"{file}:score", "--held-out-rewards", f"{file}:held", "--epochs", "2", "--updates", "1",
        "--steps", "2", "--rollouts", "2", "--prompts-per-epoch", "2", "--evaluate", "1", "--out", str(out),
    ]  # fmt: skip
    flag.touch()
    assert main(words) == 3
    assert f"{fails}' raised OSError: server away (mine.py, line" in capsys.readouterr().err
    assert not (out / ".owner").exists()
    missing = json.loads((out / "metrics.json").read_text())["missing"] if fails == "held" else ""
    assert ("held' raised OSError: server away" in missing) == (out / "report.html").exists() == (fails == "held")
    assert (out / "adapter").exists() == (fails == "held")
    if fails == "held":  # which leaves all that did not fail
        metrics, page = json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()
        assert len(metrics["rewards"]) == 2 and not any(name.endswith("held") for name in metrics["rewards"])
        assert metrics["kl"] >= 0 and metrics["rest"] and "verdict" in metrics
        assert "Not measured" in page and "server away" in page and "at equal seeds" in page
    log, flag_gone = (out / "metrics.jsonl").read_text(), flag.unlink()
    file.write_text(file.read_text() + "\n# another version\n")
    assert main(words) == 2
    assert "began with another code mine.py; put back" in capsys.readouterr().err
    assert main([*words, "--resume-changed"]) == 0 and flag_gone is None
    after = (out / "metrics.jsonl").read_text()
    assert "missing" not in json.loads((out / "metrics.json").read_text()) and after.startswith(log)
    assert after == log or fails == "score"  # nothing was trained again
