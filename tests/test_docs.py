"""Every Python block of README.md and docs/ runs as it stands, and every command that needs no network.

The zoo's names stand for tiny pipelines of the same families and vocabularies, so that a block takes seconds. Commands
of blocks marked `norun` (large models, servers) are parsed to the last flag, but not run.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shlex
import sys
import types

import pytest
import yaml

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


def anchors(page: pathlib.Path) -> set[str]:
    """Of a page's headings, as Python-Markdown, which makes the site, and the hub name them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", one) for one in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_lead_somewhere(page: pathlib.Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", text):
        if "://" not in target:
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_the_site_has_every_page_once_and_asks_nobody_for_anything() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(entry: object) -> list[str]:
        parts = entry if isinstance(entry, list) else list(entry.values()) if isinstance(entry, dict) else None
        return [str(entry)] if parts is None else [one for part in parts for one in files(part)]

    assert sorted(files(settings["nav"])) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    # what makes Material for MkDocs fetch: fonts, a repository's stars, analytics, diagrams
    assert settings["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript"} & set(settings)
    assert not {"analytics", "consent"} & set(settings["extra"])
    assert not [page for page in PAGES if "```mermaid" in page.read_text(encoding="utf-8")]
    sheet = (ROOT / "docs" / "site.css").read_text(encoding="utf-8")
    assert "url(" not in sheet and "@import" not in sheet


@pytest.mark.parametrize("verb", ["align", "distill", "edit", "erase", "sharpen"])
def test_a_verbs_page_says_the_same_things_in_the_same_order(verb: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / f"{verb}.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[:6] == [
        "What it cures", "When not to use it", "The maths", "Settings that matter", "What we measured",
        "What goes wrong",
    ]  # fmt: skip
    named = set(
        re.findall(r"`--(?:no-)?([a-z][a-z-]+)", text.partition("## Settings that matter")[2].partition("###")[0])
    )
    kind = getattr(importlib.import_module(f"fieldsmith.methods.{verb}.config"), verbs.CONFIGS[verb])
    known = {name.replace("_", "-") for name in kind.__dataclass_fields__} | {"preset", "scale", "config"}
    assert named and named <= known


def test_what_the_site_shows_of_results_is_linked_inside_it() -> None:
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site.py")
    assert spec and spec.loader
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="align.md"))
    text = "[a](../results/align/README.md) and [b](../src/x.py), [c](edit.md)\n```sh norun\n"
    assert hook.on_page_markdown(text, page) == "[a](measured/align/README.md) and b, [c](edit.md)\n```sh\n"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_a_verb_of_ones_own_is_a_file_of_under_120_lines() -> None:
    longest = max(len(block.splitlines()) for _, block in blocks(ROOT / "docs" / "extend.md", "python"))
    assert longest < 120
