"""`push_to_hub` and `fieldsmith push` against a stand-in of the hub's HTTP API: what arrives, what the card says."""

from __future__ import annotations

import base64
import hashlib
import json
import pathlib
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

import fieldsmith as fs
from fieldsmith import cli
from fieldsmith.commands import verbs
from fieldsmith.measure import drawing
from fieldsmith.models import load
from fieldsmith.push import About, Base, card, plain_text
from fieldsmith.report.page import Pair
from fieldsmith.result import Result

ODD = "a <script>alert(1)</script> [cat](http://x) | `b`\n# \\*dog*"


@dataclass
class Hub:
    """What was asked of the stand-in, and what it holds now."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    repos: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    cards: list[str] = field(default_factory=list)  # that it was asked to validate
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # models that were there before
    tokens: dict[str, str | None] = field(default_factory=dict)  # with which each address was asked last
    refuses: dict[str, int] = field(default_factory=dict)  # part of an address -> status

    def answer(self, method: str, path: str, body: bytes) -> Any:
        place = path.partition("?")[0]
        if place == "/api/whoami-v2":
            return {"name": "me", "type": "user", "orgs": []}
        if place == "/api/repos/create":
            self.repos.append(json.loads(body))
            return {"url": f"{self.address}/{self.repos[-1].get('organization') or 'me'}/{self.repos[-1]['name']}"}
        if place == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return {"errors": [], "warnings": []}
        if "/preupload/" in place:
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        if place.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}} for one in asked
                ],
            }
        if method == "PUT" and place.startswith("/lfs/"):
            self.objects[place.removeprefix("/lfs/")] = body
            return {}
        if "/commit/" in place:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            return {"commitUrl": f"{self.address}/me/a/commit/0", "commitOid": "0" * 40}
        if place.startswith("/api/models/") and (name := place.removeprefix("/api/models/")) in self.known:
            return {"id": name, **self.known[name]}
        return None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, where somebody is logged in."""
    here = Hub()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else self._chunks()
            here.tokens[self.path] = self.headers.get("Authorization")
            status = next((code for part, code in here.refuses.items() if part in self.path), None)
            said = None if status else here.answer(self.command, self.path, body)
            text = json.dumps({"error": "no"} if said is None else said).encode()
            self.send_response(status or (404 if said is None else 200))
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text)

        def _chunks(self) -> bytes:
            body = b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    here.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield here
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(small_flux_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A short erasure of a tiny pipeline in a folder."""
    out = tmp_path_factory.mktemp("runs") / "erased"
    model, few = str(small_flux_folder), {"budget": 8, "steps": 3, "window": (1, 2), "evaluate": 4, "previews": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "STEPS", 2)
        fs.erase(model, targets="red circle", anchors="blue circle", out=out, **few)
    return out


def test_an_adapter_arrives_with_its_card_pictures_and_settings(
    run: pathlib.Path, hub: Hub, small_flux_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    assert cli.main(["push", str(run), "me/no-red", "--private"]) == 0
    assert f"{hub.address}/me/no-red" in capsys.readouterr().out
    assert hub.repos[0]["name"] == "no-red" and hub.repos[0]["visibility"] == "private"
    assert hub.tokens["/api/repos/create"] == "Bearer hf_secret"
    adapter = "pytorch_lora_weights.safetensors"
    assert hub.files[adapter] == (run / "adapter" / adapter).read_bytes()
    assert {"README.md", "config.toml", "images/000-before.png", "images/000-after.png"} <= hub.files.keys()
    assert hub.files["images/000-after.png"] == (run / "samples" / "000-after.png").read_bytes()
    text = hub.files["README.md"].decode()
    assert hub.cards == [text]
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"fieldsmith", "fieldsmith-erase", "lora"} <= set(data.tags) and data.license is None
    assert data.widget[0]["output"]["url"] == "images/000-after.png"
    assert "targets: red circle" in text and "anchors: blue circle" in text and "look it up" in text
    for name in ("images/000-before.png", "## Side effects", "brightness", "pipe.load_lora_weights('me/no-red')"):
        assert name in text, name
    # nothing of this machine's folders
    assert str(small_flux_folder.parent) not in text + hub.files["config.toml"].decode()
    # the command of the card, where what it names lies beside it under its last name
    (tmp_path / "config.toml").write_bytes(hub.files["config.toml"])
    assert "fieldsmith erase --config config.toml --out runs/erase" in text
    settings = verbs.settings("erase", ["--config", str(tmp_path / "config.toml")])
    first = verbs.settings("erase", ["--config", str(run / "config.toml")])
    assert settings == first.replace(model=small_flux_folder.name)


def test_a_student_arrives_as_a_pipeline_that_loads(
    hub: Hub, with_tiny_zoo: None, unet_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(unet_folder, tmp_path / "small" / "model")  # as `distill` ships it
    settings = {"teacher": "zoo:digits-unet", "data": "digits", "student": 1.2}
    result = Result("distill", settings, {"adapter": "model"}, (), tmp_path / "small")
    result.push_to_hub("me/small-digits")
    there = tmp_path / "there"
    for name, content in hub.files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    mine, theirs = result.model.network.state_dict(), load(there).network.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    data = ModelCard(hub.files["README.md"].decode()).data
    assert data.license == "apache-2.0" and data.pipeline_tag == "unconditional-image-generation"
    assert "lora" not in data.tags
    assert "DiffusionPipeline.from_pretrained('me/small-digits')" in hub.files["README.md"].decode()


def test_a_run_without_a_folder_is_pushed_from_memory(run: pathlib.Path, hub: Hub) -> None:
    opened = Result.open(run)
    Result(opened.verb, opened.config, opened.metrics, opened.pairs, None, opened.model).push_to_hub("me/a")
    sent = hub.files["pytorch_lora_weights.safetensors"]
    assert hashlib.sha256(sent).hexdigest() in hub.objects and len(sent) > 1000


def test_what_the_bases_card_says_is_passed_on(run: pathlib.Path, hub: Hub) -> None:
    hub.known["org/base"] = {
        "pipeline_tag": "text-to-image",
        "cardData": {"license": "other", "license_name": "their-own", "license_link": "https://x/LICENSE"},
    }
    opened = Result.open(run)
    config = {**opened.config, "model": "org/base"}
    Result(opened.verb, config, opened.metrics, opened.pairs, run).push_to_hub("me/a")
    data = ModelCard(hub.files["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation) == ("org/base", "adapter")
    assert (data.license, data.license_name, data.license_link) == ("other", "their-own", "https://x/LICENSE")
    Result(opened.verb, {**opened.config, "model": "org/gone"}, opened.metrics, (), run).push_to_hub("me/a")
    data = ModelCard(hub.files["README.md"].decode()).data
    assert data.base_model is None and data.license is None


@pytest.mark.parametrize(
    ("file", "text", "licence", "name"),
    [
        ("README.md", "---\nlicense: mit\n---\n# It", "mit", None),
        ("LICENSE.md", "\nOpen RAIL++ License\n\nterms", "other", "open-rail-license"),
    ],
)
def test_the_licence_of_a_bases_folder_is_found(
    run: pathlib.Path, hub: Hub, small_flux_folder: pathlib.Path, tmp_path: pathlib.Path, file: str, text: str,
    licence: str, name: str | None,
) -> None:  # fmt: skip
    base = tmp_path / "base"
    base.mkdir()
    for part in small_flux_folder.iterdir():
        (base / part.name).symlink_to(part)
    (base / file).write_text(text)
    opened = Result.open(run)
    Result(opened.verb, {**opened.config, "model": str(base)}, opened.metrics, (), run).push_to_hub("me/a")
    data = ModelCard(hub.files["README.md"].decode()).data
    assert (data.license, data.license_name) == (licence, name)
    assert hub.files.get("LICENSE") == (text.encode() if name else None)


def test_words_of_users_are_no_markdown() -> None:
    about = About("align", {"model": "org/m", "prompts": [ODD], "reward": "given:f"}, "adapter", [("x|y", "1", "2")],
                  [], [(ODD, b"", b"")])  # fmt: skip
    text = card("me/a", about, Base("org/m", hub=True))
    data = ModelCard(text).data
    assert data.instance_prompt == " ".join(ODD.split()) == data.widget[0]["text"].replace("\n", " ")
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body and "[cat](" not in body and "\n# \\\\" not in body and "x\\|y" in body
    assert "objects in Python" in body
    assert plain_text("a\x1b[31mb\u202e\n\nc_d") == "a \\[31mb c\\_d"


BAD = {
    "nobody is logged in": "no token",
    "no run": "is no finished run",
    "not finished": "is no finished run",
    "no owner": "is no name of the hub; name it owner/name",
    "an address": "is no name of the hub",
    "one word": "push takes a run's folder and a repository",
    "a flag": "--privat",
    "a token that is refused": "the hub refused the token; `hf auth login`",
    "somebody else's": "this token may not write to 'them/a'",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(
    what: str, run: pathlib.Path, hub: Hub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = {
        "no run": [str(tmp_path), "me/a"], "not finished": [str(tmp_path / "half"), "me/a"],
        "no owner": [str(run), "a"], "an address": [str(run), "https://hub/me/a"], "one word": [str(run)],
        "a flag": [str(run), "me/a", "--privat"], "somebody else's": [str(run), "them/a"],
    }.get(what, [str(run), "me/a"])  # fmt: skip
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.toml").write_text((run / "config.toml").read_text())
    if what == "nobody is logged in":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.refuses = {"a token that is refused": {"whoami": 401}, "somebody else's": {"repos/create": 403}}.get(what, {})
    assert cli.main(["push", *words]) == 2
    said = capsys.readouterr().err
    assert BAD[what] in said and said.count("\n") == 1 and not hub.files


def test_a_network_that_is_not_there_ends_with_3(
    run: pathlib.Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert cli.main(["push", str(run), "me/a"]) == 3
    said = capsys.readouterr().err
    assert "the network failed: " in said and said.count("\n") == 1
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    hub.refuses = {"repos/create": 503}
    assert cli.main(["push", str(run), "me/a"]) == 3
    assert "the hub did not take 'me/a'" in capsys.readouterr().err


def test_a_run_that_shipped_no_weights_is_refused(run: pathlib.Path, hub: Hub) -> None:
    opened = Result.open(run)
    pair = Pair("", torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    none = Result(opened.verb, opened.config, {"adapter": "none: the projection"}, (pair,), run)
    with pytest.raises(fs.InputError, match=r"shipped no weights \(none: the projection\)"):
        none.push_to_hub("me/a")
