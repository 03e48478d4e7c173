"""The parts: how each is measured today, and what counts as a difference.

Names inside the package may change, so that nearly all goes through the command line; what knows the package's inside
is `entry_of_results`, `every_preset` and tests/several.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "results"
VERBS = ("align", "edit", "erase", "distill", "sharpen")
REGENERATED = ("summary.json", "README.md")  # results/bench is left out: it holds times, which no second run repeats
SHIPPED = ("adapter", "model", "guide")  # folders of a run directory


def entry_of_results(verb: str) -> list[str]:
    """The words after `python -m` that make results/VERB's summary anew, in a folder that holds results/VERB/runs."""
    return ["experiments", verb]


# trainings of about five updates

ALIGN = ["align", "--model", "zoo:shapes-flux-small", "--reward", "brightness", "--prompts", "a blue triangle",
         "a red star", "--epochs", "3", "--prompts-per-epoch", "2", "--rollouts", "4", "--evaluate", "1"]  # fmt: skip
EDIT = ["edit", "--epochs", "2", "--updates", "3", "--groups", "3", "--rollouts", "4", "--turns", "2", "--steps", "4",
        "--max-mean", "1.0", "--min-spread", "0", "--evaluate", "4", "--evaluate-turns", "2", "--evaluate-steps", "3",
        "--still", "1"]  # fmt: skip
ERASE = ["erase", "--model", "zoo:shapes-flux-small", "--preset", "tiny", "--targets", "triangle", "--anchors",
         "circle", "--batch", "2", "--evaluate", "1"]  # fmt: skip
DISTILL = ["distill", "--steps", "5", "--batch", "8", "--evaluate", "20", "--sampler-steps", "3", "--warmup", "2",
           "--bank", "64"]  # fmt: skip
SHARPEN = ["sharpen", "--steps", "5", "--batch", "4", "--samples", "8", "--sampler-steps", "4", "--share-every",
           "2"]  # fmt: skip
RUNS: dict[str, list[str]] = {
    "align-flow-grpo": [*ALIGN, "--preset", "flow-grpo"],
    "align-nft": [*ALIGN, "--preset", "nft"],
    "align-draft": [*ALIGN, "--preset", "draft"],
    "edit-nft": [*EDIT, "--preset", "fieldsmith"],
    "edit-grpo": [*EDIT, "--preset", "mt-grpo", "--kl", "0.01"],
    "erase-gem": [*ERASE, "--budget", "110"],
    "erase-esd": [*ERASE, "--method", "esd", "--budget", "10"],
    "erase-eraseflow": [*ERASE, "--method", "eraseflow", "--budget", "140"],
    "distill-fieldsmith": [*DISTILL, "--preset", "fieldsmith"],
    "sharpen-guide": [*SHARPEN, "--preset", "guide"],
    "sharpen-vsm": [*SHARPEN, "--preset", "vsm", "--add-head"],
}
QUICK = ("erase-gem", "sharpen-guide")  # what the test suite trains


def environment(**more: str) -> dict[str, str]:
    """One quiet thread on the CPU, this checkout before any installed one."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
             "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}  # fmt: skip
    return {**os.environ, **fixed, **more}


@dataclass(frozen=True)
class Outcome:
    """What command lines came to: an exit code and the end of what each said, and the processor that ran them."""

    codes: list[int]
    said: list[str]
    processor: str


@functools.cache
def launcher() -> subprocess.Popen[str]:
    """A process that has imported what is slow, and from which all commands of this process are forked."""
    words, pipe = [sys.executable, "-P", str(HERE / "launch.py")], subprocess.PIPE
    return subprocess.Popen(
        words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment()
    )  # fmt: skip


def launch(commands: Sequence[list[str]], folder: pathlib.Path, seconds: float = 600) -> Outcome:
    """Run `python -m` with each list of words, one after the other, in `folder`."""
    codes, said, processor = [], [], ""
    with tempfile.TemporaryDirectory() as place:
        log = pathlib.Path(place) / "log"
        asked, answers = launcher().stdin, launcher().stdout
        assert asked and answers
        for words in commands:
            command = {"words": words, "folder": str(folder), "log": str(log), "seconds": seconds}
            print(json.dumps(command), file=asked, flush=True)
            outcome = json.loads(answers.readline())
            codes.append(outcome["code"])
            said.append(log.read_text(errors="replace").strip()[-600:])
            processor = outcome["processor"]
    return Outcome(codes, said, processor)


def rounded(value: Any, digits: int = 8) -> Any:
    """Floats to so many digits, which keeps the files small."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits - 1}e}") if isinstance(value, float) else value


