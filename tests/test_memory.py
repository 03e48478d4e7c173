"""What makes a run fit: bf16 under exact adapters, activations computed again, parts that wait, moments of 8 bits."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from experiments.tiny import flux_pipeline
from fieldsmith import optimizers, preflight, verb
from fieldsmith.cli import main
from fieldsmith.commands import verbs
from fieldsmith.errors import InputError
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.models import load
from fieldsmith.models.core import LoraSpec
from fieldsmith.models.flux import Flux
from fieldsmith.models.memory import checkpoint_activations, compile_blocks, offload
from fieldsmith.rewards.reward import Reward, weighted
from fieldsmith.training import Optimisation, fit

PAIR = ["--targets", "red circle", "--anchors", "blue circle"]
SHORT = [*PAIR, "--preset", "tiny", "--steps", "4", "--window", "1", "2", "--batch", "1", "--budget", "4", "--subset",
         "attention", "--evaluate", "0"]  # fmt: skip
TRAIN = {"lora": lambda m: m.adapt(LoraSpec(rank=2, dropout=0.5)), "full": lambda m: m.unfreeze("attention")}


def asked(model, n=3):
    """States, times and a condition of a model."""
    name = "red circle" if model.family == "flux" else "cat"
    t = torch.linspace(0.3, 0.9, n)
    return model.noise(n, torch.Generator().manual_seed(0)), t, model.encode([name])


def nudge(model):
    """Weights that differ from where training starts, so that the reference differs from the student."""
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def gradients(model, loss):
    grads = torch.autograd.grad(loss, list(model.trainable().values()))
    return dict(zip(model.trainable(), grads, strict=True))


def saved_bytes(model, x, t, condition):
    """The loss of a forward, and the bytes that its graph keeps beside parameters."""
    seen = {}
    own = {p.untyped_storage()._cdata for p in model.network.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage.nbytes(), tensor)  # the tensor keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.predict(x, t, condition).value.square().mean()
    return loss, sum(size for size, _ in seen.values())


# what the preflight reckons with


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_preflight_bounds_what_a_graph_keeps(checkpointing, flux_folder):
    model = load(flux_folder)
    model.unfreeze("all")
    if checkpointing:
        checkpoint_activations(model)
    x, t, condition = asked(model, 8)
    _, kept = saved_bytes(model, x, t, condition)
    reckoned = preflight.memory(model, 8).value * 1e9 - 12 * sum(p.numel() for p in model.trainable().values())
    assert kept < reckoned < 6 * kept


def test_a_full_flux_fits_with_checkpointing_and_without_it_not():
    """It was refused on any GPU: every layer was taken to be as wide as the widest, and the weights counted twice."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
    assert preflight.kept_by_token(network) * 4096 * 2 > 40e9  # of 1,024 pixels, in bf16
    network.enable_gradient_checkpointing()
    assert preflight.kept_by_token(network) * 4096 * 2 < 3e9


# activations computed again


