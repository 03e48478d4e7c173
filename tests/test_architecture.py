"""Who may import whom, what stays light, and how long a file may be (design, section 3)."""

from __future__ import annotations

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

import fieldsmith

ROOT = pathlib.Path(fieldsmith.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: pathlib.Path) -> set[str]:
    """Every module that a file imports, anywhere in it; 'from a import b' counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


IMPORTS = {name_of(file): imports(file) for file in FILES}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offenders(of: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    """Imports by the modules of one package from forbidden ones."""
    assert any(within(module, of) for module in IMPORTS), of
    return [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        if within(module, of)
        for name in sorted(names)
        if any(within(name, package) for package in forbidden) and not any(within(name, free) for free in allowed)
    ]


def ours(*names: str) -> tuple[str, ...]:
    return tuple(f"fieldsmith.{name}" for name in names)


def outside(*names: str) -> tuple[str, ...]:
    """Every room of fieldsmith but these."""
    rooms = {module.split(".")[1] for module in IMPORTS if "." in module}
    return ours(*sorted(rooms - set(names)))


# docs/architecture.md has the same list in words; imports point up it only, so that there is no circle
ORDER = (
    "errors", "processes", "functions", "read", "concepts", "pictures", "data", "servers", "paths", "samplers",
    "config", "disk", "owner", "origins", "run", "sessions", "preferences", "optimizers", "checkpoints",
    "interrupts", "training", "models", "preflight", "worlds", "rewards", "report", "push", "result",
    "previews", "trackers", "shipping", "verb", "measuring", "measure", "methods", "diagnoses", "sampling",
    "zoo", "calls", "api", "planning", "studio", "commands", "cli",
)  # fmt: skip


@pytest.mark.parametrize(
    ("room", "may_use"),
    [(room, ORDER[: ORDER.index(room)]) for room in ORDER],
)
def test_a_room_imports_only_rooms_above_it_in_the_list(room, may_use):
    assert not offenders(f"fieldsmith.{room}", outside(room, *may_use))


def test_no_files_import_each_other_in_a_circle():
    """Not for types alone either; a package's __init__ may be what its own files stand in."""
    files = {m for m in IMPORTS if not (ROOT.parent / pathlib.Path(*m.split("."))).is_dir()}
    order = list(graphlib.TopologicalSorter({m: IMPORTS[m] & files for m in files}).static_order())  # or CycleError
    assert set(order) == files


def test_every_room_is_in_the_list():
    rooms = {module.split(".")[1] for module in IMPORTS if "." in module}
    assert rooms == {*ORDER, "__main__"}


def test_methods_import_no_world():
    assert not offenders("fieldsmith.methods", ours("worlds"))


def test_the_package_does_not_know_the_experiments():
    assert not offenders("fieldsmith", ("experiments",))


def test_methods_do_not_import_each_other():
    methods = {f"fieldsmith.methods.{file.stem}" for file in (ROOT / "methods").iterdir() if file.stem[0] not in "._"}
    for method in methods:
        # policy is what align and edit share
        assert not offenders(method, tuple(methods - {method, "fieldsmith.methods.policy"}))


# reward models are no fields: their loaders live with the rewards
BEYOND = ("fieldsmith.models", "fieldsmith.rewards.pretrained")


@pytest.mark.parametrize("module", sorted(m for m in IMPORTS if not any(within(m, room) for room in BEYOND)))
def test_only_models_import_diffusers_transformers_and_peft(module):
    heavy = ("diffusers", "transformers", "peft")
    assert not [name for name in IMPORTS[module] if any(within(name, library) for library in heavy)]


def test_losses_know_no_model_optimiser_or_accelerator():
    for method in ("erase", "policy", "align", "distill", "sharpen"):
        forbidden, shared = ("fieldsmith", "accelerate", "torch.optim"), ("fieldsmith.methods.policy.losses",)
        assert not offenders(f"fieldsmith.methods.{method}.losses", forbidden, shared)


def test_what_help_needs_does_not_import_torch():
    configs = [f".methods.{verb}.config" for verb in ("align", "distill", "edit", "erase", "sharpen")]
    commands = [
        f".commands.{name}"
        for name in (
            "verbs",
            "diagnose",
            "plan",
            "sample",
            "export",
            "push",
            "families",
            "demo",
            "measure",
            "completion",
            "studio",
        )
    ]
    modules = ("", ".cli", ".rewards", ".models.families", ".diagnoses.config", *configs, *commands)
    lines = [f"import fieldsmith{module}" for module in modules]
    script = "\n".join([*lines, "import sys", "print({'torch', 'diffusers', 'numpy'} & set(sys.modules) or 'light')"])
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert output.stdout.strip() == "light", output.stdout + output.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_finished_and_of_readable_length(file):
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert len(text.splitlines()) <= 420


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_says_first_what_it_is_for(file):
    assert file.name == "__main__.py" or ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_every_package_is_importable_as_one():
    folders = {file.parent for file in FILES if file.parent != ROOT}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
