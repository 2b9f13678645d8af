"""PEFT folders: the same adapter in transformers + peft and in llama.cpp, there and back."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp_source
import numpy as np
import pytest
import torch
from conftest import refused, requantized, run, tiny_model
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file
from test_architectures import distance
from test_reference_models import checkpoint, weights
from tiny import TINY, build

import superego
from superego.adapter import Adapter, read_adapter, write_adapter
from superego.base import BaseModel, open_base
from superego.converters.transformer import Base
from superego.logits import ParallelContext
from superego.peft_export import export_peft
from superego.peft_import import import_peft
from superego.runtime import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

CLOSE = 0.01  # what llama.cpp's 16-bit keys and values leave, as in test_architectures
# with ranks and alphas of their own where the modules are plain
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"o_proj": 12, r"layers\.1\.mlp\.down_proj": 3},
    "alpha_pattern": {"down_proj": 40, r"model.layers.0.self_attn.o_proj": 5},
}
TOKENS = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: build(folder / f"{name}.gguf", TINY[name]))


def in_llama_cpp(model: BaseModel, tokens: list[int], adapter: Adapter | None) -> np.ndarray:
    adapters = [(adapter, 1.0)] if adapter else []
    llm = load(model, n_ctx=256)
    with ParallelContext(llm, tokens[:1], 1, len(tokens), adapters) as context:
        return context.read([tokens[1:]], [0])[0]


def in_transformers(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, 1:].float().numpy()


def loaded(model: Any, folder: Path) -> Any:
    """`folder` on a model, without a word about keys that are missing or too many."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, str(folder))


def trained(model: Any, folder: Path, **settings: Any) -> Any:
    """peft's own LoRA of every linear module, random, on a model; saved into `folder`."""
    kinds = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "expert" not in name
    }
    if model.config.tie_word_embeddings:
        kinds -= {"lm_head"}
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=8,
        lora_alpha=24,
        target_modules=sorted(kinds),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, config).eval()
        made.save_pretrained(str(folder))
    return made


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: t.data for t in GGUFReader(path).tensors}


def metadata(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}


