"""The package: what the wheel holds, and that its run-time side is light."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "plugin": "superego",
    "converters": "superego/converters",
    "personas": "superego/personas",
}


def test_the_wheel_holds_exactly_the_tree(tmp_path: Path) -> None:
    """An unlisted file passes every editable test and is missing for users."""
    source = tmp_path / "source"  # a copy, so that no earlier build's leftovers are packed
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    held = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    kinds = {".py", ".txt", ".md", ".html", ".typed"}
    expected = {
        f"{package}/{path.name}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).iterdir()
        if path.suffix in kinds
    }
    assert held == expected


def test_the_command_line_starts_without_what_only_some_commands_need() -> None:
    """So `--help` and completion are quick, and `doctor` runs where one of these is broken."""
    heavy = {"torch", "llama_cpp", "transformers", "numpy", "gguf", "pydantic", "yaml", "jinja2"}
    heavy |= {"rich", "httpx", "platformdirs", "psutil"}
    code = f"import sys, superego, superego.cli\nprint({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_public_names_are_loaded_when_used() -> None:
    """Also behind an import of a module of the package, which sets names of its own there."""
    code = (
        "import sys, superego\n"
        "assert set(superego.__all__) <= set(dir(superego))\n"
        "import superego.minds, superego.blend, superego.session\n"
        "for name in superego.__all__:\n"
        ""
        "    assert type(getattr(superego, name)) is not type(sys), name\n"
        "from superego import attach, Personas\n"
        "assert attach is superego.attachment.attach and Personas is superego.minds.Personas\n"
        "assert not hasattr(superego, 'nonsense')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_compile_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import superego.cli as c; c.main()"
    command = [sys.executable, "-c", code, "compile", "terse", "--base", "smollm2", "-o"]
    done = subprocess.run(
        [*command, str(tmp_path / "a.gguf")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "Error: this command needs torch, which is not installed; pip install 'superego[convert]'\n"
    )
