"""Distillation's loop on a tiny teacher of digits: what each objective teaches, the cached teacher, costs, resuming."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.tiny import unet_pipeline
from fieldsmith import verb
from fieldsmith.errors import InputError
from fieldsmith.methods.distill import bank as banks
from fieldsmith.methods.distill import curriculum as weights_of
from fieldsmith.methods.distill import step as steps
from fieldsmith.methods.distill import teacher as asked_of
from fieldsmith.methods.distill.bank import SHARD, Bank, Source, draw, fingerprint, place, states_at
from fieldsmith.methods.distill.config import PRESETS, DistillConfig, objective_of
from fieldsmith.methods.distill.features import blocks, places
from fieldsmith.methods.distill.step import Step, check_pair
from fieldsmith.methods.distill.teacher import Feed, curriculum_for
from fieldsmith.models import load
from fieldsmith.models.branches import branches
from fieldsmith.models.shrink import shrink
from fieldsmith.models.unet import UNet
from fieldsmith.paths import noised, times_of
from fieldsmith.run import Run
from fieldsmith.training import Log, Optimisation, fit, step_generator
from fieldsmith.worlds.classes import digits
from tests.trained import distill

DATA = digits()
SOURCE = Source(DATA.images * 2 - 1, DATA.labels, DATA.names, "digits")
ONLINE = DistillConfig(bank=0, steps=12, batch=16, warmup=2, ema=0.8, shrink=3.0)
SPLIT = {"layout": "split", "null_share": 0.25}
OWN_SPLIT = {**SPLIT, "natural": True}


def tiny(widths: tuple[int, ...] = (16, 24), names: tuple[str, ...] = DATA.names, **options) -> UNet:
    settings = {
        "size": 8, "channels": 1, "class_rows": len(names) + 1, "attention": False,
        "beta_schedule": "squaredcos_cap_v2",
    }  # fmt: skip
    return UNet(unet_pipeline(widths=widths, **settings | options), "tiny", classes=names)


@pytest.fixture(scope="module")
def teacher() -> UNet:
    """Trained on the digits with dropped labels, briefly."""
    torch.set_num_threads(1)
    model = tiny()
    model.network.requires_grad_(True)

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        rows = torch.randint(len(SOURCE.states), (48,), generator=generator)
        label = SOURCE.prompt[rows].clone()
        label[torch.rand(48, generator=generator) < 0.2] = model.null_class
        t = model.path.time(torch.randint(model.path.length, (48,), generator=generator))
        eps = torch.randn(48, 1, 8, 8, generator=generator)
        pred = model.predict(noised(model.path, SOURCE.states[rows], eps, t), t, model.condition(label))
        yield (pred.eps - eps).square().mean()

    fit(model.trainable(), losses, Optimisation(60, 4e-3, 0.0, 10, cosine=True, clip=1.0, ema=0.95))
    model.network.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the module's runs keep what the teacher said."""
    return tmp_path_factory.mktemp("bank") / "digits"


