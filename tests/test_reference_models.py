"""The walk beside transformers' own model code, which shares nothing with llama.cpp or with us.

The same float32 weights, put under transformers' names here, with configurations written here
from the models' cards: a metadata key that we and llama.cpp read wrongly together would show.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_architectures import distance
from tiny import D_FF, D_MODEL, HEAD_DIM, N_HEAD, N_HEAD_KV, TINY, build

from superego.base import open_base
from superego.converters.streams import Conversation, Pack, predictions
from superego.converters.transformer import Base, pairs_to_halves

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

# What the file's metadata says, as each model's own configuration says it.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {"rope_theta": 500000.0},  # its rope factors are put in below
    ),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen2": ("Qwen2", {"rope_theta": 1000000.0}),
    "qwen3": ("Qwen3", {"rope_theta": 1000000.0}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": D_MODEL,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": HEAD_DIM,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": 24,
            "rope_theta": 1000000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": HEAD_DIM,
        },
    ),
    "phi3": (
        "Phi3",
        {
            "tie_word_embeddings": False,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 8192,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
            "pad_token_id": 0,
        },
    ),
    "smollm3": ("SmolLM3", {"rope_theta": 5000000.0, "pad_token_id": 0}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.03,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "logits_scaling": 1.7,
        },
    ),
}
RENAMED = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
GEMMAS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: build(folder / f"{name}.gguf", TINY[name]))


def weights(base: Base, name: str) -> dict[str, torch.Tensor]:
    """The file's tensors under transformers' names, in transformers' layout."""
    gemma = name.startswith("gemma")
    names = {**RENAMED, **(GEMMAS if gemma else {})}
    if name == "phi3":
        names["ffn_up"] = "mlp.gate_up_proj"
    found = {}
    for tensor in base.weights:
        values = base.weights.vector(tensor)
        if gemma and "norm" in tensor:
            values = values - 1  # converters store the whole factor
        if tensor == "token_embd.weight":
            found["model.embed_tokens.weight"] = values
        elif tensor == "output.weight":
            found["lm_head.weight"] = values
        elif tensor == "output_norm.weight":
            found["model.norm.weight"] = values
        elif tensor.startswith("blk."):
            _, index, matrix, kind = tensor.split(".")
            layer = f"model.layers.{index}."
            if matrix.endswith("_exps"):
                for expert, own in enumerate(values):
                    part = matrix.removeprefix("ffn_").removesuffix("_exps")
                    found[f"{layer}mlp.experts.{expert}.{part}_proj.weight"] = own
                continue
            if base.shape.rope_pairs and matrix in ("attn_q", "attn_k"):
                values = pairs_to_halves(values, HEAD_DIM)
            found[f"{layer}{names[matrix]}.{kind}"] = values
    if "lm_head.weight" not in found:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def checkpoint(name: str, base: Base) -> Any:
    """transformers' model of the same weights, in float32."""
    family, own = CONFIGURATIONS[name]
    family = {"Gemma3": "Gemma3Text"}.get(family, family)
    if name == "phi3":  # magnitude as the file has it
        factors = {
            kind: base.weights.vector(f"rope_factors_{kind}.weight").tolist()
            for kind in ("long", "short")
        }
        own = {
            **own,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": factors["long"],
                "short_factor": factors["short"],
            },
        }
    config = getattr(transformers, f"{family}Config")(
        vocab_size=base.shape.n_vocab,
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=TINY[name].layers,
        num_attention_heads=N_HEAD,
        num_key_value_heads=N_HEAD_KV,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
        **{"tie_word_embeddings": True, "max_position_embeddings": 2048, **own},
    )
    if name == "phi3":
        config.rope_scaling["attention_factor"] = 1.19
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
        missing, unexpected = theirs.load_state_dict(weights(base, name), strict=False)
        assert not unexpected
        assert not missing
        if name == "llama":
            theirs.model.rotary_emb.inv_freq /= base.weights.vector("rope_freqs.weight")
    return theirs


@pytest.mark.parametrize("name", TINY)
def test_the_walk_gives_the_logits_of_transformers(
    source: Callable[[str], Path], name: str
) -> None:
    model = open_base(str(source(name)))
    base = Base(model.header, torch.float32, resident=False)
    theirs = checkpoint(name, base)
    with torch.no_grad():
        tokens = np.random.default_rng(3).integers(3, base.shape.n_vocab - 6, 60).tolist()
        wanted = theirs(torch.tensor([tokens])).logits[0].numpy()[5:]
        pack = Pack([Conversation(tokens[5:6], [*tokens[6:], 0])], tokens[:5])
        ours = base.logits(predictions(base, pack)).numpy()
    assert distance(wanted, ours) < 1e-4