def differences(golden: Any, now: Any, relative: float = 0.0, floor: float = 0.0, path: str = "") -> list[str]:
    """Every place where two JSON values differ, numbers by more than `relative` of the larger one and `floor`."""
    if isinstance(golden, dict) and isinstance(now, dict):
        found = [f"{path} / {key}: gone" for key in golden if key not in now]
        found += [f"{path} / {key}: new" for key in now if key not in golden]
        for key in golden:
            if key in now:
                found += differences(golden[key], now[key], relative, floor, f"{path} / {key}")
        return found
    if isinstance(golden, list) and isinstance(now, list):
        found = [f"{path}: {len(now)} entries, not {len(golden)}"] if len(golden) != len(now) else []
        for i, (one, other) in enumerate(zip(golden, now, strict=False)):
            found += differences(one, other, relative, floor, f"{path} / {i}")
        return found
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (golden, now))
    if numbers and relative:
        near = abs(golden - now) <= relative * max(abs(golden), abs(now)) + floor
        same = near or golden == now or (math.isnan(golden) and math.isnan(now))
    else:
        same = golden == now and isinstance(golden, bool) == isinstance(now, bool)
    return [] if same else [f"{path}: {now!r}, not {golden!r}"]


# results


def committed_results(names: Sequence[str]) -> dict[str, Any]:
    return {verb: {name: (RESULTS / verb / name).read_text("utf-8") for name in REGENERATED} for verb in names}


def results(names: Sequence[str]) -> dict[str, Any]:
    """The summaries and pages that the committed runs give, made in a copy."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        for verb in names:
            shutil.copytree(RESULTS / verb / "runs", folder / "results" / verb / "runs")
        outcome = launch([entry_of_results(verb) for verb in names], folder, 300)
        made: dict[str, Any] = {}
        for verb, code, said in zip(names, outcome.codes, outcome.said, strict=True):
            files = {name: folder / "results" / verb / name for name in REGENERATED}
            made[verb] = {name: path.read_text("utf-8") if path.exists() else "" for name, path in files.items()}
            if code or not all(made[verb].values()):
                made[verb]["error"] = f"exit code {code}, {said}"
    return made


def compare_results(committed: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = [f"{verb}: {now[verb]['error']}" for verb in now if "error" in now[verb]]
    for verb, name in itertools.product(committed, REGENERATED):
        one, other = committed[verb][name], now[verb][name]
        if one == other or not other:
            continue
        inside = differences(json.loads(one), json.loads(other)) if name.endswith(".json") else []
        lines = itertools.zip_longest(one.splitlines(), other.splitlines())
        line = next((i for i, (a, b) in enumerate(lines, 1) if a != b), 0)
        found += [f"{verb} / {name}{where}" for where in inside] or [f"{verb} / {name}: line {line} or its end differs"]
    return found


# several


def several(names: Sequence[str]) -> dict[str, Any]:
    """What tests/several.py gives in one process."""
    with tempfile.TemporaryDirectory() as place:
        out = pathlib.Path(place) / "out.json"
        outcome = launch([["tests.several", str(out), place]], ROOT)
        if outcome.codes != [0]:
            return {"error": f"exit code {outcome.codes[0]}, {outcome.said[0]}"}
        return rounded(json.loads(out.read_text()))


def compare_several(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if "error" in now:
        return [now["error"]]
    return differences(golden, now, 1e-5, 1e-9)


# train and keys


def weights_hash(folder: pathlib.Path) -> str:
    """SHA-256 of what a run ships: each tensor's name, type, shape and bytes, in the order of the names."""
    total = hashlib.sha256()
    for path in sorted(path for name in SHIPPED for path in (folder / name).rglob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name in sorted(header):
            tensor = header[name]
            first, last = tensor["data_offsets"]
            total.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode())
            total.update(data[start + first : start + last])
    return total.hexdigest()


