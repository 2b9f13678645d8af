"""Split models: any part stands for the whole, and parts that do not belong together are told."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from gguf import GGUFReader
from tiny import TINY, build

import superego
from superego.adapter import read_adapter
from superego.base import fingerprint, locate, open_base
from superego.converters.compile import Settings, compile_manifesto
from superego.errors import SuperegoError
from superego.manifesto import Manifesto
from superego.runtime import load
from superego.split import read_model

CALM = Manifesto("calm", "You answer calmly, in short sentences.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model whole and, written by gguf-py, in three parts."""
    path = tmp_path_factory.mktemp("split")
    build(path / "whole.gguf", TINY["llama"])
    build(path / "tiny.gguf", TINY["llama"], per_part=15)
    return path


def part(folder: Path, number: int) -> Path:
    return folder / f"tiny-{number:05}-of-00003.gguf"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_part_stands_for_the_whole_model(folder: Path, number: int) -> None:
    model = open_base(str(part(folder, number)))
    whole = open_base(str(folder / "whole.gguf"))
    assert model.path == part(folder, 1)
    assert len({t.path for t in model.header.tensors.values()}) == 3
    assert {n: (t.shape, t.type) for n, t in model.header.tensors.items()} == {
        n: (t.shape, t.type) for n, t in whole.header.tensors.items()
    }
    for name, tensor in model.header.tensors.items():
        twin = whole.header.tensors[name]
        ours, theirs = (
            np.memmap(t.path, np.uint8, "r", t.offset, (t.n_bytes,)) for t in (tensor, twin)
        )
        assert np.array_equal(ours, theirs)


def test_a_compile_gives_the_same_adapter_and_it_attaches(folder: Path, tmp_path: Path) -> None:
    settings = Settings.for_effort("quick", rank=8)
    found = []
    for name in ("tiny-00002-of-00003", "whole"):
        model = open_base(str(folder / f"{name}.gguf"))
        compile_manifesto(CALM, model, tmp_path / f"{name}.gguf", settings)
        adapter = read_adapter(tmp_path / f"{name}.gguf")
        found.append({t.name: t.data for t in GGUFReader(adapter.path).tensors})
        llm = load(model, n_ctx=256)
        with superego.attach(llm, str(adapter.path)) as persona:
            assert persona.adapter is not None
            llm.eval([5, 6, 7])
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_the_fingerprint_sees_every_part(folder: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        shutil.copy(part(folder, number), tmp_path)
    before = fingerprint(read_model(part(tmp_path, 1)))
    assert before == fingerprint(read_model(part(folder, 3)))
    last = next(t for t in read_model(part(folder, 1)).parts[2].tensors.values())
    data = bytearray(part(tmp_path, 3).read_bytes())
    data[last.offset : last.offset + last.n_bytes] = bytes(last.n_bytes)
    part(tmp_path, 3).write_bytes(data)
    assert before != fingerprint(read_model(part(tmp_path, 1)))


def test_parts_that_are_links_keep_their_names(folder: Path, tmp_path: Path) -> None:
    """A Hugging Face cache: links with the parts' names to files under other names."""
    for number in (1, 2, 3):
        blob = tmp_path / f"blob{number}"
        shutil.copy(part(folder, number), blob)
        part(tmp_path, number).symlink_to(blob)
    load(open_base(str(part(tmp_path, 2))), n_ctx=256).eval([5, 6])


def test_a_split_model_in_ollamas_store_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, blobs = [], tmp_path / "blobs"
    blobs.mkdir()
    for number in (2, 1, 3):  # the manifest need not have them in order
        data = part(folder, number).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / f"sha256-{digest}").write_bytes(data)
        layers.append(
            {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
        )
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": layers}))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    model = open_base("ollama:tiny")
    assert model.fingerprint == open_base(str(part(folder, 1))).fingerprint
    assert locate("ollama:tiny") == model.path  # found again, not made anew
    load(model, n_ctx=256).eval([5, 6])
    manifest.write_text(json.dumps({"layers": layers[:2]}))
    with pytest.raises(SuperegoError, match=r"expected part 1 of 2"):
        open_base("ollama:tiny")


def test_what_is_wrong_with_the_parts_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    def said() -> str:
        return refused("compile", "pirate", "--base", str(part(tmp_path, 1)), "-o", out)

    out = str(tmp_path / "a.gguf")
    for number in (1, 2):
        shutil.copy(part(folder, number), tmp_path)
    assert "tiny-00003-of-00003.gguf missing beside it; download it too" in said()
    shutil.copy(part(folder, 2), part(tmp_path, 3))
    assert "is part 2 of 3" in said()
    assert "expected part 3 of 3" in said()
    other = tmp_path / "other"
    other.mkdir()
    build(other / "tiny.gguf", TINY["qwen2"], per_part=20)
    shutil.copy(other / "tiny-00003-of-00003.gguf", part(tmp_path, 3))
    assert "it is of another split" in said()
    part(tmp_path, 3).write_bytes(part(folder, 3).read_bytes()[:-4096])
    assert "truncated" in said()
    shutil.copy(part(folder, 3), part(tmp_path, 3))
    renamed = tmp_path / "model.gguf"
    shutil.copy(part(folder, 2), renamed)
    line = refused("compile", "pirate", "--base", str(renamed), "-o", out)
    assert "is part 2 of a GGUF split in 3" in line
    assert "expected NAME-00002-of-00003.gguf" in line
    assert not Path(out).exists()
