"""Every Python block of README.md and docs/ runs as it stands, and every command that needs no network.

The zoo's names stand for tiny pipelines of the same families and vocabularies, so that a block takes seconds. Commands
of blocks marked `norun` (large models, servers) are parsed to the last flag, but not run.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import sys
import types

import pytest

from experiments.tiny import flux_pipeline
from experiments.tiny_text import sdxl_pipeline
from fieldsmith import cli
from fieldsmith.commands import verbs
from fieldsmith.methods.erase import config
from fieldsmith.worlds import shapes

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|sh)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: pathlib.Path, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, the block) of every block of a page."""
    return [(m[2].strip(), m[3]) for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if m[1] == language]


def commands(block: str) -> list[list[str]]:
    """The words of each command of ours in a shell block, continuation lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["fieldsmith"]]


@pytest.fixture(scope="module")
def hub_models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Tiny pipelines of the same families in folders by the names of real ones. Read only."""
    folder = tmp_path_factory.mktemp("hub")
    words = shapes.VOCABULARY
    sdxl_pipeline(words).save_pretrained(folder / "stabilityai" / "stable-diffusion-xl-base-1.0")
    flux = flux_pipeline(words, vae_channels=(8, 8, 8), layers=1, single_layers=1, heads=1)
    flux.save_pretrained(folder / "black-forest-labs" / "FLUX.1-dev")
    return folder


@pytest.fixture
def here(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, with_tiny_zoo: None, few_steps: None,
    hub_models: pathlib.Path,
) -> pathlib.Path:  # fmt: skip
    """A folder to stand in, where the zoo's and the hub's names are tiny pipelines and what takes time is little."""
    for owner in hub_models.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    for name, number in {"budget": 264, "steps": 12, "evaluate": 4}.items():
        monkeypatch.setitem(config.LAPTOP, name, number)
    monkeypatch.setitem(config.PROTECT, "budget", 264)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_blocks(language: str) -> list[pathlib.Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", with_blocks("python"), ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_one_after_another(
    page: pathlib.Path, here: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("a_page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look up the names that they use
    for kind, block in blocks(page, "python"):
        if kind != "norun":
            exec(compile(block, page.name, "exec"), module.__dict__)
    assert len(vars(module)) > 5  # names that the blocks made, beside a module's own


@pytest.mark.parametrize("page", with_blocks("sh"), ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: pathlib.Path, here: pathlib.Path) -> None:
    for kind, block in blocks(page, "sh"):
        for words in commands(block):
            if kind == "norun":
                if words[0] in cli.METHODS and "--config" not in words:
                    verbs.settings(words[0], words[1:])
            else:
                assert cli.main(words) == 0, " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: pathlib.Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_a_verb_of_ones_own_is_a_file_of_under_120_lines() -> None:
    longest = max(len(block.splitlines()) for _, block in blocks(ROOT / "docs" / "extend.md", "python"))
    assert longest < 120
