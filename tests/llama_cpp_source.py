"""llama.cpp's own convert_lora_to_gguf.py, out of llama-cpp-python's source archive.

The archive is not part of the project: `fetch` gets it through pip, into the environment's folder,
for the installed version. None of its code is imported here: it runs in another process.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

_PARTS = ("convert_lora_to_gguf.py", "convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
# one process for many conversions: importing torch and transformers is most of the time
_DRIVER = """
import os, runpy, sys
script, *jobs = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
for base, lora, output in zip(*[iter(jobs)] * 3):
    sys.argv = [script, "--base", base, "--outtype", "f32", "--outfile", output, lora]
    runpy.run_path(script, run_name="__main__")
"""


def archive() -> Path:
    """Where the installed version's source archive lies, or would."""
    version = importlib.metadata.version("llama-cpp-python")
    return Path(sys.prefix) / f"llama_cpp_python-{version}.tar.gz"


def fetch() -> Path:
    """Download the archive (76 MB) where it is not there."""
    path = archive()
    if not path.is_file():
        version = importlib.metadata.version("llama-cpp-python")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "-d", str(path.parent)]
        subprocess.run([*command, f"llama-cpp-python=={version}"], check=True)
    return path


def unpack(folder: Path) -> Path:
    """The converter's script, unpacked into `folder`."""
    with tarfile.open(archive()) as tar:
        wanted = [
            member
            for member in tar
            if "/vendor/llama.cpp/" in member.name
            and member.name.split("/vendor/llama.cpp/")[1].startswith(_PARTS)
        ]
        tar.extractall(folder, wanted, filter="data")
    return next(folder.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py"))


def convert(script: Path, jobs: Sequence[tuple[Path, Path, Path]]) -> None:
    """For each folder with a base's config.json and PEFT folder, write the adapter in F32."""
    paths = [str(path) for job in jobs for path in job]
    command = [sys.executable, "-c", _DRIVER, str(script), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
