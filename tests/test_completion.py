"""Completion: what a shell is offered, asked as a shell asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run

BIN = Path(sys.executable).parent
# Calls the function that the script has registered, as bash does when Tab is pressed.
_ASK = """
eval "$(superego completion bash)"
compopt() { echo "compopt $*"; }
[[ $(complete -p superego) == *"-F _superego_completion superego" ]] || exit 9
COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=()
_superego_completion superego
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one file of each kind, an Ollama store and a kept persona."""
    for name in ("foo.gguf", "mine.md", "old.session", "other.txt"):
        (tmp_path / name).touch()
    tag = tmp_path / "store/manifests/registry.ollama.ai/library/tiny/1b"
    tag.parent.mkdir(parents=True)
    tag.touch()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mate.gguf").touch()
    (kept / "mate.json").write_text('{"base": "smollm2", "scale": 1}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("SUPEREGO_PERSONAS", str(kept))
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def in_bash(line: str) -> list[str]:
    command = ["bash", "--norc", "-c", _ASK, "bash", line]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("superego comp", ["compile", "completion"]),
        ("superego compile soc", ["socratic"]),
        ("superego compile m", ["mine.md"]),
        ("superego compile plain --base ", ["smollm2", "ollama:tiny:1b", "foo.gguf"]),
        ("superego compile plain --base ollama:t", ["tiny:1b"]),
        ("superego compile plain --base=ollama:t", ["tiny:1b"]),
        ("superego compile plain --base ollama:tiny:", ["1b"]),
        ("superego chat --persona ", ["foo.gguf"]),
        ("superego chat --persona ../", ["compopt", "-o", "default"]),
        ("superego chat --session ", ["old.session"]),
        ("superego serve f", ["foo.gguf"]),
        ("superego serve t", ["terse"]),
        ("superego remove ", ["mate"]),
        ("superego compile --effort s", ["standard"]),
        ("superego completion z", ["zsh"]),
    ],
)
def test_bash_is_offered_what_fits(line: str, offered: list[str]) -> None:
    assert in_bash(line) == offered


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("shell", "at", "answer"), [("zsh", "3", "plain\nollama:tiny:1b\n_\n"), ("fish", "oll", None)]
)
def test_other_shells_are_answered(shell: str, at: str, answer: str | None) -> None:
    """Asked as click's scripts for them do."""
    asked = {"COMP_WORDS": "superego compile --base oll", "COMP_CWORD": at}
    done = subprocess.run(
        [BIN / "superego"],
        env={**os.environ, **asked, "_SUPEREGO_COMPLETE": f"{shell}_complete"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (answer or "plain,ollama:tiny:1b\n")


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
@pytest.mark.usefixtures("folder")
def test_fish_is_offered_what_fits() -> None:
    ask = "superego completion fish | source; complete -C 'superego compile --base oll'"
    done = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True)
    assert done.stdout.split() == ["ollama:tiny:1b"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_is_one_that_its_shell_can_read(shell: str, tmp_path: Path) -> None:
    script = run("completion", shell).stdout
    assert f"_SUPEREGO_COMPLETE={shell}_complete" in script
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here: what the script says was not run")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