@pytest.mark.parametrize("kind", TRAIN)
@pytest.mark.parametrize("folder", ["flux_folder", "unet_folder"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(folder, kind, request):
    folder = request.getfixturevalue(folder)
    plain, frugal = load(folder), load(folder)
    checkpoint_activations(frugal)
    found = []
    for model in (plain, frugal):
        TRAIN[kind](model)
        nudge(model)
        model.dropout(True)
        torch.manual_seed(1)  # dropout draws from the global generator, and draws the same again
        loss, size = saved_bytes(model, *asked(model))
        found.append((loss, gradients(model, loss), size))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in found[0][1].values())
    assert found[1][2] < 0.7 * found[0][2]


@pytest.mark.parametrize("kind", TRAIN)
def test_a_block_is_computed_again_as_it_was_wherever_the_backward_runs(flux_folder, kind):
    found = []
    for again in (False, True):
        model = load(flux_folder)
        TRAIN[kind](model)
        nudge(model)
        if again:
            checkpoint_activations(model)
        x, t, condition = asked(model)
        x.requires_grad_(True)
        student = model.predict(x, t, condition).value.square().sum()
        with model.reference():
            base = model.predict(x, t, condition).value.square().sum()
            (inside,) = torch.autograd.grad(student, x, retain_graph=True)
        (outside,) = torch.autograd.grad(base, x)
        found.append((inside, outside))
    assert not torch.allclose(found[0][0], found[0][1], rtol=1e-3)  # student and reference differ
    for plain, frugal in zip(*found, strict=True):
        torch.testing.assert_close(frugal, plain)


# weights in bf16


def test_an_adapter_on_bf16_weights_is_float32_and_near_the_exact_one(flux_folder):
    exact, half = load(flux_folder), load(flux_folder, dtype=torch.bfloat16)
    for model in (exact, half):
        model.adapt(LoraSpec(rank=2))
        nudge(model)
    assert {p.dtype for p in half.trainable().values()} == {torch.float32}
    frozen = {p.dtype for p in half.network.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    x, t, _ = asked(exact)
    pred = [model.predict(x, t, model.encode(["red circle"])).velocity for model in (exact, half)]
    assert pred[1].dtype == torch.float32
    assert (pred[1] - pred[0]).norm() < 0.03 * pred[0].norm()
    losses = [v.square().mean() for v in pred]
    grads = [gradients(model, loss) for model, loss in zip((exact, half), losses, strict=True)]
    flat = [torch.cat([g.flatten() for g in some.values()]) for some in grads]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_a_bf16_run_ships_a_float32_adapter_and_can_be_repeated(flux_folder, tmp_path):
    words = ["erase", "--model", str(flux_folder), *SHORT, "--dtype", "bf16", "--checkpointing"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    weights = load_file(tmp_path / "a" / "adapter" / "pytorch_lora_weights.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32} and any(w.abs().max() > 0 for w in weights.values())
    written = (tmp_path / "a" / "config.toml").read_text()
    assert 'dtype = "bf16"' in written and "checkpointing = true" in written and "offload = false" in written
    assert main(["erase", "--config", str(tmp_path / "a/config.toml"), "--out", str(tmp_path / "b")]) == 0
    again = load_file(tmp_path / "b" / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


# parts that wait


def test_offload_on_a_cpu_is_nothing_and_says_so(flux_folder, tmp_path, capsys):
    assert offload(load(flux_folder)) == []
    words = ["erase", "--model", str(flux_folder), *SHORT, "--offload", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert "offload: nothing to do" in capsys.readouterr().err


class Elsewhere:
    """A model on an accelerator, as far as `offload` looks: parts note where they are sent instead of going."""

    def __init__(self):
        self.went: list[tuple[str, str]] = []
        self.network = nn.Linear(2, 2)
        self.device = torch.device("meta")
        self.parts = {"text_encoder": nn.Linear(2, 2), "vae": nn.Linear(2, 2)}
        for name, part in self.parts.items():
            part.to("meta")
            part.to = lambda device, name=name, part=part: self.move(name, part, device)
        components = {**self.parts, "transformer": self.network, "tokenizer": object()}
        self.pipeline = types.SimpleNamespace(components=components)

    def move(self, name, part, device):
        self.went.append((name, str(device)))
        for key in ("weight", "bias"):
            setattr(part, key, nn.Parameter(torch.zeros(getattr(part, key).shape, device=device)))
        return part


def test_parts_wait_on_the_cpu_and_come_when_they_are_called():
    model = Elsewhere()
    assert offload(model) == ["text_encoder", "vae"]
    assert all(p.device.type == "cpu" for part in model.parts.values() for p in part.parameters())
    model.went.clear()
    with torch.no_grad():
        model.network(torch.zeros(1, 2))
        assert model.went == []  # all wait already
        model.parts["text_encoder"](torch.zeros(1, 2, device="meta"))
        assert model.went == [("text_encoder", "meta")]
        model.network(torch.zeros(1, 2))
    assert model.went == [("text_encoder", "meta"), ("text_encoder", "cpu")]


def test_a_rewards_networks_wait_between_two_judgements():
    model, judge = Elsewhere(), nn.Linear(2, 2)
    reward = weighted([(1.0, Reward("a", True, judge, (judge,)))])
    networks = AlignInputs(reward, {"b": Reward("b", True, judge)}).networks
    assert networks == [judge] and offload(model, networks) == ["text_encoder", "vae"]
    judge.to("meta")  # as a reward takes it to the images' device
    judge.to = lambda device: model.move("judge", judge, device)
    model.parts["judge"] = judge
    model.went.clear()
    with torch.no_grad():
        model.network(torch.zeros(1, 2))
        model.network(torch.zeros(1, 2))
    assert model.went == [("judge", "cpu")]


# moments of 8 bits


@pytest.fixture
def bitsandbytes(monkeypatch):
    """A stand-in for the package, with what is awkward about its optimizer: a plain step count and shared code maps."""

    class AdamW8bit(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, lr=lr)
            self.shared = torch.arange(4.0)

        def init_state(self, group, p, group_index, place):
            self.state[p].update(step=0, state1=torch.zeros_like(p), qmap1=self.shared, qmap2=self.shared)

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for place, p in enumerate(group["params"]):
                    if not self.state[p]:
                        self.init_state(group, p, 0, place)
                    state = self.state[p]
                    assert type(state["step"]) is int
                    state["step"] += 1
                    state["state1"].mul_(0.9).add_(p.grad)
                    p.sub_(group["lr"] * state["state1"] / state["step"])

    module = types.ModuleType("bitsandbytes")
    module.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    module.__spec__ = types.SimpleNamespace(name="bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    return AdamW8bit


def test_an_8_bit_run_resumes_exactly(bitsandbytes, tmp_path):
    from fieldsmith.run import Run

    def train(folder, steps, limit=None):
        p, q = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
        run = Run(folder, "test", {"a": 1})
        run.begin()
        losses = lambda step, generator, log: iter([(p.square().sum() + q.square().sum())])  # noqa: E731
        stop = (lambda done, log: "limit" if done == limit else None) if limit else None
        fit({"p": p, "q": q}, losses, Optimisation(steps, 0.05, checkpoint_every=2, optimizer="adamw8bit"), run, stop)
        return p.detach().clone(), q.detach().clone()

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, train(tmp_path / "parts", 6), strict=True))


def test_the_optimizer_is_the_one_named(bitsandbytes):
    p = [torch.zeros(2, requires_grad=True)]
    assert isinstance(optimizers.adamw(p, 0.1, 0.0, "adamw8bit"), bitsandbytes)
    assert type(optimizers.adamw(p, 0.1, 0.0)) is torch.optim.AdamW


# the flags


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optimizer", "adamw8bit"], "'adamw8bit' needs bitsandbytes; pip install fieldsmith[8bit]"),
        (["--dtype", "bf16", "--full"], "this run trains full ones, which need float32"),
        (["--dtype", "fp8"], "'fp8'"),
        (["--dtpye", "bf16"], "did you mean '--dtype'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flux_folder, tmp_path, capsys, words, says):
    out = tmp_path / "run"
    assert main(["erase", "--model", str(flux_folder), *SHORT, *words, "--out", str(out)]) == 2
    assert says in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "plain", "--dtype", "bf16"], "this run trains full ones"),
        (["--method", "jacobian-floor", "--checkpointing"], "asks for the Jacobian, whose graph cannot be run again"),
    ],
)
def test_methods_that_cannot_be_made_smaller_say_so(tmp_path, capsys, words, says):
    assert main(["sharpen", *words, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_memory_stands_beside_the_settings_of_a_verb():
    config = verbs.settings("edit", ["--checkpointing", "--lr", "0.5"])
    assert type(config) is EditConfig and config.lr == 0.5 and config.checkpointing and config.dtype == "float32"


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match="'adam' is unknown; known: adamw"):
        optimizers.check("adam")


def test_a_mixed_network_saves_what_it_loads(tmp_path):
    """A merged bf16 model is bf16 all through."""
    pipeline = flux_pipeline(["a"], layers=1, single_layers=1, heads=1)
    pipeline.save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", dtype=torch.bfloat16)
    model.adapt(LoraSpec(rank=2))
    nudge(model)
    model.save(tmp_path / "merged", merged=True)
    assert json.loads((tmp_path / "merged" / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    weights = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


# how the network computes, and who is told of it


def losses(folder, flux_folder, *words):
    """Of a short run with these words: its losses, and the adapter's weights."""
    assert main(["erase", "--model", str(flux_folder), *SHORT, "--budget", "6", *words, "--out", str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def test_a_network_that_computes_in_bf16_learns_nearly_the_same(flux_folder, tmp_path, monkeypatch):
    exact, _ = losses(tmp_path / "exact", flux_folder)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as the launcher says it
    half, weights = losses(tmp_path / "half", flux_folder)
    assert len(exact) == 3 and half == pytest.approx(exact, rel=0.05) and half != pytest.approx(exact, rel=1e-6)
    assert {w.dtype for w in weights.values()} == {torch.float32} and any(w.abs().max() > 0 for w in weights.values())


def test_compiled_blocks_give_the_same_once_for_all_sizes_of_batch():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Flux(flux_pipeline(["red", "circle"], layers=0, single_layers=2, heads=1), "tiny")
    model.adapt(LoraSpec(rank=2))
    nudge(model)
    plain = [model.predict(*asked(model, n)).value for n in (2, 3)]
    compile_blocks(model, backend="eager")  # all but the kernels, which a CPU makes for minutes
    for n, before in zip((2, 3), plain, strict=True):
        torch.testing.assert_close(model.predict(*asked(model, n)).value, before)
    # one kind of block, of any batch, whose input has a gradient or, as the first one, none
    assert torch._dynamo.utils.counters["frames"] == {"total": 2, "ok": 2}


def test_compile_reaches_what_trains(flux_folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(verb, "compile_blocks", lambda model: compiled.append(model.trains))
    losses(tmp_path / "run", flux_folder, "--compile")
    assert compiled == [True]


def test_a_tracker_gets_every_step_beside_the_log(flux_folder, tmp_path):
    wanted, _ = losses(tmp_path / "run", flux_folder, "--log-with", "tensorboard")
    (events,) = (tmp_path / "run" / "fieldsmith-erase").glob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    assert [event.step for event in found.Scalars("loss")] == [0, 1, 2]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(wanted, rel=1e-6)


def test_a_tracker_that_is_not_there_is_refused(flux_folder, tmp_path, capsys):
    words = ["erase", "--model", str(flux_folder), *SHORT, "--log-with", "wandb", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert "log_with 'wandb' is not installed; pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
