"""`fieldsmith edit` and `sample --image`, as a user meets them, on a tiny model; a judge behind HTTP included."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import fieldsmith
from experiments.tiny import kontext_pipeline
from fieldsmith.cli import main
from fieldsmith.commands.verbs import settings
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.models import load, load_adapter
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.report.grid import picture
from fieldsmith.result import Result
from fieldsmith.worlds.scenes import VOCABULARY, ScenesWorld

SHORT = ["--scale", "laptop", "--epochs", "1", "--groups", "2", "--rollouts", "2", "--turns", "2", "--steps", "2"]
SHORT += ["--evaluate", "6", "--evaluate-turns", "2", "--evaluate-steps", "2", "--still", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained editor of scenes, whose card names its world."""
    folder = tmp_path_factory.mktemp("model")
    words = kontext_pipeline(
        VOCABULARY,
        vae_channels=(8, 8, 8),
        latent_channels=4,
        layers=1,
        single_layers=1,
        heads=1,
        text_length=10,
        size=24,
    )
    FluxKontext(words, "tiny").save(folder)
    (folder / "card.json").write_text(json.dumps({"world": "scenes", "size": 24}))
    return str(folder)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """A file of three sessions of two turns, and their images."""
    folder = tmp_path_factory.mktemp("sessions")
    world = ScenesWorld(24).sessions(3, 2, 0)
    lines = []
    for i, image in enumerate(world.clean(0)):
        picture(image).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "instructions": [world.prompts(t)[i] for t in (1, 2)]}))
    (folder / "sessions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "sessions.jsonl"


@pytest.fixture
def server():
    """A chat server that says another number each time."""

    class Handler(BaseHTTPRequestHandler):
        count = 0

        def log_message(self, *_): ...

        def say(self, answer):
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.say({"data": [{"id": "eye"}]})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            Handler.count += 1
            self.say({"choices": [{"message": {"content": str(Handler.count % 11)}}]})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"remote:http://127.0.0.1:{http.server_port}/v1?pause=0.01"
    http.shutdown()


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_on_its_own_sessions_ships_an_adapter(model, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["edit", "--model", model, "--out", str(out), *SHORT]) == 0
    found = metrics_of(out)
    assert found["method"] == "fieldsmith" and found["adapter"] == "adapter" and found["steps"] == 4
    for when in ("before", "after"):
        assert [len(found[when][key]) for key in ("following", "gap", "overall", "consistency")] == [2] * 4
        assert len(found[when]["drift"]) == 1 and found[when]["marginal"][0]["n"] == 6
    # P G T (K + R + 3 R) and the identity branch's three for each edit; R is at most the sampler's steps
    assert found["nfe"] == 2 * 2 * 2 * (2 + 2 + 3 * 2) + 3 * 8
    html = (out / "report.html").read_text()
    assert "data:image/png" in html and "load_lora_weights" in html and "exposure gap" in html
    base, tuned = load(model), load(model)
    load_adapter(tuned, out / "adapter")
    x = base.noise(2, torch.Generator().manual_seed(0))
    condition = base.with_images(base.encode(["change nothing"]), torch.rand(2, 3, 24, 24))
    t = torch.full((2,), 0.5)
    assert not torch.equal(base.predict(x, t, condition).value, tuned.predict(x, t, condition).value)
    assert main(["edit", "--model", model, "--out", str(out), *SHORT]) == 0  # complete already
    assert "complete" in capsys.readouterr().err


def test_a_session_file_with_a_judge_behind_http(model, sessions, server, tmp_path):
    out = tmp_path / "run"
    words = ["--model", model, "--sessions", str(sessions), "--judge", server, "--resolution", "24", "--out", str(out)]
    assert main(["edit", *words, *SHORT]) == 0
    after = metrics_of(out)["after"]
    assert len(after["score of following"]) == 2 and 0 <= after["score of consistency"][0]["value"] <= 1
    assert "score of following" in (out / "report.html").read_text()


def brightness(before, after, instructions):
    """A judge of one's own."""
    assert len(before) == len(after) == len(instructions)
    return after.mean((1, 2, 3)).tolist(), 1 - (after - before).abs().mean((1, 2, 3)).numpy()


TINY = {"scale": "laptop", "epochs": 1, "groups": 2, "rollouts": 2, "turns": 2, "steps": 2, "evaluate_steps": 2}


def test_sessions_and_judge_of_ones_own_from_python(model, sessions, tmp_path):
    """One held-out session has values without intervals."""
    images = [Image.open(sessions.parent / f"{i}.png") for i in range(3)]
    own = [(image, ["change nothing", "remove the red circle"]) for image in images]
    result = fieldsmith.edit(load(model, 24), own, brightness, max_mean=1.0, evaluate=1, out=tmp_path / "run", **TINY)
    (before, _), (after, _) = (result.metrics[side]["score of following"] for side in ("before", "after"))
    assert before["n"] == after["n"] == 1 and after.get("low") is None
    assert "reward calls" in (tmp_path / "run" / "report.html").read_text()
    assert result.config.judge == "function:brightness" and result.config.sessions == "given:3"
    assert [name for name, _ in result.table()] == ["score of following", "score of consistency"]
    assert len(result.show().axes) == 2 * len(result.pairs) == 2
    again = Result.open(tmp_path / "run")
    assert again.metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_evaluate_0_trains_and_saves_alone(model, tmp_path):
    settings = {name: value for name, value in TINY.items() if name != "scale"}
    config = EditConfig(model=model, evaluate=0, max_mean=1.0, out=tmp_path / "run", **settings)
    result = fieldsmith.edit(judge=lambda *shown: brightness(*shown), config=config)
    assert result.metrics["steps"] == 4 and not {"before", "after"} & set(result.metrics)
    assert (tmp_path / "run" / "adapter").is_dir() and not result.pairs


def test_sample_runs_a_session_from_an_image(model, sessions, tmp_path):
    grid = tmp_path / "grid.png"
    words = ["--image", str(sessions.parent / "0.png"), "--prompts", "change nothing", "remove the red circle"]
    assert main(["sample", "--model", model, *words, "--each", "2", "--steps", "2", "--out", str(grid)]) == 0
    from PIL import Image

    assert Image.open(grid).size[0] > Image.open(grid).size[1]  # two rows of a start and two turns


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["--rollouts", "1"], "use at least 2"),
        (["--turns", "0"], "turns=0 must be at least 1"),
        (["--turns", "9"], "1 to 8 turns"),
        (["--judge", "me"], "use exact, remote:"),
        (["--judge", "nowhere.py:judge"], "file 'nowhere.py' does not exist"),
        (["--preset", "mt-nf"], "did you mean 'mt-nft'"),
        (["--objective", "none", "--identity", "0", "--steady", "0"], "trains nothing"),
        (["--credit", "turn", "--scoring", "last"], "needs every turn's score"),
        (["--dependency", "1.5"], "dependency=1.5 must be at most 1"),
        (["--old", "slow", "--objective", "grpo"], "is NFT's"),
        (["--sessions", "nowhere.jsonl"], "add --judge remote:"),
        (["--sessions", "nowhere.jsonl", "--judge", "SERVER"], "'nowhere.jsonl' does not exist"),
        (["--model", "zoo:shapes-flux"], "names no world of sessions"),
        (["--identity-prompt", "leave it"], "is not in the vocabulary"),
        (["--preset", "supervised", "--sessions", "SESSIONS", "--judge", "SERVER"], "session files lack"),
        (["--sessions", "SESSIONS", "--judge", "SERVER", "--turns", "3"], "have 2; lower it"),
        (["--judge", "remote:http://127.0.0.1:9/v1"], "does not answer"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(words, output, model, sessions, server, tmp_path, capsys):
    given = {"SESSIONS": str(sessions), "SERVER": server}
    out = tmp_path / "run"
    flags = [given.get(word, word) for word in words]
    named = [] if "--model" in flags else ["--model", model]
    assert main(["edit", *named, "--resolution", "24", *SHORT, *flags, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert output in " ".join(err.split()) and not out.exists()


def test_a_model_that_takes_no_images_is_refused(sessions, server, tmp_path, capsys):
    words = ["--model", "zoo:shapes-flux", "--sessions", str(sessions), "--judge", server, "--turns", "2"]
    assert main(["edit", *words, "--out", str(tmp_path / "run")]) == 2
    assert "draws from words alone" in capsys.readouterr().err


def test_a_config_file_repeats_a_run(model, tmp_path):
    first = settings("edit", ["--model", model, "--preset", "mt-grpo", "--lr", "0.01"])
    assert (first.objective, first.lr, first.preset) == ("grpo", 0.01, "mt-grpo")
    assert main(["edit", "--model", model, "--preset", "mt-grpo", "--out", str(tmp_path / "a"), *SHORT]) == 0
    again = ["edit", "--config", str(tmp_path / "a/config.toml"), "--out", str(tmp_path / "b")]
    assert main(again) == 0
    a, b = (metrics_of(tmp_path / name) for name in "ab")
    assert a["after"] == b["after"] and a["nfe"] == b["nfe"]
