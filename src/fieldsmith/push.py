"""A finished run on the hub: its weights, and a model card that says what it is made from, what changed, the licence.

In: the folder that the run shipped, and what the card tells. Out: one commit. Nothing is fetched but what the base's
own card says. What users wrote, such as prompts, stands there as plain text; of their machine only names of files do.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import tomli_w
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.repocard import ModelCard

from fieldsmith.config import GIVEN
from fieldsmith.errors import InputError, RunError
from fieldsmith.models import folders, pipeline_folder
from fieldsmith.models.families import FAMILIES
from fieldsmith.read import read_text
from fieldsmith.run import versions

LICENCE_FIELDS = ("license", "license_name", "license_link")
ASKED = ("targets", "anchors", "prompts", "sessions", "data", "reward", "judge")  # what runs were asked for
SIDES = ("before", "after")
MOST = 20  # of each of them on a card
PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")

Rows = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class About:
    """What a card tells of a run."""

    verb: str
    settings: Mapping[str, Any]  # as config.toml has them
    shipped: str  # adapter, model or guide
    numbers: Rows  # measure, before, after
    effects: Rows  # measure, before, after, change, verdict
    pictures: Sequence[tuple[str, bytes, bytes]]  # label, and PNGs before and after


@dataclass(frozen=True)
class Base:
    """What a run began with, as far as its folder or its card tells."""

    name: str
    hub: bool = False  # whether the hub has it under this name
    task: str | None = None  # the hub's word for what the pipeline does
    licence: Mapping[str, str] = field(default_factory=dict)  # fields of a card's metadata
    text: pathlib.Path | None = None  # the licence's own file


def check_repo(repo: str) -> str:
    """The token to push with. Raises InputError where the name is not owner/name, or nobody is logged in."""
    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo, re.ASCII) or re.search(
        r"--|\.\.|[.-](/|$)|\.git$", repo
    ):
        raise InputError(f"repository '{repo}' is no name of the hub; name it owner/name, e.g. me/no-triangle")
    token = get_token()
    if token is None:
        raise InputError(f"no token to push '{repo}' with; `hf auth login` with one that may write, or set HF_TOKEN")
    return token


def push(repo: str, folder: pathlib.Path, about: About, private: bool = False) -> str:
    """Commit the files of a folder, pictures, config.toml and the card to a repository of the hub, which is made where
    there is none; its address.

    Raises InputError as `check_repo` and where the token may not write there, RunError where the network fails.
    """
    api = HfApi(endpoint=constants.ENDPOINT, token=check_repo(repo))
    with _asking(repo):
        api.whoami()  # before the base is asked for: a token that is refused would look like a base that is not there
        base = base_of(about, api)
        files: dict[str, pathlib.Path | bytes] = {
            file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
        }
        for place, (_, before, after) in enumerate(about.pictures):
            files |= {_picture(place, "before"): before, _picture(place, "after"): after}
        if base.text:
            files["LICENSE"] = base.text
        files["config.toml"] = tomli_w.dumps(_elsewhere(about) | {"versions": versions()}).encode()
        files["README.md"] = card(repo, about, base).encode()
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, operations, commit_message=f"fieldsmith {about.verb}")
    return str(url)


@contextlib.contextmanager
def _asking(repo: str) -> Iterator[None]:
    """Errors of the hub and of the network in a sentence."""
    try:
        yield
    except HfHubHTTPError as error:
        status, said = error.response.status_code, folders.first_sentence(error)
        if status == 401:
            raise InputError(
                "the hub refused the token; `hf auth login` with one that is valid and may write"
            ) from error
        if status in (403, 404):
            raise InputError(f"this token may not write to '{repo}'; name a repository of your own ({said})") from error
        raise RunError(f"the hub did not take '{repo}': {said}") from error
    except (httpx2.HTTPError, ConnectionError) as error:  # ConnectionError: HF_HUB_OFFLINE is set
        raise RunError(f"the network failed: {folders.first_sentence(error)}; push again once it is there") from error


def base_of(about: About, api: HfApi) -> Base:
    """What the run's settings name as its model, with the licence that its folder or its card on the hub says."""
    name = str(about.settings.get("model") or about.settings.get("teacher"))
    try:
        folder = pipeline_folder(name)
    except InputError:  # moved away since
        return Base(pathlib.Path(name).name)
    if folder is None:
        try:
            info = api.model_info(name)
        except HfHubHTTPError:  # not there, or not for this token: nothing can be said of it
            return Base(name)
        return Base(name, True, info.pipeline_tag, _licence(info.card_data.to_dict() if info.card_data else {}))
    task = _task(folder, about.verb)
    if name.startswith("zoo:"):
        return Base(name, task=task, licence={"license": "apache-2.0"})  # as all of the zoo
    readme, said = folder / "README.md", {}
    if readme.is_file():
        said = _licence(ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict())
    text = next((file for file in sorted(folder.glob("LICENSE*")) if file.is_file()), None)
    if text and not said:
        title = next((line for line in read_text(text, "licence").split("\n") if line.strip()), "its own")
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "its-own"
        said = {"license": "other", "license_name": slug, "license_link": "LICENSE"}
    return Base(folder.resolve().name, task=task, licence=said, text=text)


def _licence(data: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(data[name]) for name in LICENCE_FIELDS if data.get(name)}


def _task(folder: pathlib.Path, verb: str) -> str | None:
    """What a pipeline in a folder does, in the hub's words."""
    try:
        kind = folders.read_index(str(folder), folder).get("_class_name")
    except InputError:
        return None
    family = next((family for family in FAMILIES if kind in family.pipelines), None)
    if family is None:
        return None
    if "words" not in family.condition:
        return "unconditional-image-generation"
    return "image-to-image" if verb == "edit" or family.sources == "required" else "text-to-image"


