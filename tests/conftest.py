"""Shared fixtures: the real base, one compiled persona, and tiny random models."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.cli import main
from superego.runtime import load

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2() -> BaseModel:
    return open_base("smollm2")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def compiled(
    smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The pirate, compiled once at quick effort: its file and what compile reported."""
    from superego.converters.compile import Settings, compile_manifesto

    path = tmp_path_factory.mktemp("pirate") / "pirate.gguf"
    report = compile_manifesto(bundled()["pirate"], smollm2, path, Settings.for_effort("quick"))
    return path, report


@pytest.fixture(scope="session")
def pirate(compiled: tuple[Path, dict[str, Any]]) -> Path:
    return compiled[0]


@pytest.fixture(scope="session")
def llm(smollm2: BaseModel) -> Any:
    return load(smollm2, n_ctx=1024)


def run(*args: str, stdin: str | None = None) -> Result:
    """The command line in this process; what it raises is a failure, never an exit code."""
    return CliRunner().invoke(main, list(args), input=stdin, catch_exceptions=False)


def refused(*args: str) -> str:
    """Runs a command that must be refused: exit code 2, one line on stderr, no output."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def tiny_model(
    path: Path,
    architecture: str = "llama",
    seed: int = 0,
    d_model: int = 64,
    template: str | None = CHATML,
    context_length: int = 512,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    **metadata: Any,
) -> Path:
    """A random two-layer model with a byte-level tokenizer, in a real model's layout."""
    rng = np.random.default_rng(seed)
    d_ff, n_head, n_head_kv, head_dim = 2 * d_model, 4, 2, d_model // 4
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(f"tiny {architecture}")
    writer.add_block_count(2)
    writer.add_context_length(context_length)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    if architecture == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_byte_tokens()]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 256)
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        weights = rng.standard_normal((rows, columns)).astype(np.float32)
        weights *= scale / np.sqrt(columns)
        writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)

    def vector(name: str, n: int) -> None:
        writer.add_tensor(name, (1 + 0.1 * rng.standard_normal(n)).astype(np.float32))

    matrix("token_embd.weight", len(tokens), d_model, 8.0)
    vector("output_norm.weight", d_model)
    for i in range(2):
        vector(f"blk.{i}.attn_norm.weight", d_model)
        matrix(f"blk.{i}.attn_q.weight", n_head * head_dim, d_model)
        matrix(f"blk.{i}.attn_k.weight", n_head_kv * head_dim, d_model)
        matrix(f"blk.{i}.attn_v.weight", n_head_kv * head_dim, d_model)
        matrix(f"blk.{i}.attn_output.weight", d_model, n_head * head_dim)
        if architecture == "qwen2":
            for name, n in (("q", n_head), ("k", n_head_kv), ("v", n_head_kv)):
                vector(f"blk.{i}.attn_{name}.bias", n * head_dim)
        if architecture == "qwen3":
            vector(f"blk.{i}.attn_q_norm.weight", head_dim)
            vector(f"blk.{i}.attn_k_norm.weight", head_dim)
        vector(f"blk.{i}.ffn_norm.weight", d_model)
        matrix(f"blk.{i}.ffn_gate.weight", d_ff, d_model)
        matrix(f"blk.{i}.ffn_up.weight", d_ff, d_model)
        matrix(f"blk.{i}.ffn_down.weight", d_model, d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def requantized(base: BaseModel, path: Path, kind: int) -> Path:
    """The same model with weights of another type, as llama-quantize writes it."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    parameters.allow_requantize = True
    files = str(base.path).encode(), str(path).encode()
    assert not llama_cpp.llama_model_quantize(*files, parameters)
    return path


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, extra = {}, 0
    for byte in range(256):
        if byte in plain:
            names[byte] = chr(byte)
        else:
            names[byte] = chr(256 + extra)
            extra += 1
    return [names[byte] for byte in range(256)]


def documented(page: str) -> list[list[str]]:
    """The commands in a page's plain code blocks, in order, comments and settings left out.

    Blocks that name a language, such as text for output, hold none.
    """
    text = (Path(__file__).parent.parent / "docs" / page).read_text("utf-8")
    found = []
    for block in text.split("```")[1::2]:
        kind, *lines = block.splitlines()
        for line in lines if not kind else []:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and "=" in words[0]:
                words.pop(0)
            if words:
                found.append(words)
    return found