def shards_of(n: int, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (banks, asked_of):
        monkeypatch.setattr(module, "SHARD", n)
    return n


@pytest.fixture
def banked(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> DistillConfig:
    """One shard, read by every run that uses this."""
    return replace(ONLINE, bank=shards_of(1024, monkeypatch), reuse=1e6, bank_folder=cache)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    return shards_of(64, monkeypatch)


def student_of(teacher: UNet, config: DistillConfig) -> UNet:
    scales = config.guidance_scales if config.objective == "w-conditioned" else None
    student = shrink(teacher, config.shrink, guidance_scales=scales, seed=config.seed)
    assert isinstance(student, UNet)
    return student


def taught(
    teacher: UNet, config: DistillConfig, run: Run | None = None, student: UNet | None = None, source: Source = SOURCE
) -> tuple[UNet, verb.Trained]:
    job, done = distill(teacher, student, source, config, run)
    assert isinstance(job.model, UNet)
    return job.model, done


def weights(model: UNet) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def errors(teacher: UNet, student: UNet) -> dict[str, float]:
    """Mean squared errors at held-out states: of both branches, of the gap, and of guidance at 4."""
    held = Source(DATA.held_images * 2 - 1, DATA.held_labels, DATA.names)
    t = times_of(teacher.path)[::4].float()
    x_t, prompt, _ = states_at(teacher, held, t, torch.Generator().manual_seed(5))
    ours, theirs = (branches(model, x_t, t, model.encode(DATA.names)[prompt]) for model in (student, teacher))
    found = {
        name: float((getattr(ours, name) - getattr(theirs, name)).square().mean())
        for name in ("conditional", "unconditional", "gap")
    }
    return {**found, "guided": float((ours.guided(4.0) - theirs.guided(4.0)).square().mean())}


# what each objective teaches


LEARN = {"steps": 50, "batch": 32, "warmup": 5, "lr": 4e-3}


@pytest.fixture
def forgetful(teacher, monkeypatch) -> UNet:
    """The teacher's own network with new class rows, the null one too: what distillation alone can bring back."""
    monkeypatch.setattr(steps, "check_pair", lambda *arguments: None)  # it is not smaller
    student = tiny()
    student.network.load_state_dict(teacher.network.state_dict())
    with torch.no_grad():
        student.network.class_embedding.weight.normal_(0, 3, generator=step_generator(1, 0))
    return student


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "dash"},
        {"objective": "dash", "anchor": 0.0, **SPLIT},
        {"objective": "matched-dropout", **OWN_SPLIT},
        {"objective": "student-dropout", **OWN_SPLIT},
    ],
    ids=["dash", "split", "matched-dropout", "student-dropout"],
)
def test_objectives_that_teach_the_null_branch_bring_it_back(teacher, banked, forgetful, settings):
    before = errors(teacher, forgetful)
    taught(teacher, replace(banked, **LEARN, **settings), student=forgetful)
    after = errors(teacher, forgetful)
    for branch in ("conditional", "unconditional"):
        assert after[branch] < 0.25 * before[branch]


@pytest.mark.parametrize("objective", ["conditional", "composite", "gap"])
def test_objectives_that_leave_a_direction_open_do_not(teacher, banked, forgetful, objective):
    """What each of them sees does come back; the null branch does not, as DASH's diagnosis says."""
    before = errors(teacher, forgetful)
    row = forgetful.network.class_embedding.weight[-1].clone()
    taught(teacher, replace(banked, **LEARN, objective=objective), student=forgetful)
    after = errors(teacher, forgetful)
    seen = {"conditional": "conditional", "composite": "guided", "gap": "gap"}[objective]
    assert after[seen] < 0.3 * before[seen]
    assert after["unconditional"] > (
        3 * after["conditional"] if objective == "conditional" else before["unconditional"]
    )
    moved = float((forgetful.network.class_embedding.weight[-1] - row).norm() / row.norm())
    assert (moved < 1e-3) == (objective == "conditional")  # never shown: only decayed


def test_the_log_holds_both_branches_errors_and_they_fall(teacher, tmp_path):
    config = replace(ONLINE, bank=SHARD, reuse=1e6, steps=40, batch=32, lr=4e-3, out=tmp_path / "run")
    run = Run(tmp_path / "run", "distill", config)
    taught(teacher, config, run)
    rows = run.history()
    assert len(rows) == 40 and (run.folder / "bank" / "bank.json").is_file()
    for name in ("conditional error", "unconditional error"):
        early, late = (sum(row[name] for row in some) for some in (rows[:5], rows[-5:]))
        assert late < 0.6 * early


# costs


@pytest.mark.parametrize(
    ("settings", "asked", "evaluations"),
    [
        ({"objective": "dash"}, 16, 16),
        ({"objective": "composite"}, 16, 16),
        ({"objective": "dash", **SPLIT}, 16, 16),
        ({"objective": "matched-dropout", **OWN_SPLIT}, 16, 16),
        ({"objective": "student-dropout", **OWN_SPLIT}, 16, 16),
        ({"objective": "conditional"}, 16, 16),
        ({"objective": "bk-sdm"}, 16, 16),
        ({"objective": "w-conditioned"}, 32, 16),  # both branches of each state, for one answer
        ({"objective": "scratch", **OWN_SPLIT}, 0, 16),
        ({"objective": "dash", "batch": 15}, 14, 14),  # seven pairs
    ],
)
def test_the_account_is_what_the_networks_really_did(teacher, settings, asked, evaluations):
    config = replace(ONLINE, steps=3, **settings)
    student = student_of(teacher, config)
    with teacher.count_nfe() as of_teacher, student.count_nfe() as of_student:
        cost = taught(teacher, config, student=student)[1].cost
    assert of_teacher.total == cost["teacher forwards"] == 3 * asked
    assert of_student.total == cost["student forwards"] == 3 * 3 * evaluations
    assert cost["teacher cost"] > 1
    assert cost["nfe"] == cost["student forwards"] + cost["teacher cost"] * cost["teacher forwards"]