def numbers_of(value: Any) -> Any:
    """metrics.json with its numbers alone, times left out."""
    if isinstance(value, dict):
        inside = {key: numbers_of(item) for key, item in value.items() if "seconds" not in key}
        return {key: item for key, item in inside.items() if item not in (None, {}, [])}
    if isinstance(value, list):
        return [numbers_of(item) for item in value]
    return value if isinstance(value, (int, float)) else None


def keys_of(value: Any) -> Any:
    """The keys of a JSON value with the kind of each leaf; a list is one entry, the union of its entries."""
    if isinstance(value, dict):
        return {key: keys_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [merged([keys_of(item) for item in value])] if value else []
    return {bool: "truth", int: "number", float: "number", str: "text"}.get(type(value), "nothing")


def merged(kinds: list[Any]) -> Any:
    """One structure of several: dicts by key, others where they are the same, or each kind's name."""
    if all(isinstance(kind, dict) for kind in kinds):
        names = dict.fromkeys(name for kind in kinds for name in kind)
        return {name: merged([kind[name] for kind in kinds if name in kind]) for name in names}
    if all(isinstance(kind, list) for kind in kinds):
        inside = [entry for kind in kinds for entry in kind]
        return [merged(inside)] if inside else []
    return kinds[0] if all(kind == kinds[0] for kind in kinds) else " or ".join(sorted({str(kind) for kind in kinds}))


_trained: dict[str, dict[str, Any]] = {}  # by run; `train` and `keys` look at the same trainings


def trained(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each of these runs came to; each is done once in a process."""
    missing = [name for name in names if name not in _trained]
    if missing:
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            asked = [["fieldsmith", *RUNS[name], "--seed", "3", "--out", name] for name in missing]
            outcome = launch(asked, folder)
            for name, code, said in zip(missing, outcome.codes, outcome.said, strict=True):
                if code:
                    _trained[name] = {"error": f"exit code {code}, {said}"}
                    continue
                lines = (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()
                _trained[name] = {
                    "processor": outcome.processor,
                    "weights": weights_hash(folder / name),
                    "losses": [json.loads(line)["loss"] for line in lines],
                    "metrics": json.loads((folder / name / "metrics.json").read_text("utf-8")),
                }
    return {name: _trained[name] for name in names}


def train(names: Sequence[str]) -> dict[str, Any]:
    """Hash of the weights, losses and final numbers of each run."""
    runs = trained(names)
    return {
        name: run if "error" in run else rounded({**run, "metrics": numbers_of(run["metrics"])})
        for name, run in runs.items()
    }


def compare_train(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Weights to the last bit on the same processor; losses and numbers to 1e-4 everywhere."""
    found = []
    for name in golden:
        one, other = golden[name], now[name]
        if "error" in other:
            found.append(f"{name}: {other['error']}")
            continue
        if one["processor"] == other["processor"] and one["weights"] != other["weights"]:
            found.append(f"{name}: the weights differ")
        found += differences(one["losses"], other["losses"], 1e-4, 1e-6, f"{name} / loss")
        found += differences(one["metrics"], other["metrics"], 1e-4, 1e-8, f"{name} / metrics.json")
    return found


def keys(names: Sequence[str]) -> dict[str, Any]:
    """The structure of each run's metrics.json."""
    runs = trained(names)
    return {name: run if "error" in run else keys_of(run["metrics"]) for name, run in runs.items()}


# flags and presets


def flags(names: Sequence[str]) -> dict[str, Any]:
    """{flag: default} of each verb, read off what --help-all prints."""
    return {verb: flags_of_help(help_of(verb)) for verb in names}


def help_of(verb: str) -> str:
    done = subprocess.run([sys.executable, "-m", "fieldsmith", verb, "--help-all"], check=True, capture_output=True,
                          text=True, encoding="utf-8", env=environment(COLUMNS="120", NO_COLOR="1"))  # fmt: skip
    return done.stdout


def flags_of_help(text: str) -> dict[str, str]:
    """Flags stand at the left of a box's lines, their words further in; the default is the last bracket."""
    found: dict[str, str] = {}
    items: list[list[str]] = []
    for line in text.splitlines():
        if line[:1] not in "│|" or not line:
            continue
        inside = line.strip("│|").rstrip()
        if re.match(r" -{1,2}\w", inside):
            items.append([])
        if items:
            items[-1].append(inside.strip())
    for lines in items:
        words = " ".join(lines)
        flag = next(word for word in re.split(r"[ ,]+", words) if word.startswith("--"))
        default = re.search(r"\((?:default: ((?:.(?!\(default: ))*)|(required))\)$", words)
        if flag != "--help":
            found[flag] = "" if default is None else (default[2] or default[1].strip())
    return found


def every_preset(verb: str) -> dict[str, dict[str, Any]]:
    """The settings under every preset at every scale, flat, as they are named on the command line."""
    config = importlib.import_module(f"fieldsmith.methods.{verb}.config")
    kind = getattr(config, f"{verb.capitalize()}Config")
    if verb == "erase":
        asked = {
            f"{name}, {method}": (name, method)
            for name in (*config.PRESETS, "tiny", "protect")
            for method in config.METHODS
            if method == "gem" or name in ("paper", "tiny")
        }
    else:
        names = config.RECIPES if verb == "align" else config.PRESETS
        scales = {name: ["laptop", "paper"] for name in names}
        if verb == "align":
            scales = {name: ["laptop", "paper"] if name in config.PAPER else ["laptop"] for name in names}
        asked = {f"{name}, {scale}": (name, scale) for name in names for scale in scales[name]}

    def settings(name: str, other: str) -> dict[str, Any]:
        given = {"method": other} if verb == "erase" else {}
        made = kind.preset_of(name, None if verb == "erase" else other, given)
        return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}

    return json.loads(json.dumps({what: settings(*words) for what, words in asked.items()}, default=str))


def presets(names: Sequence[str]) -> dict[str, Any]:
    """Of each verb the first preset whole, under its name, and what the others change of it."""
    found = {}
    for verb in names:
        # in a process of its own, which sees this checkout whatever is installed
        code = f"import json; from tests.golden.parts import every_preset; print(json.dumps(every_preset({verb!r})))"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment())
        sets = json.loads(done.stdout)
        first = next(iter(sets.values()))
        found[verb] = {
            what: settings
            if settings is first
            else {k: v for k, v in settings.items() if k not in first or v != first[k]}
            for what, settings in sets.items()
        }
    return found


