"""Files that nothing can be made of: prompts, sessions, configs, models, adapters, images and run directories."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fieldsmith as fs
from benchmarks.malformed.case import Case, Words, copied
from benchmarks.malformed.pipelines import Bases
from benchmarks.malformed.settings import command_of, valid

GARBAGE = bytes(range(128, 256)) * 8
SPARSE = b"a file of 5 GB without content"
DEEP = "[" * 100_000
RUN = {
    "erase": {"preset": "tiny", "steps": 4, "window": [1, 2], "batch": 1, "budget": 4, "evaluate": 0},
    "align": {"steps": 3, "epochs": 1, "prompts_per_epoch": 2, "rollouts": 2, "evaluate": 0, "ema_every": 1},
    "edit": {"epochs": 1, "groups": 2, "rollouts": 2, "turns": 2, "steps": 3, "evaluate": 0},
    "distill": {"preset": "dash-uniform", "steps": 2, "batch": 8, "shrink": 2.0, "evaluate": 0},
    "sharpen": {"preset": "plain", "steps": 2, "batch": 4, "samples": 0},
    "sample": {"steps": 2, "each": 1},
    "diagnose concepts": {"steps": 2, "each": 1},
    "diagnose smoothness": {"steps": 4, "samples": 2},
    "diagnose guidance": {"tuples": 8, "bins": 2, "steps": 2, "samples": 0},
    "diagnose exposure": {"samples": 2, "turns": 2, "steps": 2},
    "diagnose audit": {"reward": "brightness", "steps": 2, "times": 1, "states": 2, "samples": 8},
}  # fmt: skip

Damage = Callable[[pathlib.Path], object]


def words(command: str, bases: Bases, **other: Any) -> Words:
    """A short run of a command, with some settings its own."""
    return command_of(command, {**valid(command, bases), **RUN[command], **other}, "run")


def _damages() -> dict[str, Damage]:
    return {
        "missing": lambda file: file.unlink(),
        "empty": lambda file: file.write_bytes(b""),
        "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "garbage": lambda file: file.write_bytes(GARBAGE),
    }


JSON: dict[str, Damage] = {
    "null": lambda file: file.write_text("null"),
    "a list": lambda file: file.write_text("[1, 2]"),
    "no entries": lambda file: file.write_text("{}"),
    "nested without end": lambda file: file.write_text(DEEP),
}


# prompts and other words


def prompts() -> Iterator[Case]:
    """One file of prompts, for each command that reads one."""
    texts: dict[str, tuple[bytes | None, str]] = {
        "missing": (None, "p.txt"),
        "empty": (b"", "p.txt"),
        "blank lines": (b"\n \n\t\n", "p.txt"),
        "not UTF-8": (b"red circle\n\xff\xfe\n", "p.txt"),
        "UTF-16": ("red circle\n".encode("utf-16"), "p.txt"),
        "zeros": (b"\0" * 100, "vocabulary|p.txt"),
        "an unknown word": (b"red triangel\n", "triangel"),
        "markup": (b"<script>alert(1)</script>\n", "script"),
        "an escape sequence": (b"\x1b[31mred\x1b[0m circle\n", "vocabulary"),
        "a line too long": (b"red " * 10_000, "longer than"),
        "a megabyte of one word": (b"a" * 2**20, "vocabulary"),
        "a folder": (b"/", "p.txt"),
    }
    for command in ("align", "sample", "diagnose audit"):
        for what, (content, says) in texts.items():
            yield Case(f"prompts/{command}/{what}", partial(_prompts, command, content), says)
    for field in ("targets", "anchors", "keep", "templates"):
        for what, text in {"unknown": "triangel", "too long": "red " * 50, "blank": "  ", "control": "red\x00circle",
                           "escape": "\x1b[2J"}.items():  # fmt: skip
            if field == "keep" and what == "blank":
                continue  # the empty prompt
            says = "triangel|longer|vocabulary|empty|template|anchor|vocabulary"
            yield Case(f"prompts/erase/{field} {what}", partial(_words, field, text), says)


def _prompts(command: str, content: bytes | None, place: pathlib.Path, bases: Bases) -> Words:
    if content == b"/":
        (place / "p.txt").mkdir()
    elif content is not None:
        (place / "p.txt").write_bytes(content)
    return words(command, bases, prompts=["p.txt"])


def _words(field: str, text: str, place: pathlib.Path, bases: Bases) -> Words:
    return words("erase", bases, **{field: [text]})


# command lines, configs


def lines() -> Iterator[Case]:
    """Words that are no command."""
    commands = ("erase", "align", "edit", "distill", "sharpen", "sample", "diagnose audit", "plan erase", "export",
                "demo",
                "families")  # fmt: skip
    for command in commands:
        yield Case(f"words/{command}/unknown flag", partial(_said, [*command.split(), "--nonsense", "3"]), "--nonsense")
        yield Case(f"words/{command}/stray word", partial(_said, [*command.split(), "--out", "run", "stray", "word"]),
                   "stray|word|given")  # fmt: skip
    for text in ("erasse", "", "-x", "--modle", "\x1b[31m", "<b>", "a" * 10_000):
        yield Case(f"words/verbs/{text[:20]!r}", partial(_said, [text]), "vocabulary")
    for text in ([], ["nothing"], ["--json"]):
        yield Case(f"words/plan/{text}", partial(_said, ["plan", *text]), "verb|plan")
    yield Case("words/diagnose/no kind", partial(_said, ["diagnose"]), "kind")
    yield Case("words/diagnose/unknown kind", partial(_said, ["diagnose", "nothing"]), "nothing")
    for command in ("erase", "align", "edit", "distill", "sharpen"):
        for flag in ("--config", "--preset", "--scale"):
            yield Case(f"words/{command}/{flag} without a value", partial(_said, [command, flag]), flag)
        for flag in ("--preset", "--scale"):
            yield Case(f"words/{command}/{flag} unknown", partial(_said, [command, flag, "nonsense"]), "nonsense")
        yield Case(f"words/{command}/no out", lambda place, bases, command=command: words(command, bases)[:-2], "out")
        for what, out in {"a file": "file", "below a file": "file/run", "other files": "full"}.items():
            yield Case(f"words/{command}/out is {what}", partial(_out, command, out), "out")
        for model in ("nowhere", "zoo:nothing", "", "..", "file", "a/b/c", "\x00", "zoo:../../etc", "~nobody/x"):
            yield Case(f"words/{command}/model {model!r}", partial(_model, command, model), "zoo|folder|file|pipeline")


def _said(said: Words, place: pathlib.Path, bases: Bases) -> Words:
    return said


def _out(command: str, out: str, place: pathlib.Path, bases: Bases) -> Words:
    (place / "file").write_text("x")
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("x")
    return [*words(command, bases)[:-1], out]


def _model(command: str, model: str, place: pathlib.Path, bases: Bases) -> Words:
    (place / "file").write_text("x")
    return words(command, bases, **{"teacher" if command == "distill" else "model": model})


def configs() -> Iterator[Case]:
    """One config file, for each verb."""
    texts: dict[str, bytes | None] = {
        "missing": None, "no TOML": b"a = = 1", "garbage": GARBAGE, "not UTF-8": b'model = "\xff"',
        "an unknown key": b"nonsense = 1", "another verb's": b'verb = "families"', "verb is a number": b"verb = 3",
        "versions is a number": b"versions = 3\nnonsense = 1", "a table": b"[seed]\na = 1",
        "nested without end": f"seed = {DEEP}".encode(), "twice": b"seed = 1\nseed = 2",
        "dotted keys without end": ("a." * 5_000 + "b = 1").encode(), "a date": b"seed = 1979-05-27",
        "a long number": b"seed = " + b"9" * 10_000, "an array of tables": b"[[seed]]\na = 1",
        "tables nested without end": f"seed = {'{a = ' * 20_000}".encode(), "zeros": b"\0\0\0",
        "5 GB": SPARSE,
    }  # fmt: skip
    for command in ("erase", "align", "edit", "distill", "sharpen", "diagnose audit"):
        for what, content in texts.items():
            yield Case(f"configs/{command}/{what}", partial(_config, command, content), "a.toml|seed|nonsense")


def _config(command: str, content: bytes | None, place: pathlib.Path, bases: Bases) -> Words:
    if content is SPARSE:
        with (place / "a.toml").open("wb") as file:
            file.truncate(5 * 2**30)
    elif content is not None:
        (place / "a.toml").write_bytes(content)
    return [*words(command, bases), "--config", "a.toml"]


# models


def models() -> Iterator[Case]:
    """Each file of three pipelines, damaged in each way, and configs and weights that disagree."""
    for base, commands in (("flux", ("erase", "sample")), ("unet", ("sharpen", "distill")), ("kontext", ("edit",))):
        for name, kinds in FILES[base].items():
            for what, damage in (_damages() | (JSON if name.endswith(".json") else {})).items():
                if (name, what) in HARMLESS or (name.rpartition("/")[2], what) in HARMLESS:
                    continue
                for command in commands[: 1 + ("all" in kinds)]:
                    yield Case(
                        f"model/{command}/{name} {what}", partial(_damaged, base, command, name, damage), "model"
                    )
    for (base, command), entries in ENTRIES.items():
        for name, entry, value in entries:
            yield Case(f"model/{command}/{name} {entry} = {value!r:.40}",
                       partial(_damaged, base, command, name, partial(_set, entry=entry, value=value)),
                       "model")  # fmt: skip
    for (base, command), names in WEIGHTS.items():
        for name in names:
            for what, change in TENSORS.items():
                yield Case(f"model/{command}/{name} {what}",
                           partial(_damaged, base, command, name, partial(_tensors, change=change)),
                           "model")  # fmt: skip
            for what, content in HEADERS.items():
                damage = partial(_written, content=content)
                yield Case(f"model/{command}/{name} {what}", partial(_damaged, base, command, name, damage), "model")


_W = "diffusion_pytorch_model.safetensors"
FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        "model_index.json": ("all",), f"transformer/{_W}": ("all",), "transformer/config.json": ("all",),
        f"vae/{_W}": (), "vae/config.json": (), "text_encoder/config.json": (), "text_encoder/model.safetensors": (),
        "text_encoder_2/config.json": (), "text_encoder_2/model.safetensors": (), "tokenizer/tokenizer.json": (),
        "tokenizer_2/tokenizer.json": (), "scheduler/scheduler_config.json": (),
    },
    "unet": {
        "model_index.json": ("all",), f"unet/{_W}": ("all",), "unet/config.json": ("all",), "classes.json": ("all",),
        "scheduler/scheduler_config.json": ("all",),
    },
    "kontext": {"model_index.json": (), f"transformer/{_W}": (), "transformer/config.json": (), f"vae/{_W}": ()},
}  # fmt: skip
# what is a whole model of another kind, and no damage: configs without entries have all their defaults
HARMLESS: set[tuple[str, str]] = {("classes.json", "missing"), ("scheduler_config.json", "no entries")}
ENTRIES: dict[tuple[str, str], list[tuple[str, str, Any]]] = {
    ("flux", "erase"): [
        *(("model_index.json", "_class_name", value) for value in ("Nothing", 3, None, ["FluxPipeline"], "os.system")),
        *(("model_index.json", part, value) for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
          for value in (["os", "system"], ["own_module", "Evil"], ["diffusers", "Nothing"], 3, [3, 4], ["diffusers"])),
        *(("transformer/config.json", entry, value) for entry, value in (
            ("num_layers", 2), ("num_layers", -1), ("num_layers", "3"), ("num_attention_heads", 2), ("in_channels", 16),
            ("attention_head_dim", 64), ("joint_attention_dim", 32), ("num_attention_heads", 10**6),
            ("axes_dims_rope", [4]), ("guidance_embeds", True), ("patch_size", "x"), ("num_layers", 10**9),
            ("in_channels", {"a": 1}))),
        *(("vae/config.json", entry, value) for entry, value in (
            ("latent_channels", 3), ("block_out_channels", [8]), ("block_out_channels", [16, 16, 16]),
            ("norm_num_groups", 3), ("down_block_types", ["os.system"]), ("scaling_factor", "x"))),
        *(("text_encoder/config.json", entry, value) for entry, value in (
            ("hidden_size", 32), ("vocab_size", 3), ("num_hidden_layers", 2), ("num_attention_heads", 7),
            ("hidden_size", -1))),
        *(("text_encoder_2/config.json", entry, value) for entry, value in (("d_model", 32), ("vocab_size", 3))),
    ],
    ("unet", "sharpen"): [
        *(("unet/config.json", entry, value) for entry, value in (
            ("block_out_channels", [16, 16]), ("in_channels", 1), ("sample_size", 0), ("sample_size", "x"),
            ("sample_size", -16), ("layers_per_block", 2), ("num_class_embeds", 2), ("norm_num_groups", 5),
            ("sample_size", 10**6), ("down_block_types", ["Nothing", "Nothing"]))),
        *(("scheduler/scheduler_config.json", entry, value) for entry, value in (
            ("num_train_timesteps", 0), ("num_train_timesteps", -5), ("beta_schedule", "nothing"), ("beta_start", "x"),
            ("beta_start", -3.0), ("beta_end", 7.0), ("prediction_type", "nothing"), ("num_train_timesteps", 10**12))),
        *(("classes.json", "classes", value) for value in (["cat"], [1, 2, 3], "cat", [], ["cat", "cat", "dog"])),
    ],
}  # fmt: skip
WEIGHTS = {
    ("flux", "erase"): (f"transformer/{_W}", f"vae/{_W}", "text_encoder/model.safetensors",
                        "text_encoder_2/model.safetensors"),
    ("unet", "sharpen"): (f"unet/{_W}",),
    ("unet", "distill"): (f"unet/{_W}",),
    ("kontext", "edit"): (f"transformer/{_W}",),
    ("flux", "sample"): (f"transformer/{_W}",),
}  # fmt: skip


def _fill(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    """One number of the largest tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = max(tensors, key=lambda name: tensors[name].numel())
        tensors[name].view(-1)[tensors[name].numel() // 2] = value

    return change


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = torch.cat((tensors[name], tensors[name][:1]))


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[max(tensors, key=lambda name: tensors[name].numel())]


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "one NaN": _fill(float("nan")), "one infinity": _fill(float("inf")), "another shape": _reshape,
    "a tensor missing": _drop, "all under other names": _rename, "no tensors": lambda tensors: tensors.clear(),
}  # fmt: skip
HEADERS = {
    "header without end": struct.pack("<Q", 2**63) + b"{}",
    "header larger than the file": struct.pack("<Q", 10**6) + b"{}",
    "header nested without end": struct.pack("<Q", 50_000) + b'{"a":' * 10_000,
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
    "a zip": b"PK\x03\x04" + GARBAGE,
}


