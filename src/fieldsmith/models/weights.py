"""How a model's network trains, as a LoRA or in full, over a frozen reference; and what is saved of it."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models import export
from fieldsmith.run import make_ordinary

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of a LoRA in its folder


@dataclass(frozen=True)
class LoraSpec:
    """A low-rank adapter on a named subset of a family's layers."""

    subset: str = "attention"  # a name from the family's SUBSETS
    rank: int = 16
    alpha: float | None = None  # scale = alpha / rank; None is alpha = rank
    dropout: float = 0.0
    seed: int = 0  # of the adapter's random half; the other half starts at zero


class Trainable:
    """A frozen network, on which training can be attached and taken off again."""

    family: ClassVar[str]
    SUBSETS: ClassVar[dict[str, str]]  # name -> regular expression over the network's module names
    DEFAULT_SUBSET: ClassVar[str] = "attention"  # what trains where a config names no subset
    ERASE_SUBSET: ClassVar[str] = "attention"  # and what erase trains then
    UNREAD: ClassVar[str] = ""  # regular expression of names whose results nothing reads; LAST: the last block's index
    ORIGINAL_NAMES: ClassVar[export.Rules] = ()  # diffusers' layers under the names of the model's first checkpoint
    PART: ClassVar[str] = "transformer"  # the network's name in its pipeline, and so in the keys of its LoRA files
    pipeline: Any
    network: Any  # an nn.Module with diffusers' config, whose fields no checker knows

    def __init__(self, pipeline: Any, network: nn.Module, name: str):
        self.pipeline, self.network, self.name = pipeline, network, name
        self.spec: LoraSpec | None = None
        self.adapters: tuple[str, ...] = ()  # which are part of the frozen weights
        self._off = False
        self._started = False  # whether the adapter was there before training, so that the reference has it too
        self._base: dict[str, nn.Parameter] = {}  # the originals of unfrozen weights
        self._parts: list[tuple[DTensor, Tensor]] = []  # weights that FSDP holds in parts, the originals' part here
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)

    def _modules(self, subset: str) -> list[str]:
        if subset not in self.SUBSETS:
            known = ", ".join(self.SUBSETS)
            raise InputError(
                f"layer subset '{subset}' is unknown for family {self.family}; "
                f"known: {known} (and 'all' for training full weights)"
            )
        pattern = re.compile(self.SUBSETS[subset])
        linear = [n for n, m in self.network.named_modules() if isinstance(m, nn.Linear) and not self._unread(n)]
        matching = [n for n in linear if pattern.fullmatch(n)]
        if not matching:
            raise InputError(f"layer subset '{subset}' matches no layer of {self.name}")
        return matching

    def _unread(self, name: str) -> bool:
        """Whether what a layer or parameter of that name makes is read by nothing, so that it could never learn."""
        last = len(getattr(self.network, "transformer_blocks", ())) - 1
        return re.fullmatch(self.UNREAD.replace("LAST", str(last)), name) is not None

    def adapt(self, spec: LoraSpec) -> None:
        """Inject a LoRA that starts as zero; only its weights train from here on.

        Raises InputError at an unknown subset, ValueError where training is under way already.
        """
        self._refuse_second_training()
        config = LoraConfig(
            r=spec.rank, lora_alpha=spec.rank if spec.alpha is None else spec.alpha,  # type: ignore[arg-type]
            lora_dropout=spec.dropout, target_modules=self._modules(spec.subset),
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)  # peft draws from the global generator
            inject_adapter_in_model(config, self.network)
        self._adapter_attached(spec)

    def attach(self, adapter: export.Adapter, start: bool = False) -> None:
        """Attach these low-rank changes as an adapter of their own ranks and layers; only its weights train.

        With `start` training goes on from them: the reference has them as they are now.
        Raises ValueError where training is under way already.
        """
        self._refuse_second_training()
        metadata = export.peft_settings(adapter)
        config = LoraConfig(**{**metadata, "target_modules": "|".join(map(re.escape, adapter))})
        with torch.random.fork_rng():  # weights are drawn before they are overwritten
            inject_adapter_in_model(config, self.network)
        self._adapter_attached(LoraSpec("loaded", config.r, config.lora_alpha, 0.0))
        with torch.no_grad():
            for name, layer in self._tuners().items():
                layer.lora_A["default"].weight.copy_(adapter[name].down)
                layer.lora_B["default"].weight.copy_(adapter[name].up)
        if start:
            self._started = True
            self._base = {
                name: nn.Parameter(parameter.detach().clone(), requires_grad=False)
                for name, parameter in self.trainable().items()
            }

    def _adapter_attached(self, spec: LoraSpec) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                # peft gives an adapter its layer's type, such as bf16
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.network.eval()
        self.spec = spec

    @property
    def trains(self) -> bool:
        """Whether an adapter or unfrozen weights are attached."""
        return bool(self.spec or self._base or self._parts)

    def _refuse_second_training(self) -> None:
        if self.trains:
            raise ValueError(f"{self.name} is being trained already; call remove_training() or load a fresh model")

    def raise_precision(self) -> None:
        """Weights of at least 32 bits, for training in full."""
        if next(self.network.parameters()).dtype.itemsize < 4:
            self.network.float()

    def unfreeze(self, subset: str) -> None:
        """Train the full weights of a subset, or all that are read with 'all'; the originals stay for `reference`.

        Raises InputError at an unknown subset, ValueError where training is under way already.
        """
        self._refuse_second_training()
        if subset == "all":
            names = [name for name, _ in self.network.named_parameters() if not self._unread(name)]
        else:
            names = [
                f"{name}.{key}"
                for name in self._modules(subset)
                for key, _ in self.network.get_submodule(name).named_parameters(recurse=False)
            ]
        weights = {n: self.network.get_parameter(n) for n in names}
        if any(isinstance(p, DTensor) for p in weights.values()):
            self._parts = [(p, p.to_local().clone()) for p in weights.values() if isinstance(p, DTensor)]
            for p in weights.values():
                p.requires_grad_(True)
            return
        self._base = self._swap({n: nn.Parameter(p.detach().clone()) for n, p in weights.items()})

    def _swap(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Put parameters into the network by name; returns those that they displace.

        Whole objects move, never their data: a graph keeps the weights that it was built with.
        """
        displaced = {name: self.network.get_parameter(name) for name in parameters}
        for name, parameter in parameters.items():
            owner, _, key = name.rpartition(".")
            setattr(self.network.get_submodule(owner), key, parameter)
        return displaced

    def remove_training(self) -> None:
        """Back to the model as loaded, to the last bit: adapter taken out, original weights put back."""
        for name, layer in self._tuners().items():
            self.network.set_submodule(name, layer.get_base_layer())
        self.network.__dict__.pop("peft_config", None)
        self.network.__dict__.pop("_hf_peft_config_loaded", None)  # diffusers' own mark of an adapter
        if not self._started:  # else they are an adapter's, which is gone
            self._swap(self._base)
        for weight, part in self._parts:
            weight.to_local().detach().copy_(part)
        self.spec, self._base, self._parts, self._started = None, {}, [], False
        self.network.requires_grad_(False)

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that training moves, by name. Ask outside `reference`, where unfrozen weights are away."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def dropout(self, on: bool) -> None:
        """Switch the adapter's dropout; the network itself always stays in eval mode."""
        for name, module in self.network.named_modules():
            if "lora_dropout" in name:
                module.train(on)

    def _tuners(self) -> dict[str, Any]:
        return {name: module for name, module in self.network.named_modules() if isinstance(module, BaseTunerLayer)}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen model, inside `with`: adapter off (or as training found it), or the original weights in place;
        re-entrant.

        Graphs built before, inside and after each keep their own weights, so a backward may run anywhere.
        """
        with self._turned(off=True):
            yield

    @contextlib.contextmanager
    def _turned(self, off: bool) -> Iterator[None]:
        """What was trained off or on, inside `with`, whatever it is outside; for a forward that is run again too."""
        if self._off == off:
            yield
            return
        layers = list(self._tuners().values())

        def turn(off: bool) -> None:
            self._base = self._swap(self._base)  # which holds the trained weights while the originals are in place
            for weight, part in self._parts:  # FSDP owns the objects, so numbers move: a backward runs outside
                present = weight.to_local().detach()
                aside = present.clone()
                present.copy_(part)
                part.copy_(aside)
            # peft's enable_adapters would switch requires_grad too, and so lose the gradients of a backward in here
            for layer in layers:
                layer._disable_adapters = off and not self._started
            self._off = off

        turn(off)
        try:
            yield
        finally:
            turn(not off)

    def scale_adapter(self, scale: float) -> None:
        """Multiply the adapter's effect: 0 is the base model, 1 what was trained."""
        for layer in self._tuners().values():
            layer.set_scale("default", scale)

    # what the user ships

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's weights under peft's names, without the adapter's own name in them."""
        state = get_peft_model_state_dict(self.network)
        return {k: processes.full(v.detach()).contiguous() for k, v in state.items()}

    def adapter(self) -> export.Adapter:
        """The adapter at its present scale, as `export` takes it. Raises InputError where there is none."""
        if not self.spec:
            raise InputError(f"{self.name} carries no adapter; load one, or train with LoRA")
        scales = {name: float(layer.scaling["default"]) for name, layer in self._tuners().items()}
        return export.adapter_from(self.adapter_state(), scales)

    def save(self, folder: str | pathlib.Path, merged: bool = False) -> None:
        """Write what diffusers loads as it is; the live model stays as it was.

        An adapter on a family that diffusers loads LoRA for: the LoRA alone. Everything else, and anything with
        `merged`: the whole pipeline, with the adapter's effect at its present scale inside the weights. Of several
        processes all call this and one writes.
        """
        adapter = self.adapter() if self.spec else None
        if adapter and not merged and hasattr(self.pipeline, "save_lora_weights"):
            if processes.is_main():
                export.write_diffusers(adapter, self.PART, pathlib.Path(folder) / LORA_FILE)
        else:
            weights = self._whole_state()
            if processes.is_main():
                with self._saves(weights):
                    self._save_pipeline(pathlib.Path(folder))
                for file in pathlib.Path(folder).rglob("*.safetensors"):
                    make_ordinary(file)
        processes.wait()

    @contextlib.contextmanager
    def _saves(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Inside, diffusers saves these in place of the network's own, and sees no adapter."""
        own = self.network.__dict__
        aside = {k: own.pop(k) for k in ("peft_config", "_hf_peft_config_loaded") if k in own}
        own["state_dict"] = lambda *_, **__: weights
        try:
            yield
        finally:
            del own["state_dict"]
            own.update(aside)

    def _whole_state(self) -> dict[str, Tensor]:
        """Every weight under diffusers' name, with the adapter's effect at its present scale inside.

        What FSDP holds in parts is put together one weight at a time, by all processes, and kept by the one that
        writes.
        """
        tuners, state = self._tuners(), {}
        for name, value in self.network.state_dict().items():
            layer, base, key = name.partition(".base_layer.")
            if ".lora_" in name:
                continue
            whole = processes.full(value)
            if base and key == "weight":
                with torch.no_grad():
                    whole = whole + tuners[layer].get_delta_weight("default").to(whole)
            if processes.is_main():
                state[f"{layer}.{key}" if base else name] = whole.cpu() if processes.sharded() else whole
        return state

    def _save_pipeline(self, folder: pathlib.Path) -> None:
        self.pipeline.save_pretrained(folder)
