"""`sharpen` on rectified flow: exact on a mixture's velocity, and a run on a small trained model of words."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fieldsmith import data
from fieldsmith.cli import main
from fieldsmith.methods.sharpen import losses as terms
from fieldsmith.methods.sharpen import sampling
from fieldsmith.methods.sharpen import step as module
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.step import Step
from fieldsmith.models import load
from fieldsmith.models.exact import Exact
from fieldsmith.paths import RectifiedFlow
from fieldsmith.pictures import Frame
from fieldsmith.samplers import flow_grid, rollout
from fieldsmith.training import Log
from fieldsmith.worlds import catalogue
from fieldsmith.worlds.mixtures import Mixture, lattice
from fieldsmith.worlds.shapes import HELD_OUT
from tests.drawn import seeded

FLOW, MODEL = RectifiedFlow(), "zoo:shapes-flux-small"
CONFIG = SharpenConfig(method="plain", batch=16, probes=0.5, strength=3.0, bank=4_000)
SHORT = ["--scale", "laptop", "--steps", "2", "--batch", "4", "--samples", "4", "--sampler-steps", "2"]


def exact(mixture: Mixture, steps: int = 4) -> Exact:
    model = Exact(mixture, FLOW, flow_grid(steps), width=8)
    model.network.double()
    return model


def states(mixture: Mixture, n: int = 200) -> torch.Tensor:
    return mixture.sample(n, seeded()).double()


def test_the_loss_is_of_the_velocity_at_the_times_asked_for() -> None:
    mixture = lattice()
    step = Step(exact(mixture), states(mixture), replace(CONFIG, times=(0.2, 0.8)))
    rows, log = step.draw(seeded(1)), Log()
    t = rows.t[:, None]
    torch.testing.assert_close(rows.x_t, (1 - t) * rows.x_0 + t * rows.eps)
    assert 0.2 <= float(rows.t.min()) < 0.4 and 0.6 < float(rows.t.max()) <= 0.8
    error = (mixture.velocity(rows.x_t, rows.t, FLOW) - (rows.eps - rows.x_0)).square().mean()
    torch.testing.assert_close(step(rows, seeded(), log).total, error)
    every = Step(exact(mixture), states(mixture), CONFIG).times
    assert len(every) == 1_000 and float(every[0]) > 0 and float(every[-1]) < 1


def test_the_jacobian_terms_are_those_of_the_flows_score() -> None:
    mixture = lattice()
    model, data_ = exact(mixture), states(mixture)
    rows = Step(model, data_, CONFIG).draw(seeded(1))
    x_t, t = rows.x_t[:8], rows.t[:8]
    J, sigma2 = mixture.score_jacobian(x_t, t, FLOW), t[:, None] ** 2
    probe = torch.randn(8, 2, generator=seeded(5), dtype=torch.float64)

    def term(method: str) -> torch.Tensor:
        found = Step(model, data_, CONFIG.replace(method=method))(rows, seeded(5), Log()).term
        assert found is not None
        return found / 3

    expected = terms.jacobian_floor(sigma2 * torch.einsum("nab,nb->na", J, probe)).mean()
    torch.testing.assert_close(term("jacobian-floor"), expected)
    unit = probe / probe.norm(dim=1, keepdim=True)
    along = sigma2 * torch.einsum("nab,nb->na", J, unit)
    expected = terms.jacobian_match(along, unit, rows.eps[:8] - mixture.eps(x_t, t, FLOW)).mean()
    torch.testing.assert_close(term("jacobian-match"), expected)


def test_neighbours_target_is_the_mean_velocity_over_the_data() -> None:
    points = states(lattice(), 6)
    narrow = 1e-3**2 * torch.eye(2, dtype=torch.float64).expand(6, 2, 2)
    whole = Mixture(points, narrow, torch.full((6,), 1 / 6, dtype=torch.float64))
    step = Step(exact(lattice()), points, CONFIG.replace(method="neighbours", off_path=0.5, times=(0.4, 1.0)))
    rows = step.draw(seeded(1))  # a bank of 4,000 out of 6 holds each about equally often
    error = (rows.eps - rows.x_0 - whole.velocity(rows.x_t, rows.t, FLOW)).square().mean()
    assert float(error) < 0.01 * float(whole.velocity(rows.x_t, rows.t, FLOW).square().mean())


def test_steering_is_by_the_velocity_down_from_pure_noise() -> None:
    sharp, blunt = lattice(), lattice()
    blunt = Mixture(blunt.means, 4 * blunt.covariances, blunt.weights)
    model, worse = exact(sharp), exact(blunt)
    x = torch.randn(64, 2, generator=seeded(3), dtype=torch.float64)
    for t in (1.0, 0.7):
        at = torch.tensor(t, dtype=torch.float64)
        v, w = (one.velocity(x, at.expand(64), FLOW) for one in (sharp, blunt))
        found = sampling.Steered(model, worse, 2.5).predict(x, at, model.encode([""]))
        torch.testing.assert_close(found.velocity, w + 2.5 * (v - w))
    found = sampling.Steered(model, worse, 1.0).predict(x, at, model.encode([""]))
    assert torch.equal(found.velocity, model.predict(x, at, model.encode([""])).velocity)


def test_draws_are_eulers_and_steering_draws_them_into_the_modes() -> None:
    sharp = lattice()
    smooth = [Mixture(sharp.means, size * sharp.covariances, sharp.weights) for size in (4, 16)]
    model, worse = (Exact(one, FLOW, flow_grid(40), width=8) for one in smooth)
    own = sampling.draw(model, 400, 40, 7, batch=400)
    by_hand = rollout(
        lambda x, t: model.predict(x, t, model.encode([""])), model.noise(400, seeded(7)), flow_grid(40)
    ).last  # fmt: skip
    assert torch.equal(own, by_hand)
    away = sampling.draw(model, 400, 40, 7, sampling.steered(*map(sampling.field_of, (model, worse)), 1.5), batch=400)
    far = [(torch.cdist(x.double(), sharp.means.double()).amin(1)).square().mean() for x in (own, away)]
    assert far[1] < 0.8 * far[0]
    nearest = torch.cdist(away.double(), sharp.means.double()).argmin(1)
    assert len(nearest.unique()) == len(sharp.means)  # no mode is lost


# data of a model of words


def picture(folder: pathlib.Path, name: str, level: int) -> None:
    Image.new("RGB", (32, 32), (level, 90, 90)).save(folder / name)


def test_captions_are_read_where_there_are_some(tmp_path: pathlib.Path) -> None:
    frame, plain, told = Frame(32), tmp_path / "plain", tmp_path / "told"
    for folder in (plain, told):
        folder.mkdir()
        for i in range(3):
            picture(folder, f"{i}.png", 60 * i)
            if folder is told:
                (folder / f"{i}.txt").write_text(f"a red star {i}")
    assert data.load(plain, frame, captioned=None).captions == ()
    assert data.load(told, frame, captioned=None).captions == ("a red star 0", "a red star 1", "a red star 2")
    classes = tmp_path / "classes"
    for name in ("star", "ring"):
        (classes / name).mkdir(parents=True)
        picture(classes / name, "0.png", 9)
    assert data.load(classes, frame, captioned=None).captions == ("ring", "star")
    images = [torch.zeros(3, 32, 32)] * 2
    assert data.load(images, frame, captioned=None).captions == ()
    assert data.load([(image, "a star") for image in images], frame, captioned=None).captions == ("a star",) * 2


def test_the_shapes_have_captions_and_a_judge() -> None:
    world = catalogue.load("shapes", 16)
    images, captions = world.captioned(40, 3)  # type: ignore[attr-defined]
    assert len(captions) == 40 and torch.equal(images, world.sample(40, 3))
    verdicts = world.judge(images)
    assert verdicts.valid.all() and not any(world.novel(content) for content in verdicts.contents)
    held_out = world.judge(world.sample(4, 3, held_out=True))
    assert set(held_out.contents) == {" ".join(HELD_OUT)} and all(map(world.novel, held_out.contents))
    nothing = world.judge(torch.full((1, 3, 16, 16), 0.9))
    assert not nothing.valid.any() and nothing.reasons == (("no shape of one colour",),)


# whole runs


def metrics_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_flow_gets_a_guide_that_samples_with_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL", 40)
    out = tmp_path / "run"
    assert main(["sharpen", "--model", MODEL, "--guide-size", "2", *SHORT, "--out", str(out)]) == 0
    found = metrics_of(out)
    assert found["world"] == "shapes" and found["after"]["images"] == 4 and "hallucinated" in found["after"]
    assert '"velocity error"' in (out / "metrics.jsonl").read_text()
    base, guide = load(MODEL), load(out / "guide")
    sizes = [sum(p.numel() for p in one.network.parameters()) for one in (base, guide)]
    assert guide.family == "flux" and sizes[1] < 0.7 * sizes[0]
    page = (out / "report.html").read_text()
    assert f"--worse {out / 'guide'}" in page and "variance small" not in page
    grids = [tmp_path / f"{name}.png" for name in ("steered", "off", "plain")]
    words = ["sample", "--model", MODEL, "--prompts", "a red star", "--each", "2", "--steps", "2"]
    for grid, scale in zip(grids, (["--guidance", "3"], ["--guidance", "1"], None), strict=True):
        worse = [] if scale is None else ["--worse", str(out / "guide"), *scale]
        assert main([*words, *worse, "--out", str(grid)]) == 0
    steered, off = (torch.tensor(list(Image.open(grid).getdata())) for grid in grids[:2])
    assert not torch.equal(steered, off)


def test_without_a_judge_a_folder_with_captions_is_measured_by_sharpness(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fieldsmith.methods.sharpen.measure.PATHS", 1)
    folder, out = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i, caption in enumerate(("a red star", "a blue ring", "a green cross")):
        picture(folder, f"{i}.png", 60 * i)
        (folder / f"{i}.txt").write_text(caption)
    words = ["--data", str(folder), "--preset", "jacobian-floor", "--probes", "0.5"]
    assert main(["sharpen", "--model", MODEL, *words, *SHORT, "--out", str(out)]) == 0
    found = metrics_of(out)
    assert found["after"]["sharpness"]["n"] == 1 and found["gradient share"] > 0
    page = (out / "report.html").read_text()
    assert "How sharp the field is" in page and "name one with --judge" in page and "a red star" in page
    trained, base = load(out / "model"), load(MODEL)
    x = base.noise(2, seeded(1))
    words_ = base.encode(["a red star"])
    moved = [one.predict(x, torch.tensor(0.5), words_).value for one in (trained, base)]
    assert not torch.equal(*moved)


def test_captions_reach_the_network_row_by_row() -> None:
    model = load(MODEL)
    captions = ["a red star", "a blue ring", "a red star"]
    latents = model.encode_images(torch.rand(3, 3, 32, 32, generator=seeded(2)))
    step = Step(model, latents, CONFIG.replace(batch=6), captions)
    rows = step.draw(seeded(1))
    assert step.prompts == ("a red star", "a blue ring") and rows.prompt is not None
    asked = [step.prompts[row] for row in rows.prompt.tolist()]
    own = [captions[int((latents - x).flatten(1).abs().sum(1).argmin())] for x in rows.x_0]
    assert asked == own and len(set(asked)) == 2
    with torch.no_grad():
        v = model.predict(rows.x_t, rows.t.float(), model.encode(asked)).velocity
        found = step(rows, seeded(), Log()).total
    torch.testing.assert_close(found, (v - (rows.eps - rows.x_0)).square().flatten(1).mean(1).mean())
    assert sampling.spread(("a", "b", "c"), 2) == ["a", "b"] and sampling.spread(("a", "b"), 4) == ["a", "a", "b", "b"]