def whole_presets(packed: dict[str, Any]) -> dict[str, Any]:
    firsts = {verb: next(iter(sets.values())) for verb, sets in packed.items()}
    return {verb: {what: {**firsts[verb], **own} for what, own in sets.items()} for verb, sets in packed.items()}


def compare_presets(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return differences(whole_presets(golden), whole_presets(now))


@dataclass(frozen=True)
class Part:
    """What a part is made of, how it is measured, and how two measurements are compared."""

    names: tuple[str, ...]
    measure: Callable[[Sequence[str]], dict[str, Any]]
    compare: Callable[[dict[str, Any], dict[str, Any]], list[str]] = differences


PARTS = {
    "flags": Part(VERBS, flags),
    "presets": Part(VERBS, presets, compare_presets),
    "several": Part((), several, compare_several),
    "train": Part(tuple(RUNS), train, compare_train),
    "keys": Part(tuple(RUNS), keys),
    "results": Part(VERBS, results, compare_results),
}


def golden(part: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """What is frozen of a part, or of these names in it."""
    if part == "results":
        return committed_results(names or VERBS)
    found = json.loads((HERE / f"{part}.json").read_text("utf-8"))
    return {name: found[name] for name in names} if names else found


def check(part: str, names: Sequence[str] = ()) -> list[str]:
    """Every difference of a part, or of these names in it."""
    names = names or PARTS[part].names
    try:
        now = PARTS[part].measure(names)
    except subprocess.CalledProcessError as error:
        said = error.stderr or b""
        words = said.decode(errors="replace") if isinstance(said, bytes) else said
        return [f"did not run: {words.strip()[-600:]}"]
    return PARTS[part].compare(golden(part, names), now)


def write(part: str, names: Sequence[str] = ()) -> None:
    """Freeze what a part, or these names in it, gives today."""
    now = PARTS[part].measure(names or PARTS[part].names)
    errors = [f"{name}: {run['error']}" for name, run in now.items() if isinstance(run, dict) and "error" in run]
    if errors:
        raise SystemExit("\n".join(errors))
    whole = {**(golden(part) if names else {}), **now}
    lines = (f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in whole.items())
    (HERE / f"{part}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
