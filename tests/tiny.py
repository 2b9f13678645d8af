"""Small random models of every architecture, as real converters would have written them.

Names of tensors and metadata, kind of tokenizer and style of template are a real model's; the
templates are short ones of our own. Constants are set so that each of them matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType

from superego.tiny_model import byte_tokens

D_MODEL, D_FF, N_HEAD, N_HEAD_KV, HEAD_DIM = 256, 512, 4, 2, 64

_CHATML = (
    "{% if messages[0]['role'] != 'system' and DEFAULT %}{{ '<|im_start|>system\n' + DEFAULT + "
    "'<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}TAIL{% endif %}"
)
_THINKING = (
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


def _chatml(default: str, tail: str = "") -> str:
    return f"{{% set DEFAULT = {default!r} %}}" + _CHATML.replace("TAIL", tail)


QWEN2 = _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN3 = _chatml("", _THINKING)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = "
    "messages[0]['content'] %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}"
    "{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
    "December 2023\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content']"
    " + '\n\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.last "
    "else '') + m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SMOLLM3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = 'You are a helpful AI assistant "
    "named SmolLM, trained by Hugging Face.' %}{% endif %}{{ '<|im_start|>system\n## Metadata\n\n"
    "Today Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: /think\n\n## Custom "
    "Instructions\n\n' + system + '\n\n<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + "
    "m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GRANITE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = 'You are Granite, developed by "
    "IBM.' %}{% endif %}{{ '<|start_of_role|>system<|end_of_role|>' + system + "
    "'<|end_of_text|>\n' }}{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + "
    "'<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """How one architecture's file differs from the others'."""

    architecture: str
    template: str
    special: tuple[str, ...]  # the begin token first, then the end of a turn
    pre: str = ""  # of a byte-pair tokenizer; else SentencePiece
    space_prefix: bool = True
    layers: int = 4
    fused: bool = False
    biases: bool = False
    tied: bool = True
    qk_norms: bool = False
    post_norms: bool = False
    experts: int = 0
    embedding: float = 0.2  # standard deviation
    output_norm: float = 1.0  # mean
    rope_dim: int = HEAD_DIM
    rope_factors: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)  # below the architecture's name
    whole: str = "Q8_0"  # the quantization that goes the whole way


TINY = {
    "llama": Tiny(
        "llama",
        LLAMA3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        pre="llama-bpe",
        rope_factors=("rope_freqs",),
        metadata={"rope.freq_base": 500000.0},
        whole="Q4_K_M",
    ),
    "mistral": Tiny(
        "llama", MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), tied=False, whole="Q4_0"
    ),
    "qwen2": Tiny(
        "qwen2",
        QWEN2,
        ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
        pre="qwen2",
        biases=True,
        metadata={"rope.freq_base": 1000000.0},
        whole="Q6_K",
    ),
    "qwen3": Tiny(
        "qwen3",
        QWEN3,
        ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
        pre="qwen2",
        qk_norms=True,
        metadata={"rope.freq_base": 1000000.0},
        whole="Q4_K_M",
    ),
    "qwen3moe": Tiny(
        "qwen3moe",
        QWEN3,
        ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
        pre="qwen2",
        qk_norms=True,
        tied=False,
        experts=6,
        metadata={"rope.freq_base": 1000000.0, "expert_used_count": 2},
        whole="Q8_0",
    ),
    "gemma2": Tiny(
        "gemma2",
        GEMMA,
        ("<bos>", "<end_of_turn>", "<eos>", "<start_of_turn>"),
        space_prefix=False,
        post_norms=True,
        embedding=0.05,  # before its scale of 16
        output_norm=4.0,
        metadata={
            "attention.sliding_window": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 3.0,
        },
        whole="Q4_K_M",
    ),
    "gemma3": Tiny(
        "gemma3",
        GEMMA,
        ("<bos>", "<end_of_turn>", "<eos>", "<start_of_turn>"),
        space_prefix=False,
        layers=6,
        qk_norms=True,
        post_norms=True,
        embedding=0.05,  # before its scale of 16
        output_norm=4.0,
        metadata={
            "attention.sliding_window": 24,
            "rope.freq_base": 1000000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        whole="Q8_0",
    ),
    "phi3": Tiny(
        "phi3",
        PHI3,
        ("<s>", "<|end|>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
        fused=True,
        tied=False,
        rope_dim=48,
        rope_factors=("rope_factors_long", "rope_factors_short"),
        metadata={
            "context_length": 8192,
            "rope.scaling.original_context_length": 4096,
            "rope.scaling.attn_factor": 1.19,
            "attention.sliding_window": 2047,  # that llama.cpp does not use
        },
        whole="Q4_0",
    ),
    "smollm3": Tiny(
        "smollm3",
        SMOLLM3,
        ("<|begin_of_text|>", "<|im_end|>", "<|im_start|>"),
        pre="llama-bpe",
        metadata={"rope.freq_base": 5000000.0},
        whole="Q4_K_M",
    ),
    "granite": Tiny(
        "granite",
        GRANITE,
        ("<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        pre="refact",
        embedding=0.005,  # before its scale of 12; a tied output repeats larger ones
        output_norm=60.0,
        metadata={
            "attention.scale": 0.03,
            "residual_scale": 0.22,
            "embedding_scale": 12.0,
            "logit_scale": 1.7,
        },
        whole="Q6_K",
    ),
}

_TYPES: dict[type, Callable[..., Any]] = {
    float: GGUFWriter.add_float32,
    int: GGUFWriter.add_uint32,
    str: GGUFWriter.add_string,
    bool: GGUFWriter.add_bool,
    list: GGUFWriter.add_array,
}


def build(path: Path, tiny: Tiny, seed: int = 0, per_part: int = 0) -> Path:
    """Write the model in float32, which llama.cpp quantizes.

    With `per_part` it is split into files of so many tensors each.
    """
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, tiny.architecture, split_max_tensors=per_part)
    writer.add_type("model")
    writer.add_name(f"tiny {tiny.architecture}")
    d_ff = D_MODEL if tiny.experts else D_FF
    metadata: dict[str, Any] = {
        "block_count": tiny.layers,
        "context_length": 2048,
        "embedding_length": D_MODEL,
        "feed_forward_length": d_ff,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": tiny.rope_dim,
        **(
            {"expert_count": tiny.experts, "expert_feed_forward_length": d_ff}
            if tiny.experts
            else {}
        ),
        **tiny.metadata,
    }
    for key, value in metadata.items():
        _TYPES[type(value)](writer, f"{tiny.architecture}.{key}", value)
    n_vocab = _tokenizer(writer, tiny)
    writer.add_chat_template(tiny.template)

    def add(name: str, weights: np.ndarray) -> None:
        writer.add_tensor(name, weights.astype(np.float32))

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        add(f"{name}.weight", rng.standard_normal((rows, columns)) * scale / columns**0.5)

    def vector(name: str, n: int, mean: float = 1.0, spread: float = 0.3) -> None:
        add(name, mean + spread * rng.standard_normal(n))

    matrix("token_embd", n_vocab, D_MODEL, tiny.embedding * D_MODEL**0.5)
    if not tiny.tied:
        matrix("output", n_vocab, D_MODEL, 3.0)
    vector("output_norm.weight", D_MODEL, tiny.output_norm)
    for name in tiny.rope_factors:
        add(f"{name}.weight", 1 + 5 * rng.random(tiny.rope_dim // 2))
    widths = {"q": N_HEAD * HEAD_DIM, "k": N_HEAD_KV * HEAD_DIM, "v": N_HEAD_KV * HEAD_DIM}
    for i in range(tiny.layers):
        layer = f"blk.{i}."
        vector(f"{layer}attn_norm.weight", D_MODEL)
        vector(f"{layer}ffn_norm.weight", D_MODEL)
        # large queries and keys: attention looks at single tokens, so that what it sees matters
        if tiny.fused:
            matrix(f"{layer}attn_qkv", sum(widths.values()), D_MODEL, 1.3)
        else:
            for name, width in widths.items():
                matrix(f"{layer}attn_{name}", width, D_MODEL, 1.0 if name == "v" else 1.4)
                if tiny.biases:
                    vector(f"{layer}attn_{name}.bias", width, 0.0, 1.0)
        matrix(f"{layer}attn_output", D_MODEL, N_HEAD * HEAD_DIM)
        if tiny.qk_norms:
            vector(f"{layer}attn_q_norm.weight", HEAD_DIM, 1.3)
            vector(f"{layer}attn_k_norm.weight", HEAD_DIM, 1.3)
        if tiny.post_norms:
            vector(f"{layer}post_attention_norm.weight", D_MODEL, 1.0, 0.6)
            vector(f"{layer}post_ffw_norm.weight", D_MODEL, 1.0, 0.6)
        if tiny.experts:
            matrix(f"{layer}ffn_gate_inp", tiny.experts, D_MODEL, 2.0)
            for name in ("gate", "up", "down"):
                add(
                    f"{layer}ffn_{name}_exps.weight",
                    rng.standard_normal((tiny.experts, D_MODEL, D_MODEL)) / D_MODEL**0.5,
                )
            continue
        if tiny.fused:
            matrix(f"{layer}ffn_up", 2 * d_ff, D_MODEL)
        else:
            matrix(f"{layer}ffn_gate", d_ff, D_MODEL)
            matrix(f"{layer}ffn_up", d_ff, D_MODEL)
        matrix(f"{layer}ffn_down", D_MODEL, d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(source: Path, kind: str) -> Path:
    """`source` in another quantization, made by llama.cpp as users' files are."""
    import llama_cpp

    path = source.with_name(f"{source.stem}-{kind}.gguf")
    if not path.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        params.nthread = 1
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
        assert code == 0
    return path


