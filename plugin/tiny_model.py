"""A model of a few hundred kilobytes with random weights, for tests of what runs models.

Knows a real model's layout. Its replies mean nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens()]
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


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(extra)) for byte in range(256)]