def test_a_bank_counts_every_row_that_was_in_a_window(teacher, tmp_path, small_shards):
    """12 steps of 8 pairs at reuse 0.5 slide by three shards, whoever made them."""
    config = replace(ONLINE, bank=100, reuse=0.5, bank_folder=tmp_path / "bank")
    with teacher.count_nfe() as nfe:
        asked = taught(teacher, config)[1].cost["teacher forwards"]
    made = sorted(file.name for file in (tmp_path / "bank").glob("*.safetensors"))
    assert made == [f"shard-{k:05d}.safetensors" for k in range(4)]  # two at once, from the first to the third
    assert asked == 2 * 64 * 4 == nfe.total
    with teacher.count_nfe() as nfe:
        again = taught(teacher, config)[1].cost["teacher forwards"]
    assert again == asked and nfe.total == 0


# the bank


def test_two_banks_share_their_shards(teacher, tmp_path, small_shards):
    first, second = (Bank(tmp_path / "bank", teacher, SOURCE) for _ in range(2))
    with teacher.count_nfe() as nfe:
        rows = first.window(0, 2)
    assert first.teacher_states == nfe.total == 2 * 2 * small_shards
    again = second.window(0, 2)
    assert second.teacher_states == 0
    for name in ("x_t", "t", "prompt", "noise", "conditional", "gap"):
        assert torch.equal(getattr(rows, name), getattr(again, name)), name
    later = first.window(1, 2)  # slid on by one: a new shard, and an old one that is not asked for again
    assert first.teacher_states == 3 * 2 * small_shards
    known = {float(x) for x in rows.x_t[:, 0, 0, 0]}
    assert sum(float(x) in known for x in later.x_t[:, 0, 0, 0]) == small_shards
    assert first.window(1, 2) is later


def test_what_a_bank_kept_is_what_the_teacher_says(teacher, tmp_path, small_shards):
    """To fp16 of each branch, and of the gap on its own: a difference of rounded branches would lose what is small."""
    rows = Bank(tmp_path / "bank", teacher, SOURCE).window(0, 4)
    assert bool((rows.t.diff() >= 0).all()) and len(rows) == 256
    output = branches(teacher, rows.x_t, rows.t, teacher.encode(SOURCE.prompts)[rows.prompt])
    half = 2**-11 + 1e-5  # relative rounding of fp16
    assert bool(((rows.conditional - output.conditional).abs() <= half * output.conditional.abs() + 2e-6).all())
    assert bool(((rows.gap - output.gap).abs() <= half * output.gap.abs() + 2e-6).all())
    torch.testing.assert_close(rows.teacher.unconditional, output.unconditional, atol=2e-3, rtol=1e-3)
    subtracted = output.conditional.half() - output.unconditional.half()
    kept, lost = ((gap.float() - output.gap).square().mean() for gap in (rows.gap, subtracted))
    assert float(kept) < 0.05 * float(lost)


def test_a_banks_states_are_noised_data_at_every_time(teacher, tmp_path, small_shards):
    rows = Bank(tmp_path / "bank", teacher, SOURCE).window(0, 1)
    slices = (rows.t.double() * 1000 - 1).round() / 1000 * small_shards
    assert bool(((slices - torch.arange(small_shards)).abs() < 1.1).all())  # one time from each equal slice
    early = rows[rows.t < 0.3]
    alpha, sigma = (level[:, None, None, None] for level in (teacher.path.alpha(early.t), teacher.path.sigma(early.t)))
    x_0 = (early.x_t - sigma * early.noise) / alpha
    apart = (x_0[:, None] - SOURCE.states[None]).flatten(2).abs().amax(2)
    assert float(apart.min(1).values.max()) < 1e-3
    assert torch.equal(SOURCE.prompt[apart.argmin(1)], early.prompt)