def card(repo: str, about: About, base: Base) -> str:
    """README.md of the repository: metadata that the hub reads, and what a person wants to know."""
    adapter = about.shipped == "adapter"
    prompts = [one for one in about.settings.get("prompts", ()) if one != "auto" and not pathlib.Path(one).is_file()]
    data = ModelCardData(
        base_model=base.name if base.hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if base.hub else None,
        library_name="diffusers",
        pipeline_tag=base.task,
        tags=["fieldsmith", f"fieldsmith-{about.verb}", *(["lora"] if adapter else [])],
        instance_prompt=" ".join(prompts[0].split()) if len(prompts) == 1 else None,
        widget=[
            {"text": label or " ", "output": {"url": _picture(place, "after")}}
            for place, (label, _, _) in enumerate(about.pictures)
        ]
        or None,
        **dict[str, Any](base.licence),
    )
    what = "An adapter (LoRA)" if adapter else "A pipeline"
    if about.shipped == "guide":
        what = "A worse network to steer away from (a guide)"
    begun = f"{what} made from {plain_text(base.name)} by `fieldsmith {about.verb}`."
    if about.settings.get("adapter"):
        names = ", ".join(plain_text(pathlib.Path(one).name) for one in about.settings["adapter"])
        begun += f" Its base had these adapters merged into it: {names}."
    parts = [f"# {plain_text(repo.partition('/')[2])}", begun, *_asked(about.settings)]
    if about.pictures:
        rows = [
            (plain_text(label), *(f"![{plain_text(label)}, {side}]({_picture(place, side)})" for side in SIDES))
            for place, (label, _, _) in enumerate(about.pictures)
        ]
        parts += ["## Before and after, at equal seeds", _table(("prompt", *SIDES), rows)]
    for title, headers, lines in (
        ("Measured, with 95% intervals", ("measure", *SIDES), about.numbers),
        ("Side effects", ("measure", *SIDES, "change", "verdict"), about.effects),
    ):
        if lines:
            parts += [f"## {title}", _table(headers, [tuple(map(plain_text, line)) for line in lines])]
    parts += [
        "## Use it",
        *_use(repo, about, base),
        "## Repeat it",
        *_repeat(repo, about),
        "## Licence",
        _licence_of(base),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def plain_text(text: str) -> str:
    """Words of a user as Markdown that shows them as they are, on one line: no link, no HTML, no cell of a table."""
    return PUNCTUATION.sub(r"\\\g<0>", " ".join("".join(c if c.isprintable() else " " for c in text).split()))


def _asked(settings: Mapping[str, Any]) -> list[str]:
    """A list of what the run was asked for: targets, prompts, data and so on."""
    lines = []
    for name in ASKED:
        value = settings.get(name)
        given = [str(one) for one in (value if isinstance(value, (list, tuple)) else [value] if value else [])]
        if given:
            more = f" and {len(given) - MOST} more" if len(given) > MOST else ""
            lines.append(f"- {name}: {', '.join(plain_text(_name(one)) for one in given[:MOST])}{more}")
    return ["\n".join(lines)] if lines else []


def _use(repo: str, about: About, base: Base) -> list[str]:
    if about.shipped == "guide":
        return [_code("sh", f"hf download {repo} --local-dir guide", "fieldsmith sample --model BASE --worse guide")]
    begun = repo if about.shipped == "model" else base.name
    lines = ["from diffusers import DiffusionPipeline", f"pipe = DiffusionPipeline.from_pretrained({begun!r})"]
    if about.shipped == "adapter":
        lines.append(f"pipe.load_lora_weights({repo!r})")
    where = [] if base.hub or about.shipped == "model" else [f"{plain_text(base.name)} is a folder, not on the hub."]
    return [_code("python", *lines), *where]


def _repeat(repo: str, about: About) -> list[str]:
    """The command, and what it needs beside config.toml."""
    lines = [
        f"hf download {repo} config.toml --local-dir .",
        f"fieldsmith {about.verb} --config config.toml --out runs/{about.verb}",
    ]
    words = [_code("sh", *lines)]
    settings = _elsewhere(about)
    beside = sorted({str(one) for key, one in settings.items() if key != "verb" and one != about.settings[key]})
    if beside:
        words.append(f"Files that it names are not here: {', '.join(map(plain_text, beside))}.")
    if any(str(value).startswith(GIVEN) for value in about.settings.values()):
        words.append("What it was given as objects in Python has to be given in Python again.")
    return words


def _licence_of(base: Base) -> str:
    name = plain_text(base.name)
    if not base.licence:
        return f"What is made from {name} falls under its licence, which is not said where it lies: look it up."
    licence = base.licence.get("license_name") or base.licence["license"]
    return f"What is made from {name} falls under its licence: {plain_text(licence)}."


def _elsewhere(about: About) -> dict[str, Any]:
    """The settings for somebody else: files of this machine by their last names."""

    def moved(value: Any) -> Any:
        return [moved(one) for one in value] if isinstance(value, (list, tuple)) else _name(value)

    return {"verb": about.verb} | {k: moved(v) for k, v in about.settings.items() if k not in ("out", "origins")}


def _name(value: Any) -> Any:
    """The last name of a path that begins at the root or at home; anything else as it is."""
    return value.rpartition("/")[2] if isinstance(value, str) and re.match(r"~?/\S*/|~/", value) else value


def _picture(place: int, side: str) -> str:
    return f"images/{place:03}-{side}.png"


def _code(language: str, *lines: str) -> str:
    return "\n".join((f"```{language}", *lines, "```"))


def _table(headers: Sequence[str], rows: Rows) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
