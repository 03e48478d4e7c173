"""`align --preset dpo`: Diffusion-DPO from preference pairs, against closed forms, its release, and as a user meets it.

arXiv 2311.12908 has eps on DDPM; on a flow the same stands with the velocity. People who choose by a reward r
(Bradley-Terry) should tilt the law by r / beta.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

import fieldsmith as fs
from fieldsmith import preferences, verb
from fieldsmith.cli import main
from fieldsmith.commands.verbs import settings
from fieldsmith.errors import InputError
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.dpo import posterior_weight
from fieldsmith.methods.align.losses import dpo_loss, log_gain
from fieldsmith.methods.align.pairs import held_out
from fieldsmith.methods.align.step import Inputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.policy.schedule import schedule
from fieldsmith.models.exact import Exact
from fieldsmith.paths import RectifiedFlow, VariancePreserving, noised
from fieldsmith.pictures import Frame
from fieldsmith.preferences import Preferences
from fieldsmith.samplers import ddim_grid, euler, flow_grid
from fieldsmith.worlds.mixtures import Mixture, isotropic, triangle
from tests.drawn import f64, normal, seeded

FLOW = RectifiedFlow()
TOY = VariancePreserving((1 - torch.linspace(1e-4, 0.03, 500, dtype=torch.float64)).cumprod(0))
PATHS = pytest.mark.parametrize("path", [FLOW, TOY], ids=["flow", "vp"])


# the loss


def released(output: Tensor, reference: Tensor, target: Tensor, beta_dpo: float) -> Tensor:
    """SalesforceAIResearch/DiffusionDPO 8d3ee5c, train.py, in its own order: chosen rows first, errors are means."""
    losses, given = ((f - target).pow(2).flatten(1).mean(1).chunk(2) for f in (output, reference))
    inside = -0.5 * beta_dpo * ((losses[0] - losses[1]) - (given[0] - given[1]))
    return -torch.nn.functional.logsigmoid(inside).mean()


def test_the_loss_and_its_gradient_are_the_releases():
    """Whose beta is of means over a row's numbers; ours is of sums, so that 5,000 at SD1.5 is 0.305."""
    output, reference, target = (normal(10, 4, 3, 3, seed=seed) for seed in range(3))
    output.requires_grad_(True)
    chosen, rejected = log_gain(output, reference, target).chunk(2)
    ours = dpo_loss(chosen, rejected, 0.3).mean()
    theirs = released(output, reference, target, 0.3 * 36)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    one, other = (torch.autograd.grad(loss, output)[0] for loss in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert float(dpo_loss(*log_gain(reference, reference, target).chunk(2), 0.3).mean()) == pytest.approx(
        0.693147, 1e-6
    )


def drawn(world: Mixture, path, k: int, b: Tensor, shared: bool, n: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Pairs noised at step k: the schedule, the reference's outputs and targets (2, n, d), P(first is chosen) (n,)."""
    grid = flow_grid(10) if path is FLOW else ddim_grid(TOY, 10)
    s = schedule(path, grid, "velocity" if path is FLOW else "eps", "ddim", 1.0)
    x_0 = world.sample(2 * n, seeded(1)).reshape(2, n, -1)
    eps = normal(1 if shared else 2, n, x_0.shape[2], seed=2).expand_as(x_0)
    t, step = s.times[k], torch.full((n,), k)
    field = world.velocity if path is FLOW else world.eps
    reference = torch.stack([field(noised(path, x, e, t), t, path) for x, e in zip(x_0, eps, strict=True)])
    target = torch.stack([s.target(x, e, step) for x, e in zip(x_0, eps, strict=True)])
    return s, reference, target, torch.sigmoid((x_0[0] - x_0[1]) @ b)


def slope(d: Tensor, reference: Tensor, target: Tensor, first: Tensor, beta: float) -> Tensor:
    """The gradient (d,) by a shift of the output that is the same everywhere, of the loss that people's choices have on
    average: either image of a pair is the chosen one as often as they choose it."""
    d = d.clone().requires_grad_(True)
    one, other = (log_gain(ref + d, ref, y) for ref, y in zip(reference, target, strict=True))
    loss = first * dpo_loss(one, other, beta) + (1 - first) * dpo_loss(other, one, beta)
    return torch.autograd.grad(loss.mean(), d)[0]


@PATHS
@pytest.mark.parametrize("k", [1, 5, 8])
def test_with_one_noise_for_both_a_gaussians_optimum_is_this_closed_form(path, k):
    """The noise cancels in eps_hat - eps of two images, so that the loss is a logistic regression of their difference,
    at rest where d = -b s^2 / (beta kappa sigma^2), row by row. kappa is d(output) / d(x_0), s^2 = alpha^2 v + sigma^2.
    """
    b, beta, v = f64(0.8, -0.5), 0.7, 0.6
    s, reference, target, first = drawn(isotropic(f64([0.4, 0.1]), v**0.5), path, k, b, True, 50)
    alpha, sigma = path.alpha(s.t[k]), path.sigma(s.t[k])
    kappa = -1 / s.gain[k]
    d = -b * (alpha**2 * v + sigma**2) / (beta * kappa * sigma**2)
    assert float(slope(d, reference, target, first, beta).abs().max()) < 1e-12
    assert float(slope(0.9 * d, reference, target, first, beta).abs().max()) > 1e-3


@PATHS
@pytest.mark.parametrize("k", [1, 5, 8])
def test_by_the_posteriors_weight_a_gaussian_rests_at_the_tilted_law(path, k):
    """Of variance 1, where preferences are weak: the field of p_ref exp(r / beta), at every time and on either path."""
    b, beta = f64(0.08, -0.05), 0.7
    world = isotropic(f64([0.4, 0.1]), 1.0)
    s, reference, target, first = drawn(world, path, k, b, False, 100_000)
    star = world.tilted(b, strength=1 / beta).mixture
    field = "velocity" if path is FLOW else "eps"
    x = f64([0.3, -0.2])
    d = (getattr(star, field)(x, s.t[k], path) - getattr(world, field)(x, s.t[k], path))[0]
    weight = float(posterior_weight(s)[k])
    at_rest, at_start = (slope(at, reference, target, first, beta * weight).norm() for at in (d, 0 * d))
    assert float(at_rest / at_start) < 0.03


# training


def small_triangle() -> Mixture:
    """Three modes whose mixture has about unit variance, as latents have."""
    return isotropic(triangle().means / 3.6, 0.2)


B = f64(-1.0, 0.0)


def chosen_pairs(n: int) -> Preferences:
    """By Bradley-Terry on r(x) = B.x."""
    x = small_triangle().sample(2 * n, seeded(3))
    one, other = x[:n], x[n:]
    first = torch.rand(n, generator=seeded(4), dtype=torch.float64) < torch.sigmoid((one - other) @ B)
    chosen, rejected = (torch.where(side[:, None], one, other).float() for side in (first, ~first))
    return Preferences(("",) * n, chosen, rejected)


def modes(model: Exact) -> Tensor:
    """How many of 2,000 samples lie in each mode, as shares."""
    x, condition = model.noise(2000, seeded(9)), model.encode([""]).repeat(2000)
    with torch.no_grad():
        for t, t_next in zip(model.grid_times[:-1], model.grid_times[1:], strict=True):
            x = euler(model.predict(x, t, condition), t_next)
    return small_triangle().fractions(x.double())[:3]


def left(model: Exact) -> float:
    """What training left of the distance (total variation) to the tilted law's modes, as a share."""
    wanted = modes(Exact(small_triangle().tilted(B).mixture, model.path, model.grid_times))
    with model.reference():
        before = modes(model)
    return float((modes(model) - wanted).abs().sum() / (before - wanted).abs().sum())


def trained_on_pairs(name: str, path, epochs: int = 60) -> tuple[Exact, list[dict[str, float]]]:
    grid = flow_grid(16) if path is FLOW else ddim_grid(TOY, 16)
    model = Exact(small_triangle(), path, grid, width=64)
    config = AlignConfig.preset_of(name, "laptop", {}).replace(
        pairs="given:4000", prompts=("",), steps=16, full=True, subset="all", temperature=1.0, ema=0.9, lr=3e-3,
        chunk=100_000, prompts_per_epoch=128, epochs=epochs, updates=1,
    )  # fmt: skip
    logs: list[dict[str, float]] = []
    given = Inputs(pairs=chosen_pairs(4000))
    verb.train(ALIGN, model, config, given, callback=lambda step, log: logs.append(log) if step else None)
    return model, logs


@PATHS
def test_training_moves_the_modes_to_the_tilted_weights(path):
    """(1/3, 1/3, 1/3) to (0.12, 0.61, 0.27)."""
    model, logs = trained_on_pairs("dpo-posterior", path)
    assert left(model) < 0.4
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and logs[-1]["preference accuracy"] > 0.55
    assert logs[-1]["log gain of the chosen"] > logs[-1]["log gain of the rejected"]


def test_as_released_a_flow_comes_near_the_tilted_weights_and_a_diffusion_overshoots():
    """Equally weighed errors of eps pull hardest where there is least of the image: docs/align.md says so."""
    flow, vp = (trained_on_pairs("dpo", path)[0] for path in (FLOW, TOY))
    assert left(flow) < 0.4
    assert left(vp) > 1 and float(modes(vp)[1]) > 0.9


# pairs as users have them


def square(path: pathlib.Path, colour: str, mark: int = 0) -> pathlib.Path:
    image = Image.new("RGB", (40, 32), colour)
    ImageDraw.Draw(image).point((mark % 40, mark // 40), "black")
    image.save(path)
    return path


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """pairs.jsonl of 20 pairs of two prompts: the red image is chosen."""
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(20):
        names = [f"images/{colour}-{i}.png" for colour in ("red", "blue")]
        for name, colour in zip(names, ("red", "blue"), strict=True):
            square(tmp_path / name, colour, i)
        prompt = ("a red circle", "a blue square")[i % 2]
        lines.append({"prompt": prompt, "chosen": names[0], "rejected": names[1]})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def pick_a_pic(folder: pathlib.Path, i: int, label: float, **changes: Any) -> dict[str, Any]:
    images = {f"jpg_{k}": (folder / "images" / f"{c}-{i}.png").read_bytes() for k, c in enumerate(("red", "blue"))}
    return {"caption": "a red circle", **images, "label_0": label, "label_1": 1 - label, **changes}


def colours(given: Preferences) -> list[tuple[int, int]]:
    """Whether red (0) or blue (2) is chosen and rejected."""
    both = given.images(Frame(8))
    return list(zip(*([int(image.flatten(1).mean(1).argmax()) for image in part[:]] for part in both), strict=True))


def test_a_file_and_pick_a_pics_rows_are_read_and_ties_are_skipped(folder, capsys):
    given = preferences.load(folder / "pairs.jsonl")
    assert given.prompts[:3] == ("a red circle", "a blue square", "a red circle") and set(colours(given)) == {(0, 2)}
    rows = [pick_a_pic(folder, 0, 1.0), pick_a_pic(folder, 1, 0.5), pick_a_pic(folder, 2, 0)]
    assert colours(preferences.load(row for row in rows)) == [(0, 2), (2, 0)]
    assert "these pairs: 1 of 3 pairs are ties, which are skipped" in capsys.readouterr().err

    class Dataset:
        """What is asked of a dataset of the `datasets` library."""

        column_names = tuple(rows[0])

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, key: Any) -> Any:
            return [row[key] for row in rows] if isinstance(key, str) else rows[key]

    assert colours(preferences.load(Dataset())) == [(0, 2), (2, 0)]


def test_images_of_every_kind_are_told_apart(folder):
    for one, other in ((Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")), (f64([0.0]), f64([1.0]))):
        pair = {"prompt": "a", "chosen": one, "rejected": other}
        assert len(preferences.load([pair]).prompts) == 1
        with pytest.raises(InputError, match="the two images of pair 1 are the same; remove the pair"):
            preferences.load([{**pair, "rejected": one.copy() if isinstance(one, Image.Image) else one.clone()}])


def test_pairs_are_held_out_by_prompt_or_one_by_one_where_prompts_are_few():
    many = [f"{i // 2}" for i in range(60)]
    assert held_out(many).nonzero().flatten().tolist() == [18, 19, 38, 39, 58, 59]
    assert held_out(["a", "b"] * 10).nonzero().flatten().tolist() == [9, 19] and not held_out(["a"] * 9).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rejected": "images/none.png"}, r"image 'images/none.png' of line 3 of '.*pairs.jsonl' does not exist; put"),
        ({"rejected": "images/red-2.png"}, r"the two images of line 3 of .* are the same; remove the pair"),
        ({"rejected": "copy.png"}, r"the two images of line 3 of .* are the same"),
        ({"rejected": "pairs.jsonl"}, r"image 'pairs.jsonl' of line 3 of .* cannot be read \(it is no image\)"),
        ({"rejected": None}, "line 3 of .* has no image 'rejected'; write {"),
        ({"prompt": 3}, "line 3 of .* has no prompt; write {"),
        ({"label_0": 0.3, "label_1": 0.7}, "line 3 of .* has label_0=0.3 and label_1=0.7; write 1 for the image that"),
        ({"label_0": 1}, "line 3 of .* has label_0=1 and label_1=None; write 1"),
        ("no json", "line 3 of .* is no JSON; write {"),
        ("tie", "pairs file '.*': all 20 pairs are ties, from which nothing can be learned"),
        ("empty", "pairs file '.*': no pair is there .the file or list is empty.; give some"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_bad_pairs_are_one_sentence_before_weights_are_loaded(folder, capsys, monkeypatch, change, says):
    monkeypatch.setattr(verb, "load_model", lambda *_: pytest.fail("weights were loaded"))
    file = folder / "pairs.jsonl"
    lines = file.read_text().splitlines()
    (folder / "copy.png").write_bytes((folder / "images" / "red-2.png").read_bytes())
    if isinstance(change, dict):
        lines[2] = json.dumps(json.loads(lines[2]) | change)
    if change == "no json":
        lines[2] = "{"
    if change == "tie":
        lines = [json.dumps(json.loads(line) | {"label_0": 0.5, "label_1": 0.5}) for line in lines]
    file.write_text("\n".join(lines) if change != "empty" else "\n")
    words = ["align", "--model", "zoo:shapes-flux-small", "--preset", "dpo", "--pairs", str(file)]
    assert main([*words, "--out", str(folder / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, said), said
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--preset", "dpo"], "no pairs given; add --pairs FILE.jsonl with a line {"),
        (["--preset", "dpo", "--pairs", "none.jsonl"], "pairs file 'none.jsonl' does not exist"),
        (["--preset", "nft", "--pairs", "x"], "pairs are what dpo learns from.*use --preset dpo"),
        (["--preset", "dpo", "--pairs", "p", "--reward", "brightness"], "reward 'brightness' has no use with dpo"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_words_that_do_not_go_together_are_refused(words, says):
    with pytest.raises(InputError, match=says):
        settings("align", [*words, "--out", "here"]).check()


def test_prompts_beside_pairs_are_refused_and_a_dict_too(folder):
    with pytest.raises(InputError, match="prompts come with the pairs"):
        fs.align("zoo:shapes-flux-small", prompts=["a star"], preset="dpo", pairs=folder / "pairs.jsonl")
    with pytest.raises(InputError, match="these pairs are one dict; give a list"):
        fs.align("zoo:shapes-flux-small", preset="dpo", pairs=pick_a_pic(folder, 0, 1.0))
    with pytest.raises(InputError, match="pair 1 is a str; give a dict"):
        fs.align("zoo:shapes-flux-small", preset="dpo", pairs=["a.png"])


@pytest.mark.usefixtures("few_steps")
def test_an_interrupted_run_resumes_to_the_same_weights_and_shows_what_it_learned(folder, small_flux_folder):
    words = ["align", "--model", str(small_flux_folder), "--preset", "dpo", "--pairs", str(folder / "pairs.jsonl"),
             "--scale", "laptop", "--epochs", "3", "--lr", "0.01", "--steps", "4", "--evaluate", "2", "--rank", "2",
             "--prompts-per-epoch", "4", "--held-out-rewards", "colour:red"]  # fmt: skip
    assert main([*words, "--out", str(folder / "whole")]) == 0

    def cut(done: int, log: dict[str, float]) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fs.align(config=settings("align", [*words[1:], "--out", str(folder / "cut")]), callback=cut)
    assert main([*words, "--out", str(folder / "cut")]) == 0
    one, other = (load_file(folder / n / "adapter" / "pytorch_lora_weights.safetensors") for n in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    metrics = json.loads((folder / "whole" / "metrics.json").read_text())
    assert metrics["method"] == "dpo" and set(metrics["rewards"]) == {"colour:red"}
    found = metrics["preferences"]
    assert found["held out"] and found["accuracy"]["n"] == 2 and found["accuracy"]["value"] == 1
    assert found["margin"]["value"] > 0 and metrics["kl"] > 0
    page = (folder / "whole" / "report.html").read_text()
    assert "The trained model ranks 100.0%" in page and "share of pairs ranked as people did" in page
    assert main(["plan", *words]) == 0


@pytest.mark.usefixtures("few_steps")
def test_pairs_in_python_serve_a_diffusion_model_of_classes(folder, unet_folder):
    """PIL images of another size, on DDPM, with a handful of pairs of which none is held out."""
    pairs = ({**pick_a_pic(folder, i, 1.0), "caption": "cat"} for i in range(6))
    result = fs.align(str(unet_folder), preset="dpo-posterior", pairs=pairs, epochs=1, steps=4, evaluate=2, rank=2)
    assert result.config.pairs == "given:6" and result.config.prompts == ("cat",)
    assert not result.metrics["preferences"]["held out"] and result.metrics["preferences"]["accuracy"]["n"] == 6
