"""`fieldsmith completion bash|zsh|fish`: a script that completes verbs, flags and their words in that shell.

tyro completes bash and zsh, but one parser at a time and not fish; our verbs are parsers of their own, each imported
when it runs, so the scripts are written here from the same settings.
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal

from fieldsmith.commands import VERBS, verbs
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.diagnoses import config_of
from fieldsmith.diagnoses.config import KINDS
from fieldsmith.errors import InputError, check_word

EVERYWHERE = {"--help": (), "--quiet": (), "--json": (), "--debug": ()}
OTHERS = {
    "sample": "SampleConfig", "export": "ExportConfig", "push": "PushConfig", "families": "FamiliesConfig",
    "demo": "DemoConfig", "studio": "StudioConfig",
}  # fmt: skip
WHERE = {
    "bash": "eval \"$(fieldsmith completion bash)\" in ~/.bashrc",
    "zsh": "eval \"$(fieldsmith completion zsh)\" in ~/.zshrc, after compinit",
    "fish": "fieldsmith completion fish > ~/.config/fish/completions/fieldsmith.fish",
}  # fmt: skip

Flags = Mapping[str, tuple[str, ...] | None]  # a flag's words; () where it takes none, None where any are right


def completion(words: Sequence[str]) -> Answer:
    """Print the script of a shell."""
    shells = ", ".join(WHERE)
    if words and words[0] in ("-h", "--help"):
        print("usage: fieldsmith completion SHELL\n\n" + "\n".join(f"  {s:<6}{how}" for s, how in WHERE.items()))
        raise SystemExit(0)
    if len(words) != 1:
        raise InputError(f"completion takes one shell, not {len(words)} words; name one of {shells}")
    check_word(words[0], tuple(WHERE), "the shells that are completed")
    script = {"bash": bash, "zsh": zsh, "fish": fish}[words[0]](commands())
    print(script, end="")
    return answer(metrics={"script": script})


def commands() -> dict[str, Flags]:
    """Every verb with its flags."""
    found: dict[str, Flags] = {}
    for verb in VERBS:
        own: dict[str, tuple[str, ...] | None] = {}
        if verb in verbs.CONFIGS:
            kind = getattr(importlib.import_module(f"fieldsmith.methods.{verb}.config"), verbs.CONFIGS[verb])
            own = {"--preset": None, "--scale": ("laptop", "paper"), "--config": None, "--help-all": (), **flags(kind)}
        elif verb == "diagnose":
            own = {"--config": None, **{k: v for one in ("overview", *KINDS) for k, v in flags(config_of(one)).items()}}
        elif verb in OTHERS:
            own = flags(getattr(importlib.import_module(f"fieldsmith.commands.{verb}"), OTHERS[verb]))
        elif verb in ("plan", "measure"):  # which take the flags of a verb or of a run
            own = {f: None for name in verbs.CONFIGS for f in found.get(name, {}) if f not in EVERYWHERE}
        found[verb] = {**own, **EVERYWHERE}
    return found


def flags(kind: type[Any]) -> dict[str, tuple[str, ...] | None]:
    """The flags of a config: a Literal's words, none of a switch, None of anything else."""
    found: dict[str, tuple[str, ...] | None] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if name not in kind.__dataclass_fields__:
            continue
        flag = "--" + name.replace("_", "-")
        parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
        if bool in parts:
            found |= {flag: (), flag.replace("--", "--no-", 1): ()}
            continue
        literal = [str(word) for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part)]
        found[flag] = tuple(literal) or None
    return found


def first_words(verb: str) -> tuple[str, ...]:
    """What may stand right behind a verb, beside a file."""
    return {"diagnose": tuple(KINDS), "plan": tuple(verbs.CONFIGS), "completion": tuple(WHERE)}.get(verb, ())


def bash(found: Mapping[str, Flags]) -> str:
    return _posix(found, "words", lambda words: f'COMPREPLY=($(compgen -W "{words}" -- "$now"))') + (
        "complete -o default -F _fieldsmith fieldsmith\n"
    )


def zsh(found: Mapping[str, Flags]) -> str:
    return _posix(found, "zsh", lambda words: f"compadd -- {words}") + "compdef _fieldsmith fieldsmith\n"


def _posix(found: Mapping[str, Flags], shell: str, give: Callable[[str], str]) -> str:
    """bash and zsh: a case of `verb flag` for words, then one of the verb for flags; files where nothing is known."""
    lines = ["_fieldsmith() {"]
    if shell == "zsh":
        lines += ['  local now="${words[CURRENT]}" before="${words[CURRENT-1]}" verb="${words[2]}" at=$((CURRENT - 1))']
    else:
        lines += [
            '  local now="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" verb="${COMP_WORDS[1]}"',
            "  local at=$COMP_CWORD",
            "  COMPREPLY=()",
        ]
    lines += [f'  if [ "$at" -eq 1 ]; then {give(" ".join(found))}; return; fi', '  case "$verb $before" in']
    for verb, flags_ in found.items():
        lines += [f'    "{verb} {flag}") {give(" ".join(words))}; return;;' for flag, words in flags_.items() if words]
        if behind := first_words(verb):
            lines.append(f'    "{verb} {verb}") {give(" ".join(behind))}; return;;')
    files = "_files" if shell == "zsh" else "return"
    lines += ["  esac", f'  case "$now" in -*) ;; *) {files}; return;; esac', '  case "$verb" in']
    lines += [f"    {verb}) {give(' '.join(flags_))};;" for verb, flags_ in found.items()]
    return "\n".join([*lines, "  esac", "}", ""])


def fish(found: Mapping[str, Flags]) -> str:
    lines = []
    for verb, flags_ in found.items():
        what = VERBS[verb].replace("'", "\\'")
        lines.append(f"complete -c fieldsmith -n __fish_use_subcommand -f -a {verb} -d '{what}'")
        within = f"complete -c fieldsmith -n '__fish_seen_subcommand_from {verb}'"
        if behind := first_words(verb):
            lines.append(f"{within} -a '{' '.join(behind)}'")
        for flag, words in flags_.items():
            ending = "" if words == () else " -r" if words is None else f" -x -a '{' '.join(words)}'"
            lines.append(f"{within} -l {flag[2:]}{ending}")
    return "\n".join([*lines, ""])