def _set(file: pathlib.Path, entry: str, value: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, entry: value} if isinstance(content, dict) else value))


def _tensors(file: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    file.unlink()  # which is mapped into memory
    save_file(tensors, file, metadata={"format": "pt"})


def _written(file: pathlib.Path, content: bytes) -> None:
    file.write_bytes(content)


def _damaged(base: str, command: str, name: str, damage: Damage, place: pathlib.Path, bases: Bases) -> Words:
    model = copied(getattr(bases, base), place)
    damage(model / name)
    return words(command, bases, **{"teacher" if command == "distill" else "model": str(model)})


# adapters

LORA = "pytorch_lora_weights.safetensors"


def _half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def _other_half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_A" in name)]


def _wide(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.cat((tensors[name], tensors[name]), 1)


def _rank(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.cat((tensors[name], tensors[name]), 1)


def _flat(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].flatten()


ADAPTERS = {
    **TENSORS, "a half missing": _half, "the other half missing": _other_half, "too wide": _wide, "two ranks": _rank,
    "a vector": _flat,
}  # fmt: skip


def adapters() -> Iterator[Case]:
    """A LoRA, for each command that takes one, and in Python."""
    damages = {
        **_damages(), **{what: partial(_written, content=content) for what, content in HEADERS.items()},
        **{what: partial(_tensors, change=change) for what, change in ADAPTERS.items()},
    }  # fmt: skip
    for command in ("sample", "diagnose concepts", "export", "load_adapter"):
        for what, damage in damages.items():
            if command == "diagnose concepts" and what in ADAPTERS and what not in ("one NaN", "a half missing"):
                continue
            yield Case(f"adapter/{command}/{what}", partial(_adapter, command, damage), "LoRA|adapter|judge")


def _adapter(command: str, damage: Damage, place: pathlib.Path, bases: Bases) -> Any:
    adapter = copied(bases.adapter, place, "adapter")
    damage(adapter / LORA)
    if command == "export":
        return ["export", str(adapter), "--format", "kohya", "--out", "a.safetensors", "--model", str(bases.flux)]
    if command == "load_adapter":
        return lambda: fs.sample(str(bases.flux), "red circle", n=1, steps=1, adapter=adapter)
    return words(command, bases, adapter=str(adapter))


# images


def _png(width: int, height: int, mode: str = "1") -> Damage:
    return lambda file: Image.new(mode, (width, height)).save(file, format="PNG")


def _bomb(file: pathlib.Path) -> None:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    Image.new("L", (8, 8)).save(file, format="PNG")
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    file.write_bytes(content)


IMAGES: dict[str, Damage] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file: file.write_bytes(GARBAGE),
    "text": lambda file: file.write_text("no image"),
    "20,000 x 20,000 pixels": _png(20_000, 20_000),
    "a header of 60,000 x 60,000": _bomb,
    "1 x 1": _png(1, 1),
    "1 x 4,000": _png(1, 4_000),
    "a folder of that name": lambda file: (file.unlink(), file.mkdir()),
    "an SVG": lambda file: file.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
}  # fmt: skip


def images() -> Iterator[Case]:
    """A folder of images with one that is none, and folders that hold no data."""
    for command in ("distill", "sharpen", "diagnose smoothness", "diagnose guidance"):
        for what, damage in IMAGES.items():
            if what == "a folder of that name":
                continue  # a folder among images is a folder
            yield Case(f"data/{command}/an image {what}", partial(_image, command, damage), "0.png|image")
        for what, fill in FOLDERS.items():
            if what != "no images" and command in ("sharpen", "diagnose smoothness"):
                continue  # which read no captions and no classes
            yield Case(f"data/{command}/{what}", partial(_folder, command, fill), "data|folder|image|caption|metadata")


def _no_classes(folder: pathlib.Path) -> None:
    for file in (folder / "cat").iterdir():
        file.rename(folder / file.name)
    for inside in folder.iterdir():
        if inside.is_dir():
            for file in inside.iterdir():
                file.unlink()
            inside.rmdir()


def _emptied(folder: pathlib.Path) -> None:
    for file in folder.rglob("*.png"):
        file.unlink()


FOLDERS: dict[str, Damage] = {
    "no images": _emptied,
    "no classes": _no_classes,
    "a caption missing": lambda folder: (folder / "cat" / "0.txt").write_text("a cat"),
    "metadata.jsonl garbage": lambda folder: (folder / "metadata.jsonl").write_bytes(GARBAGE),
    "metadata.jsonl a list": lambda folder: (folder / "metadata.jsonl").write_text("[1]\n"),
    "metadata.jsonl names a file outside": lambda folder: (folder / "metadata.jsonl").write_text(
        '{"file_name": "../../../etc/passwd", "text": "a cat"}\n'
    ),
}  # fmt: skip


def _data(command: str, folder: pathlib.Path, bases: Bases) -> Words:
    return words(command, bases, data=str(folder))


def _image(command: str, damage: Damage, place: pathlib.Path, bases: Bases) -> Words:
    folder = copied(bases.images, place, "images")
    damage(folder / "cat" / "0.png")
    return _data(command, folder, bases)


def _folder(command: str, fill: Damage, place: pathlib.Path, bases: Bases) -> Words:
    folder = copied(bases.images, place, "images")
    fill(folder)
    return _data(command, folder, bases)


# sessions


def _line(**entries: Any) -> str:
    return json.dumps({"image": "0.png", "instructions": ["a red circle", "a blue square"], **entries})


def sessions() -> Iterator[Case]:
    """A file of sessions, as edit reads it, and the same from Python."""
    texts: dict[str, str | bytes] = {
        "empty": "", "blank": "\n\n", "not UTF-8": b"\xff\xfe", "no JSON": "{", "a list": "[1]", "a number": "3",
        "null": "null", "nested without end": DEEP, "zeros": b"\0" * 10,
        **{f"image is {value!r:.30}": _line(image=value) for value in
           (None, 3, "", [], {}, "nothing.png", "sessions.jsonl", ".", "\0", "x" * 5_000)},
        "image outside of the folder": _line(image="../outside.png"),
        "image at an absolute path": _line(image="/outside.png"),
        "image by a link that leads outside": _line(image="link.png"),
        **{f"instructions are {value!r:.30}": _line(instructions=value) for value in
           (None, [], "a red circle", 3, [3], [""], ["a", None], {"a": 1}, [["a"]])},
        "an unknown word": _line(instructions=["a red triangel", "a"]),
        "an instruction too long": _line(instructions=["red " * 500, "a"]),
        "fewer turns": _line() + "\n" + _line(instructions=["a red circle"], id="b"),
        "one turn where two are asked for": _line(instructions=["a red circle"]),
        "ids alike": _line(id="a") + "\n" + _line(id="a"),
        **{f"id is {value!r}": _line(id=value) for value in (1.5, True, [], {"a": 1})},
    }  # fmt: skip
    for what, content in texts.items():
        yield Case(f"sessions/edit/{what}", partial(_sessions, content), "session|line|prompt|vocabulary|image|turns")
    for what, damage in IMAGES.items():
        yield Case(f"sessions/edit/an image {what}", partial(_session_image, damage), "0.png")
    csv = {
        "empty": "", "other columns": "a,b\n1,2\n", "turns no number": 'image_index,turns,instructions\n0,x,"[1]"\n',
        "instructions no list": 'image_index,turns,instructions\n0,1,"__import__(1)"\n',
        "no image": "image_index,turns,instructions\n9,1,\"['a']\"\n",
        "nested without end": f'image_index,turns,instructions\n0,1,"{"[" * 5_000}"\n', "zeros": "\0\0",
    }  # fmt: skip
    for what, text in csv.items():
        yield Case(f"sessions/edit/CSV {what}", partial(_csv, text), "csv|line|column|session")


def _sessions(content: str | bytes, place: pathlib.Path, bases: Bases) -> Words:
    folder = copied(bases.sessions, place, "sessions")
    (folder / "0.png").replace(place / "outside.png")
    Image.new("RGB", (24, 24)).save(folder / "0.png")
    (folder / "link.png").symlink_to(place / "outside.png")
    if isinstance(content, str):
        content = content.replace('"/outside.png"', json.dumps(str(place / "outside.png"))).encode()
    (folder / "sessions.jsonl").write_bytes(content)
    return words("edit", bases, sessions=str(folder / "sessions.jsonl"))


def _session_image(damage: Damage, place: pathlib.Path, bases: Bases) -> Words:
    folder = copied(bases.sessions, place, "sessions")
    damage(folder / "0.png")
    return words("edit", bases, sessions=str(folder / "sessions.jsonl"))


def _csv(text: str, place: pathlib.Path, bases: Bases) -> Words:
    (place / "sessions.csv").write_text(text)
    return words("edit", bases, sessions=str(place / "sessions.csv"))


# run directories


def runs() -> Iterator[Case]:
    """A finished run's files, damaged, when the run is opened, taken up again or exported."""
    for name in ("config.toml", "metrics.json", "samples/samples.json"):
        for what, damage in (_damages() | (JSON if name.endswith("json") else {})).items():
            if (name, what) != ("samples/samples.json", "missing"):
                yield Case(f"run/open_run/{name} {what}", partial(_opened, name, damage), name.rpartition("/")[2])
    for what, damage in _damages().items():
        yield Case(f"run/open_run/a picture {what}", partial(_opened, "samples/000-before.png", damage), "000-before")
        if what != "missing":
            yield Case(
                f"run/erase/config.toml {what}", partial(_resumed, "config.toml", damage), "config.toml|another run"
            )
        if what != "missing":
            yield Case(f"run/erase/metrics.json {what}", partial(_resumed, "metrics.json", damage), "metrics.json")
            if what != "cut in half":  # which the name of the model survives
                yield Case(f"run/export/config.toml {what}", partial(_exported, damage), "config.toml|which model")
    for what, text in {"a number": "3", "words": '"x"'}.items():
        yield Case(f"run/open_run/metrics.json {what}", partial(_opened, "metrics.json", partial(
            _written, content=text.encode())), "metrics.json")  # fmt: skip


def _opened(name: str, damage: Damage, place: pathlib.Path, bases: Bases) -> Callable[[], object]:
    run = copied(bases.run, place, "run")
    damage(run / name)
    return lambda: fs.open_run(run)


def _resumed(name: str, damage: Damage, place: pathlib.Path, bases: Bases) -> Words:
    run = copied(bases.run, place, "run")
    damage(run / name)
    return ["erase", "--config", str(bases.run / "config.toml"), "--out", "run"]


def _exported(damage: Damage, place: pathlib.Path, bases: Bases) -> Words:
    run = copied(bases.run, place, "run")
    damage(run / "config.toml")
    return ["export", str(run), "--format", "kohya", "--out", "a.safetensors"]


GROUPS = (prompts, lines, configs, models, adapters, images, sessions, runs)
