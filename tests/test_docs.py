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
from fieldsmith import cli, concepts
from fieldsmith.commands import verbs
from fieldsmith.methods.erase import config
from fieldsmith.methods.erase.judged import PARAPHRASES
from fieldsmith.worlds import shapes
from tests.test_detect import classifier_folder
from tests.test_rewards import clip_folder

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


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Tiny networks in folders of the names that they have on the hub, which go before it. Read only."""
    folder = tmp_path_factory.mktemp("hub")
    sentences = (*config.TEMPLATES, *PARAPHRASES, *config.KEPT, *concepts.load(["imagenette"]), "church barn")
    words = tuple(sorted({word for one in sentences for word in one.replace("{}", "").split()} | {*shapes.VOCABULARY}))
    flux_pipeline(
        words, vae_channels=(8, 8, 8), layers=1, single_layers=1, heads=1, text_length=12, guidance_embeds=True
    ).save_pretrained(folder / "black-forest-labs" / "FLUX.1-dev")
    sdxl_pipeline(shapes.VOCABULARY).save_pretrained(folder / "stabilityai" / "stable-diffusion-xl-base-1.0")
    clip_folder(folder / "openai" / "clip-vit-large-patch14", words, 12)
    classifier_folder(folder / "google" / "vit-base-patch16-224")
    return folder


@pytest.fixture
def here(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, with_tiny_zoo: None, few_steps: None, hub: pathlib.Path
) -> pathlib.Path:
    """An empty folder to stand in, where the zoo's and the hub's names are tiny pipelines and defaults that take time
    are small."""
    for name in hub.iterdir():
        (tmp_path / name.name).symlink_to(name)
    monkeypatch.setitem(config.PRESETS, "paper", {"evaluate": 1, "budget": 2, "steps": 4, "window": (1, 2)})
    for name, number in {"budget": 48, "steps": 4, "window": (1, 3), "evaluate": 2}.items():
        monkeypatch.setitem(config.LAPTOP, name, number)
    monkeypatch.setitem(config.PROTECT, "budget", 48)
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