def test_the_seed_and_the_shard_decide_a_banks_states(teacher, tmp_path, small_shards):
    window = {seed: Bank(tmp_path / str(seed), teacher, SOURCE, seed).window(0, 1) for seed in (0, 1)}
    assert not torch.equal(window[0].x_t, window[1].x_t)
    assert not torch.equal(window[0].x_t, Bank(tmp_path / "0", teacher, SOURCE).window(1, 1).x_t)


@pytest.mark.parametrize("other", ["teacher", "schedule", "data", "contents of the data", "seed"])
def test_a_bank_of_something_else_is_refused(teacher, tmp_path, small_shards, other):
    folder = tmp_path / "bank"
    Bank(folder, teacher, SOURCE).window(0, 1)
    model, source, seed = teacher, SOURCE, 0
    if other == "teacher":
        model = tiny(seed=1)
    if other == "schedule":  # the same weights, which mean other states
        model = tiny(beta_schedule="linear")
        model.network.load_state_dict(teacher.network.state_dict())
    if other == "contents of the data":
        source = replace(SOURCE, states=-SOURCE.states)
    if other == "data":
        source = replace(SOURCE, name="shapes")
    if other == "seed":
        seed = 1
    named = "teacher" if other == "schedule" else other
    with pytest.raises(InputError, match=f"was made with another {named} .*; name another --bank-folder") as refusal:
        Bank(folder, model, source, seed)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_bank_folder_with_other_files_is_refused_and_an_empty_one_is_not(teacher, tmp_path):
    Bank(tmp_path, teacher, SOURCE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        Bank(tmp_path / "full", teacher, SOURCE)


def test_fingerprints_are_of_weights_and_not_of_names(teacher):
    copy = tiny(seed=4)
    assert fingerprint(copy) != fingerprint(teacher)
    copy.network.load_state_dict(teacher.network.state_dict())
    copy.name = "another"
    assert fingerprint(copy) == fingerprint(teacher)
    with torch.no_grad():
        next(copy.network.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(copy) != fingerprint(teacher)


def test_the_window_slides_by_a_shard_for_every_reuse_of_one():
    first = [place(step, 64, 2 * SHARD, 4.0) for step in (0, 127, 128, 255, 256, 1280)]
    assert first == [(0, 2), (0, 2), (1, 2), (1, 2), (2, 2), (10, 2)]
    assert place(0, 64, 1, 4.0) == (0, 1) and place(0, 64, SHARD + 1, 4.0) == (0, 2)
    assert place(10, 32, SHARD, 0.1) == (1, 1)


def test_batches_follow_their_law_of_time_and_are_spread_evenly():
    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    even = draw(1000, 100, (1.0, 1.0), True, seeded())
    assert torch.equal(even // 10, torch.arange(100))  # one from every hundredth
    loose = draw(1000, 100_000, (1.0, 1.0), False, seeded())
    assert float(loose.float().mean()) == pytest.approx(499.5, abs=4) and int(loose.max()) == 999
    leaning = draw(1000, 100_000, (2.0, 1.0), True, seeded()).float() / 1000
    assert float(leaning.mean()) == pytest.approx(2 / 3, abs=2e-3)
    assert float((leaning < 0.5).float().mean()) == pytest.approx(0.25, abs=2e-3)


# feeding


def feed_of(teacher: UNet, **settings) -> Feed:
    config = replace(ONLINE, **settings)
    return Feed(teacher, SOURCE, config, objective_of(config), None)


def test_the_null_share_is_exact_in_every_batch_and_even_over_rows(teacher):
    feed = feed_of(teacher, **SPLIT, batch=40)
    marks = torch.stack([feed._null(40, step_generator(0, step)) for step in range(400)])
    assert set(marks.sum(1).tolist()) == {10}
    torch.testing.assert_close(marks.double().mean(0), torch.full((40,), 0.25).double(), atol=0.08, rtol=0)
    assert marks[:, :20].sum(1).tolist() == [5] * 400  # so early and late times have their share alike
    assert not feed_of(teacher)._null(8, step_generator(0, 0)).any()
    assert not feed_of(teacher, objective="conditional")._null(8, step_generator(0, 0)).any()


@pytest.mark.parametrize("objective", ["matched-dropout", "student-dropout"])
def test_rows_of_one_branch_ask_the_teacher_for_that_one(teacher, objective):
    rows, null, _ = feed_of(teacher, objective=objective, **OWN_SPLIT)(0, step_generator(0, 0))
    output = branches(teacher, rows.x_t, rows.t, teacher.encode(SOURCE.prompts)[rows.prompt])
    dropped = null if objective == "matched-dropout" else torch.zeros_like(null)
    wanted = torch.where(dropped[:, None, None, None], output.unconditional, output.conditional)
    torch.testing.assert_close(rows.conditional, wanted, atol=1e-5, rtol=1e-5)
    assert null.any() and not rows.gap.any()


def test_a_bank_and_the_teacher_itself_give_one_loss(teacher, banked):
    """The same rows, read from the cache or asked at once, in pairs and one by one."""
    for settings in ({}, SPLIT, {"objective": "composite"}, {"objective": "student-dropout", **OWN_SPLIT}):
        config = replace(banked, **settings)
        objective = objective_of(config)
        feed = Feed(teacher, SOURCE, config, objective, Bank(config.bank_folder, teacher, SOURCE))
        step = Step(
            student_of(teacher, config), feed, config, objective, weights_of.Curriculum("uniform", teacher.path)
        )
        rows, null, times = feed(0, step_generator(0, 0))
        asked = feed._ask(rows.x_t, rows.t, rows.prompt, rows.noise, null)
        losses = [float(step(some, null, times, step_generator(0, 1), Log())) for some in (rows, asked)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# resuming


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bank": 64, "reuse": 0.5},
        {"objective": "bk-sdm"},
        {"curriculum": "tirt", "curriculum_from": "learned", **SPLIT},
    ],
    ids=["online", "bank", "regressors", "learned weights"],
)
def test_an_interrupted_run_resumes_to_the_last_bit(teacher, tmp_path, monkeypatch, small_shards, settings):
    config = replace(ONLINE, steps=5, **settings)
    whole = taught(teacher, config, Run(tmp_path / "whole", "distill", config))[0]
    says, calls = Step.__call__, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 4:  # the preflight's, and two steps
            raise KeyboardInterrupt
        return says(self, *arguments)

    monkeypatch.setattr(Step, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        taught(teacher, config, Run(tmp_path / "cut", "distill", config))
    monkeypatch.setattr(Step, "__call__", says)
    run = Run(tmp_path / "cut", "distill", config)
    resumed, result = taught(teacher, config, run)
    assert result.steps == 5 and [row["step"] for row in run.history()] == list(range(5))
    assert same(weights(resumed), weights(whole))


def test_the_seed_decides_the_student(teacher):
    first, again, other = (weights(taught(teacher, replace(ONLINE, steps=2, seed=seed))[0]) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)


# other students


def test_a_student_that_takes_the_scale_answers_guided_in_one_forward(teacher, banked, tmp_path):
    config = replace(banked, **LEARN, objective="w-conditioned", guidance_scales=(1.0, 2.0, 4.0))
    fresh = student_of(teacher, config)
    student = taught(teacher, config)[0]
    student.save(tmp_path / "student")
    loaded = load(tmp_path / "student")
    x_t, t = student.noise(60, step_generator(0, 0)), torch.rand(60, generator=step_generator(0, 1))
    prompts = teacher.encode(SOURCE.prompts * 6)
    with torch.no_grad():
        for w in (1.0, 2.0, 4.0):
            truth = teacher.predict(x_t, t, prompts, guidance=w).value
            with student.count_nfe() as nfe:
                pred = student.predict(x_t, t, prompts, guidance=w).value
            assert nfe.total == 60
            assert torch.equal(loaded.predict(x_t, t, prompts, guidance=w).value, pred)
            far = (fresh.predict(x_t, t, prompts, guidance=w).value - truth).square().mean()
            assert float((pred - truth).square().mean()) < 0.5 * float(far)
        with pytest.raises(InputError, match="guidance=3 is no scale"):
            student.predict(x_t, t, prompts, guidance=3.0)


@pytest.mark.parametrize(("objective", "matched"), [("fitnets", 1), ("bk-sdm", 5)])
def test_features_are_matched_through_regressors_that_are_not_shipped(teacher, tmp_path, objective, matched):
    config = replace(ONLINE, objective=objective, steps=25, lr=4e-3)
    student = student_of(teacher, config)
    plain = set(student.network.state_dict())
    feed = Feed(teacher, SOURCE, config, objective_of(config), None)
    step = Step(student, feed, config, objective_of(config), weights_of.Curriculum("uniform", teacher.path))
    names = [name for name in step.parameters() if name.startswith("regressors.")]
    assert len(names) == 2 * matched
    run = Run(tmp_path / "run", "distill", config)
    taught(teacher, config, run, student)
    rows = run.history()
    early, late = (sum(row["feature error"] for row in some) for some in (rows[:4], rows[-4:]))
    assert late < 0.8 * early
    assert set(student.network.state_dict()) == plain
    student.save(tmp_path / "student")
    x_t, t = student.noise(3, step_generator(0, 0)), torch.full((3,), 0.4)
    prompts = student.encode(("3", "", "7"))
    with torch.no_grad():
        loaded = load(tmp_path / "student")
        assert torch.equal(loaded.predict(x_t, t, prompts).value, student.predict(x_t, t, prompts).value)


def test_regressors_train_along_with_the_student(teacher, monkeypatch):
    config = replace(ONLINE, objective="fitnets", steps=3)
    made = []

    class Watched(steps.Regressors):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append((self, {name: p.detach().clone() for name, p in self.named_parameters()}))

    monkeypatch.setattr(steps, "Regressors", Watched)
    taught(teacher, config)
    regressors, start = made[0]
    assert all(not torch.equal(p, start[name]) for name, p in regressors.named_parameters())


def test_features_are_matched_at_the_same_depth(teacher):
    deep = tiny(widths=(8, 8, 16)).network
    assert blocks(deep)["down_blocks"] == [f"down_blocks.{i}" for i in range(3)]
    found = dict(places(teacher.network, deep, middle_only=False))
    assert found["down_blocks.0"] == "down_blocks.0" and found["down_blocks.1"] == "down_blocks.2"
    assert places(teacher.network, deep, middle_only=True) == [("mid_block", "mid_block")]
    with pytest.raises(InputError, match="no kind of block in common"):
        places(teacher.network, torch.nn.Linear(2, 2), middle_only=False)


# curricula


@pytest.mark.parametrize(
    ("name", "source", "normalise"),
    [
        ("uniform", "fit", "times"), ("min-snr", "fit", "times"), ("min-snr-x0", "fit", "batch"),
        ("p2", "fit", "times"), ("edm2", "fit", "times"), ("tirt", "learned", "times"), ("tirt", "learned", "batch"),
        ("sigmoid", "learned", "times"), ("edm2", "learned", "times"),
    ],
)  # fmt: skip
def test_every_curriculum_trains(teacher, name, source, normalise):
    config = replace(ONLINE, steps=2, curriculum=name, curriculum_from=source, normalise=normalise)
    fresh = weights(student_of(teacher, config))
    student = taught(teacher, config)[0]
    assert not same(weights(student), fresh)
    assert all(bool(weight.isfinite().all()) for weight in student.network.state_dict().values())


def test_a_fitted_curriculum_follows_the_frozen_teachers_losses(teacher, monkeypatch):
    """The teacher's losses fall with noise, so tirt and edm2 weigh high noise more; nothing of it is counted."""
    asked = []
    found = asked_of.teacher_losses

    def once(*arguments):
        asked.append(found(*arguments) if not asked else asked[0])
        return asked[0]

    monkeypatch.setattr(asked_of, "teacher_losses", once)
    with teacher.count_nfe() as nfe:
        edm2, tirt = (curriculum_for(teacher, SOURCE, replace(ONLINE, curriculum=name)) for name in ("edm2", "tirt"))
    assert nfe.total == 0
    t, losses = asked[0]
    cells = [float(losses[(t > low) & (t <= low + 0.1)].mean()) for low in (0.2, 0.5, 0.8)]
    assert cells == sorted(cells, reverse=True)
    for low, loss in zip((200, 500, 800), cells, strict=True):
        assert float(edm2.numbers[low : low + 100].exp().mean()) == pytest.approx(loss, rel=0.3)
    assert float(tirt.numbers[50:150].mean()) < 0 < float(tirt.numbers[400:500].mean())
    assert not edm2.numbers.requires_grad and not tirt.numbers.requires_grad


def test_a_learned_curriculum_moves_and_a_fitted_one_stays(teacher, monkeypatch):
    kept = []
    found = steps.curriculum_for

    def watched(*arguments):
        kept.append(found(*arguments))
        return kept[-1]

    monkeypatch.setattr(steps, "curriculum_for", watched)
    for source in ("learned", "teacher"):
        monkeypatch.setattr(weights_of, "read", lambda *arguments: torch.zeros(1000))
        monkeypatch.setattr(asked_of, "pipeline_folder", lambda name: None)
        taught(teacher, replace(ONLINE, curriculum="tirt", curriculum_from=source, steps=5))
    assert bool(kept[0].numbers.detach().any()) and not bool(kept[1].numbers.detach().any())


def test_a_teachers_own_curriculum_is_read_and_wrong_ones_are_refused(teacher, tmp_path):
    folder = tmp_path / "teacher"
    teacher.save(folder)
    config = replace(ONLINE, curriculum="tirt", curriculum_from="teacher", teacher=str(folder), steps=2)
    with pytest.raises(InputError, match=r"has no curriculum.safetensors; use --curriculum-from fit"):
        curriculum_for(teacher, SOURCE, config)
    numbers = torch.linspace(-2, 2, 1000)
    weights_of.write(folder, numbers)
    assert torch.equal(curriculum_for(teacher, SOURCE, config).numbers.detach(), numbers)
    load(folder)  # the file beside the pipeline does not hinder loading it
    weights_of.write(folder, torch.zeros(40))
    with pytest.raises(InputError, match="has 40 times, its path has 1000; fit one instead"):
        curriculum_for(teacher, SOURCE, config)
    save_file({"mu": numbers}, folder / weights_of.FILE)
    with pytest.raises(InputError, match="has no 'lambda'"):
        curriculum_for(teacher, SOURCE, config)
    (folder / weights_of.FILE).write_bytes(b"not tensors")
    with pytest.raises(InputError, match="cannot be read"):
        curriculum_for(teacher, SOURCE, config)


# settings


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_sound_at_both_scales(name):
    for scale in ("laptop", "paper"):
        DistillConfig.preset_of(name, scale, {}).check()
    assert DistillConfig.preset_of(name, "paper", {}).steps == 234_000


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "dahs"}, "objective 'dahs' is unknown; did you mean 'dash'?"),
        ({"curriculum": "min-srn"}, "curriculum 'min-srn' is unknown; did you mean 'min-snr'?"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"anchor": -0.1}, "anchor=-0.1 must be at least 0"),
        ({"gap": float("nan")}, "gap=nan should be a finite number"),
        ({"ema": 1.0}, "ema=1.0 must be below 1"),
        ({"shrink": 1.0}, "shrink=1.0 must be above 1"),
        ({"null_share": 0.0}, "null_share=0.0 must be above 0"),
        ({"times": (0.0, 1.0)}, "times=0.0 must be above 0"),
        ({"composite_scales": ()}, "no guidance scale given"),
        ({"evaluate": 1}, "evaluate=1 is too few"),
        ({"imitation": 0, "unconditional": 0, "anchor": 0}, "every weight of the objective is 0"),
        ({"data": "nowhere"}, "data 'nowhere' is no folder"),
        ({"student": "nowhere.json"}, "student config 'nowhere.json' cannot be read"),
        ({"objective": "gap", "layout": "split"}, "objective 'gap' needs both branches at each state"),
        ({"objective": "composite", "layout": "split"}, "objective 'composite' needs both branches"),
        ({"objective": "dash", "gap": 1.0, "layout": "split"}, "objective 'dash' needs both branches"),
        ({"objective": "student-dropout"}, "objective 'student-dropout' drops labels row by row; use --layout split"),
        ({"objective": "scratch"}, "objective 'scratch' drops labels row by row"),
        ({"objective": "fitnets", "bank": 64}, "objective 'fitnets' looks inside the teacher, which no cache holds"),
        ({"objective": "bk-sdm", "gap": 1.0}, "objective 'bk-sdm' has one branch to look into"),
        ({"objective": "fitnets", "unconditional": 1.0}, "objective 'fitnets' has one branch to look into"),
        ({"curriculum_from": "teacher"}, "curriculum 'uniform' is not stored with teachers"),
        ({"curriculum": "edm2", "curriculum_from": "learned", "normalise": "batch"}, "normalise='batch' would undo"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, says):
    with pytest.raises(InputError, match=says) as refusal:
        replace(ONLINE, **settings).check()
    assert "\n" not in str(refusal.value)