@pytest.mark.parametrize("name", TINY)
def test_an_adapter_does_the_same_in_peft_and_in_llama_cpp(
    source: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    """Every matrix of every architecture, with ranks, alphas and rsLoRA: in, and out again."""
    model = open_base(str(source(name)))
    base = Base(model.header, torch.float32, resident=False)
    theirs = checkpoint(name, base)
    tokens = np.random.default_rng(5).integers(3, base.shape.n_vocab - 6, TOKENS).tolist()
    bare = in_transformers(theirs, tokens)
    made = trained(theirs, tmp_path / "made", use_rslora=name in ("llama", "phi3"), **PATTERNS)
    wanted = in_transformers(made, tokens)
    assert distance(wanted, bare) > 0.1
    import_peft(tmp_path / "made", model, tmp_path / "in.gguf", "F32")
    adapter = read_adapter(tmp_path / "in.gguf")
    assert len({a.shape[0] for a, _ in adapter.pairs.values()}) > 1
    assert distance(wanted, in_llama_cpp(model, tokens, adapter)) < CLOSE

    for one_rank in (True, False):
        folder = tmp_path / f"out-{one_rank}"
        export_peft(adapter, model, folder, one_rank)
        again = loaded(checkpoint(name, base), folder)
        assert distance(wanted, in_transformers(again, tokens)) < 1e-5
        import_peft(folder, model, tmp_path / "again.gguf", "F32")
        before, after = tensors(tmp_path / "in.gguf"), tensors(tmp_path / "again.gguf")
        assert before.keys() == after.keys()
        for key, matrix in before.items():
            np.testing.assert_allclose(after[key], matrix, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def halves(smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The real model's weights in F16, so that llama.cpp does not round activations."""
    return open_base(str(requantized(smollm2, tmp_path_factory.mktemp("f16") / "f16.gguf", 1)))


@pytest.fixture(scope="module")
def smollm2_checkpoint(halves: BaseModel) -> Any:
    """transformers' SmolLM2 with the weights of `halves`."""
    base = Base(halves.header, torch.float32, resident=False)
    shape = base.shape
    config = transformers.LlamaConfig(
        vocab_size=shape.n_vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_head_kv,
        rms_norm_eps=shape.rms_eps,
        rope_theta=shape.rope_base,
        max_position_embeddings=shape.context_length,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    found = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = found.load_state_dict(weights(base, "smollm2"), strict=False)
    assert not missing
    assert not unexpected
    return found


def test_the_pirate_speaks_alike_in_peft_and_in_llama_cpp(
    halves: BaseModel, smollm2_checkpoint: Any, pirate: Path, tmp_path: Path, llm: Any
) -> None:
    adapter = read_adapter(pirate)
    text = b"<|im_start|>user\nWhat should I have for lunch?<|im_end|>\n<|im_start|>assistant\n"
    tokens = llm.tokenize(text, add_bos=False, special=True)
    bare = in_transformers(smollm2_checkpoint, tokens)
    wanted = in_llama_cpp(halves, tokens, adapter)
    export_peft(adapter, halves, tmp_path / "folder")
    persona = loaded(smollm2_checkpoint, tmp_path / "folder")
    found = in_transformers(persona, tokens)
    persona.unload()
    assert distance(wanted, bare) > 0.2
    assert distance(wanted, found) < CLOSE


@pytest.mark.parametrize("ranks", ["one", "own"])
def test_there_and_back_is_the_same_file_bit_for_bit(
    pirate: Path, tmp_path: Path, ranks: str
) -> None:
    folder, back = tmp_path / "folder", tmp_path / "back.gguf"
    done = run(
        "export", "peft", str(pirate), "--base", "smollm2", "-o", str(folder), "--ranks", ranks
    )
    assert done.exit_code == 0, done.output
    done = run("import", "peft", str(folder), "--base", "smollm2", "-o", str(back), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["manifesto"] is True
    before, after = tensors(pirate), tensors(back)
    assert before.keys() == after.keys()
    for name, matrix in before.items():
        assert matrix.dtype == after[name].dtype == np.float16
        assert np.array_equal(matrix.view(np.uint16), after[name].view(np.uint16)), name
    assert metadata(pirate) == metadata(back)
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {
        m.shape[0] for n, m in load_file(folder / "adapter_model.safetensors").items() if "A" in n
    }
    assert (found == {config["r"]}) == (ranks == "one")
    assert bool(config["rank_pattern"]) == (ranks == "own")


def test_parity_sees_a_wrong_order_of_rows(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same comparison fails where Q and K stay as GGUF has them."""
    model = open_base(str(source("llama")))
    base = Base(model.header, torch.float32, resident=False)
    rng = np.random.default_rng(2)
    pairs = {
        f"blk.{i}.attn_{name}.weight": (
            rng.random((4, 256)) - 0.5,
            0.5 * rng.random((width, 4)) - 0.25,
        )
        for i in range(4)
        for name, width in (("q", 256), ("k", 128))
    }
    write_adapter(tmp_path / "a.gguf", "llama", pairs, {})
    adapter = read_adapter(tmp_path / "a.gguf")
    tokens = rng.integers(3, base.shape.n_vocab - 6, TOKENS).tolist()
    wanted = in_llama_cpp(model, tokens, adapter)

    def apart(folder: Path) -> float:
        export_peft(adapter, model, folder)
        return distance(wanted, in_transformers(loaded(checkpoint("llama", base), folder), tokens))

    assert apart(tmp_path / "right") < CLOSE
    monkeypatch.setattr("superego.peft_names._permuted", lambda base, tensor: 0)
    assert apart(tmp_path / "wrong") > 10 * CLOSE


def test_a_scale_is_folded_into_the_fit_and_not_into_the_slot(
    pirate: Path, tmp_path: Path, llm: Any, smollm2: BaseModel
) -> None:
    text = llm.tokenize(b"<|im_start|>user\nWho are you?<|im_end|>\n", special=True, add_bos=False)
    with superego.attach(llm, pirate, 0.5):
        wanted = last_logits(llm, text)
    folder, back = tmp_path / "half", tmp_path / "half.gguf"
    run("export", "peft", f"{pirate}:0.5", "--base", "smollm2", "-o", str(folder))
    import_peft(folder, smollm2, back)
    with superego.attach(llm, back):
        found = last_logits(llm, text)
    with superego.attach(llm, pirate):
        whole = last_logits(llm, text)
    # 8-bit activations: two adapters are not rounded as one is
    assert distance(wanted, found) < 0.05
    assert distance(wanted, whole) > 0.15


def last_logits(llm: Any, tokens: list[int]) -> np.ndarray:
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval(tokens)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


@pytest.mark.skipif(
    not llama_cpp_source.archive().is_file(),
    reason="needs llama-cpp-python's source archive; benchmarks/llama_cpp_convert.py fetches it",
)
def test_llama_cpps_own_converter_writes_the_same_bits(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    """One PEFT folder a architecture through both; theirs reads neither patterns nor rsLoRA."""
    for name, found in converted(source, tmp_path).items():
        assert found.theirs.keys() == found.ours.keys(), name
        for key, matrix in found.theirs.items():
            assert np.array_equal(matrix, found.ours[key]), (name, key)
        assert found.alpha == (24.0, 24.0)


@dataclass(frozen=True)
class Converted:
    """One PEFT folder's tensors in float32, by llama.cpp's converter and by ours."""

    theirs: dict[str, np.ndarray]
    ours: dict[str, np.ndarray]
    alpha: tuple[float, float]


def converted(source: Callable[[str], Path], folder: Path) -> dict[str, Converted]:
    """Both conversions for every architecture; needs the archive."""
    script = llama_cpp_source.unpack(folder / "llama.cpp")
    jobs, models = {}, {}
    for name in TINY:
        models[name] = open_base(str(source(name)))
        model = checkpoint(name, Base(models[name].header, torch.float32, resident=False))
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(str(folder / name / "base"))
        trained(model, folder / name / "peft")
        jobs[name] = (folder / name / "base", folder / name / "peft", folder / f"{name}.gguf")
    llama_cpp_source.convert(script, list(jobs.values()))
    found = {}
    for name, (_, lora, theirs) in jobs.items():
        ours = folder / f"{name}-ours.gguf"
        import_peft(lora, models[name], ours, "F32")
        alpha = read_adapter(theirs).alpha, read_adapter(ours).alpha
        found[name] = Converted(tensors(theirs), tensors(ours), alpha)
    return found


# Bad input


def folder_of(
    path: Path,
    base: BaseModel,
    config: dict[str, Any] | None = None,
    changed: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """A folder that peft might have saved for the tiny model, with something changed."""
    path.mkdir(parents=True)
    r, width = 4, base.header.tensors["blk.0.ffn_down.weight"].shape
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    found: dict[str, np.ndarray | None] = {
        f"{stem}.lora_A.weight": np.ones((r, width[1]), np.float32),
        f"{stem}.lora_B.weight": np.ones((width[0], r), np.float32),
        **(changed or {}),
    }
    save_file({k: v for k, v in found.items() if v is not None}, path / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": ["down_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**whole, **(config or {})}))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return open_base(str(tiny_model(tmp_path_factory.mktemp("tiny") / "base.gguf")))


DOWN = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
HEAD = "base_model.model.lm_head.lora_{}.weight"


@pytest.mark.parametrize(
    ("config", "changed", "said"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'; a GGUF adapter can only hold LORA"),
        ({"peft_type": None}, {}, "peft_type is None"),
        ({"use_dora": True}, {}, "use_dora (DoRA scales each output"),
        ({"modules_to_save": ["embed_tokens"]}, {}, "modules_to_save (whole modules"),
        ({"trainable_token_indices": [5]}, {}, "trainable_token_indices"),
        ({"bias": "lora_only"}, {}, "bias 'lora_only'"),
        ({"lora_bias": True}, {}, "lora_bias"),
        ({"layers_pattern": "h"}, {}, "layers_pattern"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
        ({"use_qalora": True}, {}, "use_qalora"),
        ({"use_later": True}, {}, "use_later (a variant that is not known here)"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "path_initial_model_for_weight_conversion"),
        ({"r": 0}, {}, "r is 0, expected a positive whole number"),
        ({"r": 8}, {}, "lora_A has rank 4, lora_B 4, the configuration 8"),
        ({"lora_alpha": 0}, {}, "lora_alpha is 0, expected a number that is not 0"),
        ({"lora_alpha": "8"}, {}, "lora_alpha is '8'"),
        ({"rank_pattern": [1]}, {}, "rank_pattern is [1]"),
        ({"rank_pattern": {"down_proj": 2}}, {}, "the configuration 2"),
        ({"alpha_pattern": {"(": 2}}, {}, "no regular expression"),
        ({"alora_invocation_tokens": [-1]}, {}, "alora_invocation_tokens"),
        ({}, {DOWN.format("A"): None}, "has only one of lora_A and lora_B"),
        ({}, {DOWN.format("A"): np.ones((4, 7), np.float32)}, "(64, 7), the base's"),
        ({}, {DOWN.format("A"): np.ones(4, np.float32)}, "expected matrices"),
        ({}, {DOWN.format("A"): np.full((4, 128), np.nan, np.float32)}, "not finite"),
        ({}, {DOWN.format("A"): np.ones((4, 128), np.int8)}, "has type I8, expected F32"),
        ({}, {DOWN.format("B"): np.full((64, 4), 1e6, np.float32)}, "overflows float16"),
        (
            {},
            {DOWN.format(s): np.ones((1, 1), np.float32) for s in "AB"},
            "lora_A has rank 1, lora_B 1, the configuration 4",
        ),
        (
            {},
            {
                DOWN.format("A"): np.zeros((4, 128), np.float32),
                DOWN.format("B"): np.zeros((64, 4), np.float32),
            },
            "holds no LoRA tensors that are not zero",
        ),
        (
            {},
            {HEAD.format(s): np.ones((4, 4), np.float32) for s in "AB"},
            "lm_head: the base's output is its embedding",
        ),
        (
            {},
            {
                DOWN.format(s).replace("0.mlp.down", "7.mlp.up"): np.ones((4, 4), np.float32)
                for s in "AB"
            },
            "the base has no blk.7.ffn_up.weight",
        ),
        (
            {},
            {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 4), np.float32)},
            "an embedding; a GGUF adapter cannot carry one",
        ),
        (
            {},
            {DOWN.format("A").replace("A.weight", "magnitude_vector"): np.ones(64, np.float32)},
            "DoRA",
        ),
        ({}, {"base_model.model.score.weight": np.ones(3, np.float32)}, "score.weight: neither"),
        (
            {},
            {
                DOWN.format(s).replace("model.model.layers.0", "model.vision.layers.0"): np.ones(
                    (4, 4), np.float32
                )
                for s in "AB"
            },
            "vision.layers.0.mlp.down_proj: no module of architecture 'llama'",
        ),
    ],
)
def test_what_gguf_cannot_carry_is_refused_by_name(
    tiny: BaseModel,
    tmp_path: Path,
    config: dict[str, Any],
    changed: dict[str, np.ndarray | None],
    said: str,
) -> None:
    folder = folder_of(tmp_path / "peft", tiny, config, changed)
    output = tmp_path / "out.gguf"
    line = refused("import", "peft", str(folder), "--base", str(tiny.path), "-o", str(output))
    assert said in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft"]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), "expected a JSON object"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.saf"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 5),
            "not a whole safetensors file",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (f / "adapter_model.safetensors").read_bytes()[:-9]
            ),
            "not a whole safetensors file",
        ),
    ],
)
def test_broken_folders_are_refused(
    tiny: BaseModel, tmp_path: Path, break_it: Callable[[Path], Any], said: str
) -> None:
    folder = folder_of(tmp_path / "peft", tiny)
    break_it(folder)
    output = tmp_path / "out.gguf"
    assert said in refused(
        "import", "peft", str(folder), "--base", str(tiny.path), "-o", str(output)
    )
    assert not output.exists()


def test_a_pickle_is_refused_and_never_run(tiny: BaseModel, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "peft", tiny)
    (folder / "adapter_model.safetensors").unlink()
    mark = tmp_path / "run"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    output = str(tmp_path / "o.gguf")
    line = refused("import", "peft", str(folder), "--base", str(tiny.path), "-o", output)
    assert "is a pickle" in line
    assert not mark.exists()


def test_a_folder_for_another_base_lists_what_does_not_fit(pirate: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    run("export", "peft", str(pirate), "--base", "smollm2", "-o", str(folder))
    other = tiny_model(tmp_path / "tiny.gguf")
    output = str(tmp_path / "o.gguf")
    line = refused("import", "peft", str(folder), "--base", str(other), "-o", output)
    assert "(576, 1536), the base's blk.0.ffn_down.weight has (64, 128)" in line
    assert "more" in line


def test_what_has_no_module_is_not_exported(tmp_path: Path, tiny: BaseModel) -> None:
    path, folder = tmp_path / "a.gguf", tmp_path / "folder"
    pair = np.ones((2, 64)), np.ones((64, 2))
    write_adapter(path, "llama", {"blk.0.attn_output.weight": pair}, {})
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    arguments = ("export", "peft", str(path), "--base", str(tiny.path), "-o", str(folder))
    assert "exists and is not an empty folder" in refused(*arguments)
    assert "there is nothing to export" in refused(*arguments[:2], f"{path}:0", *arguments[3:])
    other = tiny_model(tmp_path / "other.gguf", "stablelm")
    write_adapter(path, "stablelm", {"blk.0.attn_output.weight": pair}, {})
    line = refused("export", "peft", str(path), "--base", str(other), "-o", str(tmp_path / "f"))
    assert "the Hugging Face names of architecture 'stablelm' are not known" in line
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]
    assert not (tmp_path / "f").exists()


def test_an_imported_adapter_takes_a_manifesto_and_is_used(tiny: BaseModel, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "my-lora", tiny, {"alora_invocation_tokens": [1, 2]})
    plain, whole = tmp_path / "plain.gguf", tmp_path / "whole.gguf"
    base = ("--base", str(tiny.path))
    assert run("import", "peft", str(folder), *base, "-o", str(plain)).exit_code == 0
    assert "superego import" in refused("evaluate", str(plain), *base)
    (tmp_path / "calm.md").write_text("You answer calmly.")
    done = run(
        "import", "peft", str(folder), *base, "-o", str(whole), "--manifesto",
        str(tmp_path / "calm.md"),
    )  # fmt: skip
    assert done.exit_code == 0
    info = json.loads(run("inspect", str(whole), *base, "--json").stdout)
    assert info["fits"]
    assert info["made from this file"]
    assert info["name"] == "calm"
    assert info["metadata"]["adapter.alora.invocation_tokens"] == [1, 2]
    (tmp_path / "p.txt").write_text("Hello\nWhy?\n")
    done = run("evaluate", str(whole), *base, "--prompts", str(tmp_path / "p.txt"), "--json")
    assert json.loads(done.stdout)["prompts"] == 2
    done = run("chat", *base, "--persona", str(plain), "--message", "Hi", "--max-tokens", "3")
    assert done.exit_code == 0