def _tokenizer(writer: GGUFWriter, tiny: Tiny) -> int:
    special = list(dict.fromkeys(tiny.special))
    words = ["the", "ing", "and", "you", "is", "er", "on", "at", "th", "in"]
    if tiny.pre:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tiny.pre)
        tokens = [*byte_tokens(), "Ġt", "he", "Ġthe", "in", "Ġa", *special]
        kinds = [TokenType.NORMAL] * (len(tokens) - len(special))
        writer.add_token_merges(["Ġ t", "h e", "Ġt he", "i n", "Ġ a"])
    else:
        writer.add_tokenizer_model("llama")
        pieces = ["▁", *map(chr, range(33, 127)), "\n", *words, *(f"▁{w}" for w in words)]
        tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *special]
        kinds = [TokenType.UNKNOWN, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * len(pieces)]
        # longer pieces win, as they do in a trained model
        scores = [0.0] * 257 + [float(len(p) - 20) for p in pieces] + [0.0] * len(special)
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(tiny.space_prefix)
        writer.add_unk_token_id(0)
    writer.add_token_list(tokens)
    writer.add_token_types([*kinds, *[TokenType.CONTROL] * len(special)])
    writer.add_bos_token_id(tokens.index(tiny.special[0]))
    writer.add_eos_token_id(tokens.index(tiny.special[1]))
    writer.add_add_bos_token(True)
    return len(tokens)
