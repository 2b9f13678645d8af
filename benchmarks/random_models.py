"""Writes GGUF files of real models' exact shapes with random weights, quantized blocks at once.

What a compile costs on them is what it costs on the real ones; what it finds means nothing. The
tokenizer is SmolLM2's, filled up to the real vocabulary's size, so that texts are as many tokens
as a real tokenizer makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType

from superego.base import open_base

Type = GGMLQuantizationType
_POOL = 32 << 20  # bytes of random blocks that tensors are cut from


@dataclass(frozen=True)
class Model:
    """A real model's shape, from its published configuration."""

    name: str
    architecture: str
    n_layer: int
    d_model: int
    d_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    tied: bool
    rope_base: float
    rms_eps: float
    context: int
    matrices: GGMLQuantizationType
    tables: GGMLQuantizationType  # of the embedding and the output
    rope_factors: bool = False
    qk_norms: bool = False


MODELS = {
    model.name: model
    for model in (
        Model(
            "Llama-3.2-1B", "llama", 16, 2048, 8192, 32, 8, 64, 128256, True, 5e5, 1e-5, 131072,
            Type.Q4_0, Type.Q6_K, rope_factors=True,
        ),
        Model(
            "Qwen3-4B", "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True, 1e6, 1e-6, 40960,
            Type.Q4_K, Type.Q6_K, qk_norms=True,
        ),
        Model(
            "Llama-3.1-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, False, 5e5, 1e-5,
            131072, Type.Q4_K, Type.Q6_K, rope_factors=True,
        ),
    )
}  # fmt: skip


def _blocks(kind: GGMLQuantizationType, width: int, rng: np.random.Generator) -> np.ndarray:
    """(n, bytes a block) random blocks whose weights have variance 1 / width and mean 0."""
    size = GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, (_POOL // size, size), np.uint8)
    scale = width**-0.5

    def half(start: int, value: float) -> None:
        raw[:, start : start + 2] = np.array([value], np.float16).view(np.uint8)

    if kind == Type.Q4_0:
        half(0, scale / 4.61)  # standard deviation of 0 … 15
    elif kind == Type.Q4_K:  # all scales and minima 32 of 63
        half(0, scale / (32 * 4.61))
        half(2, 7.5 * scale / (32 * 4.61))
        raw[:, 4:12], raw[:, 12:16] = 160, 0
    elif kind == Type.Q6_K:
        raw[:, 192:208] = 32
        half(208, scale / (32 * 18.5))
    else:
        raise ValueError(kind)
    return raw


def write(model: Model, path: Path, layers: int | None = None, seed: int = 0) -> Path:
    """Write the model, or its first `layers` layers, to `path`."""
    model = model if layers is None else replace(model, n_layer=layers)
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, model.architecture)
    writer.add_type("model")
    writer.add_name(f"random {model.name}")
    writer.add_block_count(model.n_layer)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_layer_norm_rms_eps(model.rms_eps)
    _tokenizer(writer, model.n_vocab)

    pools: dict[tuple[GGMLQuantizationType, int], np.ndarray] = {}
    data: list[tuple[tuple[int, ...], GGMLQuantizationType]] = []

    def add(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
        block, size = GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(shape)) // block * size
        data.append((shape, kind))
        if kind == Type.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes)
        else:
            stored = (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=kind)

    d, q, kv = model.d_model, model.n_head * model.head_dim, model.n_head_kv * model.head_dim
    add("token_embd.weight", (model.n_vocab, d), model.tables)
    if not model.tied:
        add("output.weight", (model.n_vocab, d), model.tables)
    add("output_norm.weight", (d,), Type.F32)
    if model.rope_factors:
        add("rope_freqs.weight", (model.head_dim // 2,), Type.F32)
    for i in range(model.n_layer):
        for name, shape in (
            ("attn_norm", (d,)), ("attn_q", (q, d)), ("attn_k", (kv, d)), ("attn_v", (kv, d)),
            ("attn_output", (d, q)), ("ffn_norm", (d,)), ("ffn_gate", (model.d_ff, d)),
            ("ffn_up", (model.d_ff, d)), ("ffn_down", (d, model.d_ff)),
        ):  # fmt: skip
            add(f"blk.{i}.{name}.weight", shape, Type.F32 if len(shape) == 1 else model.matrices)
        if model.qk_norms:
            add(f"blk.{i}.attn_q_norm.weight", (model.head_dim,), Type.F32)
            add(f"blk.{i}.attn_k_norm.weight", (model.head_dim,), Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape, kind in data:
        if kind == Type.F32:
            writer.write_tensor_data(np.ones(shape, np.float32))
            continue
        block, size = GGML_QUANT_SIZES[kind]
        key = (kind, shape[-1])
        if key not in pools:
            pools[key] = _blocks(*key, rng)
        pool, n = pools[key], int(np.prod(shape)) // block
        start = int(rng.integers(len(pool)))  # no two tensors are the same
        whole = np.resize(np.roll(pool, -start, axis=0), (n, size))
        writer.write_tensor_data(whole.reshape(*shape[:-1], -1))
    writer.close()
    return path


def _tokenizer(writer: GGUFWriter, n_vocab: int) -> None:
    metadata = open_base("smollm2").header.metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    kinds = list(metadata["tokenizer.ggml.token_type"])
    unused = n_vocab - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + [f"<|unused_{i}|>" for i in range(unused)])
    writer.add_token_types(kinds + [TokenType.UNUSED] * unused)
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(metadata["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
    writer.add_chat_template(metadata["tokenizer.chat_template"])