def test_pairs_of_networks_that_do_not_go_together_are_refused(teacher):
    student = shrink(teacher, 3.0)
    refusals = {
        "needs a null class, which tiny lacks": (tiny(class_rows=10), student, None),
        r"the student knows the classes \('0', .*, the teacher \('0'": (
            teacher, tiny((8, 8), names=tuple("0123456798")), None,
        ),
        "the student has 110,425 parameters, the teacher 41,961; make the student smaller": (student, teacher, None),
        "the student predicts v_prediction, the teacher eps; use one kind": (
            teacher, tiny((8, 8), prediction_type="v_prediction"), None,
        ),
        r"the student's states are \(1, 16, 16\), the teacher's \(1, 8, 8\)": (teacher, tiny((8, 8), size=16), None),
        r"takes the guidance scales None, the objective teaches \(1.0, 2.0\)": (teacher, student, (1.0, 2.0)),
        r"takes the guidance scales \(1.0, 4.0\), the objective teaches None": (
            teacher, shrink(teacher, 3.0, guidance_scales=(1.0, 4.0)), None,
        ),
    }  # fmt: skip
    for says, pair in refusals.items():
        with pytest.raises(InputError, match=says) as refusal:
            check_pair(*pair)
        assert "\n" not in str(refusal.value)
    check_pair(teacher, student, None)


