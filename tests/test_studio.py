"""The studio's logic without its page, what it refuses, and its page where gradio is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import pathlib
import socket
from typing import Any

import pytest
import torch

import fieldsmith as fs
from fieldsmith.cli import main
from fieldsmith.commands import studio as command
from fieldsmith.studio import Studio, drawn, guarded, measures, open_studio, turned, undone

TINY = {"preset": "tiny", "budget": 12, "batch": 1, "steps": 6, "window": (1, 3), "evaluate": 0, "lr": 1e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A short erasure of the zoo's small model, strong enough to be seen. Read only."""
    out = tmp_path_factory.mktemp("studio") / "run"
    fs.erase("zoo:shapes-flux-small", "triangle", "circle", **TINY, out=out)
    return out


def test_scales_move_the_corrected_model_alone_and_the_base_is_back_to_the_last_bit(run):
    opened = open_studio(str(run), [str(run / "adapter")])
    assert len(opened.adapters) == 2 and not opened.edits
    weights = {name: value.clone() for name, value in opened.model.network.state_dict().items()}
    asked = {"prompt": "triangle", "seed": 3, "n": 2, "steps": 2}
    base, off = drawn(opened, scales=(0, 0), **asked)
    assert torch.equal(base, off)
    again, on = drawn(opened, scales=(1, 0), **asked)
    assert torch.equal(base, again) and not torch.equal(base, on)
    assert torch.allclose(on, drawn(opened, scales=(0.5, 0.5), **asked)[1], atol=1e-3)  # the same adapter, in halves
    assert all(torch.equal(value, weights[name]) for name, value in opened.model.network.state_dict().items())
    assert opened.model.adapters == ()
    rows = {name: (was, now) for name, was, now in measures(base, on)}
    assert rows["distance, RMS of pixels"][1] > 0 and measures(base, base)[-1][2] == 0
    with pytest.raises(fs.InputError, match="triangel"):
        drawn(opened, "triangel", (1, 1), steps=2)
    assert torch.equal(drawn(opened, scales=(0, 0), **asked)[1], base)  # nothing is left of what failed


def test_an_editors_turns_go_on_from_each_sides_own_result_and_are_undone():
    model = fs.load("zoo:scenes-kontext")
    opened = Studio("editor", model)
    assert opened.edits
    start = torch.full((3, model.resolution, model.resolution), 0.5)
    one = turned(opened, [(start, start)], "add a red disc top left", (), steps=2)
    two = turned(opened, one, "paint the red circle blue", (), steps=2)
    assert len(two) == 3 and torch.equal(*two[2]) and two[1][0].shape == start.shape
    assert len(undone(two)) == 2 and torch.equal(undone(two)[1][0], one[1][0])
    assert len(undone(two[:1])) == 1  # the source stays
    again = turned(opened, undone(two), "paint the red circle blue", (), steps=2)
    assert torch.equal(again[2][0], two[2][0])


def status(path: str, host: str = "127.0.0.1:7860", origin: str = "") -> int:
    """Of what a request gets; 200 where it reaches the app."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(guarded(app, 7860, pathlib.Path("/pictures"))(scope, None, send))
    return sent[0]["status"]


def test_only_its_own_page_on_this_machine_is_answered():
    assert status("/") == status("/", "localhost:7860") == status("/", origin="http://127.0.0.1:7860") == 200
    assert status("/", "evil.example:7860") == status("/", "127.0.0.1:80") == 403
    assert status("/", origin="http://evil.example") == status("/", origin="null") == 403


def test_no_file_outside_of_its_folder_is_served():
    assert status("/gradio_api/file=/pictures/a.png") == 200
    for path in ("/etc/passwd", "/pictures/../x", "/pictures2/a", "%2Fetc%2Fpasswd"):
        assert status(f"/gradio_api/file={path}") == 403, path
    assert status("/gradio_api/file/etc/passwd") == 403


def refused(capsys: Any, *words: str) -> str:
    assert main(["studio", *words]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1, sentence
    return sentence


def test_what_the_studio_refuses(capsys, monkeypatch, run):
    assert "no run or model given" in refused(capsys)
    real = importlib.util.find_spec
    for there in (None, True):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util, "find_spec", lambda name, *a, t=there: t if name == "gradio" else real(name, *a)
            )
            if there is None:
                assert "pip install 'fieldsmith[studio]'" in refused(capsys, str(run))
                continue
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                taken.listen()
                port = str(taken.getsockname()[1])
                assert f"port {port} is in use" in refused(capsys, str(run), "--port", port)
            words = ("--adapter", str(run / "adapter"), "--port", "17861")
            assert "family" in refused(capsys, "zoo:digits-unet", *words)  # of another family than the adapter


def test_the_page_is_built_where_gradio_is(run):
    gradio = pytest.importorskip("gradio")
    assert isinstance(command.page(open_studio(str(run))), gradio.Blocks)