def test_a_teacher_whose_branches_are_one_is_refused_and_nothing_is_written(tmp_path):
    flat = tiny()
    with torch.no_grad():
        flat.network.class_embedding.weight.zero_()
    config = replace(ONLINE, bank=64)
    run = Run(tmp_path / "run", "distill", config)
    student = student_of(flat, config)
    for _ in range(2):  # the second time, too: a refusal leaves the student free
        with pytest.raises(InputError, match="the teacher's branches are one: train it with its labels dropped"):
            taught(flat, config, run, student)
    assert not run.folder.exists()


def test_seeds_share_a_bank_and_other_data_is_refused_before_the_run_begins(teacher, tmp_path, small_shards):
    config = replace(ONLINE, bank=64, reuse=1e6, bank_folder=tmp_path / "bank", steps=2)
    first = taught(teacher, config)[0]
    with teacher.count_nfe() as nfe:
        other = taught(teacher, replace(config, seed=1))[0]
    assert nfe.total == 0 and not same(weights(first), weights(other))
    run = Run(tmp_path / "run", "distill", config)
    with pytest.raises(InputError, match=r"another data \(digits, here shapes\)"):
        taught(teacher, config, run, source=replace(SOURCE, name="shapes"))
    assert not run.folder.exists()
    assert json.loads((tmp_path / "bank" / "bank.json").read_text())["data"] == "digits"


def test_without_a_folder_a_bank_is_kept_in_memory(teacher, tmp_path, small_shards):
    config = replace(ONLINE, bank=100, reuse=0.5)
    there = taught(teacher, replace(config, bank_folder=tmp_path / "bank"))[0]
    with teacher.count_nfe() as nfe:
        assert same(weights(taught(teacher, config)[0]), weights(there))
    assert nfe.total == 2 * 64 * 4


def test_data_needs_an_image():
    with pytest.raises(InputError, match="there is no data to distil on"):
        replace(SOURCE, states=SOURCE.states[:0], prompt=SOURCE.prompt[:0])
