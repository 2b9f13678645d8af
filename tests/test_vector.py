"""Control vectors: made from a manifesto, put on a live model, taken off without a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused, run, tiny_model
from gguf import GGUFReader, GGUFWriter
from test_architectures import distance
from test_attach import logits
from tiny import TINY, build

import superego
from superego.adapter import write_out
from superego.base import BaseModel, open_base
from superego.bundled import bundled
from superego.control_vector import read_vector, write_vector
from superego.converters.compile import Settings
from superego.converters.references import BLOCKS
from superego.converters.streams import Conversation, Pack
from superego.converters.transformer import Base
from superego.converters.vector import make_vector, steered
from superego.dialogue import encode
from superego.errors import SuperegoError
from superego.logits import ParallelContext
from superego.persona import read_persona
from superego.replay import Variant, divergences, replies
from superego.runtime import load, stop_tokens
from superego.template import ChatTemplate


@pytest.fixture(scope="session")
def made(
    smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory, pirate: Path
) -> tuple[Path, dict[str, Any]]:
    """The pirate's vector; after its adapter, whose references are in the cache then."""
    path = tmp_path_factory.mktemp("vector") / "pirate-vector.gguf"
    report = make_vector(
        bundled()["pirate"], smollm2, path, Settings.for_effort("quick", speed="slow")
    )
    return path, report


def random_vector(path: Path, base: BaseModel, size: float = 0.3, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    width = base.header.metadata[f"{base.architecture}.embedding_length"]
    n_layer = base.header.metadata[f"{base.architecture}.block_count"]
    directions = {i: size * rng.standard_normal(width) for i in range(1, n_layer)}
    write_vector(path, base.architecture, directions, {"general.name": "random"})
    return path


def test_the_file_is_laid_out_as_llama_cpps_loader_reads_it(
    made: tuple[Path, dict[str, Any]], smollm2: BaseModel
) -> None:
    """common_control_vector_load: direction.N from 1 on, one-dimensional F32; nothing else."""
    reader = GGUFReader(made[0])
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 29
    assert [t.name for t in reader.tensors] == [f"direction.{i}" for i in range(1, 30)]
    assert all(t.data.dtype == np.float32 and t.data.shape == (576,) for t in reader.tensors)
    own = read_vector(made[0]).own
    assert own["manifesto"] == bundled()["pirate"].body
    assert own["base.fingerprint"] == smollm2.fingerprint


def test_it_recovers_some_of_the_manifesto_and_uses_compiles_references(
    made: tuple[Path, dict[str, Any]], smollm2: BaseModel, llm: Any
) -> None:
    path, report = made
    assert report["references from cache"] == report["references"] == BLOCKS[0]
    by_scale = report["kl recovered by scale"]
    assert report["kl recovered on unseen references"] == pytest.approx(
        max(by_scale.values()), abs=1e-3
    )
    template, vector = ChatTemplate(smollm2.header), read_persona(path)
    prompts = ["What should I have for lunch?", "Why is the sky blue?", "Tell me about trees."]
    teacher = encode(llm, template, bundled()["pirate"].body, prompts)
    student = encode(llm, template, None, prompts)
    front = Variant(teacher.prefix, (0.0,))
    said = replies(llm, front, [vector], teacher.rest, 24, stop_tokens(llm))
    bare, steered_kl = divergences(
        llm,
        front,
        [Variant(student.prefix, (0.0,)), Variant(student.prefix, (1.0,))],
        [vector],
        list(zip(teacher.rest, said, strict=True)),
    ).mean(axis=1)
    assert 0.25 < 1 - steered_kl / bare < 0.8
    assert path.stat().st_size < 100_000


def test_after_detach_the_logits_are_the_bases_bit_for_bit(
    llm: Any, made: tuple[Path, dict[str, Any]], pirate: Path
) -> None:
    bare = logits(llm)
    with superego.attach(llm, made[0]) as attachment:
        full = logits(llm)
        attachment.set_scale(0.5)
        half = logits(llm)
        attachment.set_scale(0.0)
        off = logits(llm)
        with superego.attach(llm, made[0], 0.5), superego.attach(llm, made[0], 0.5):
            twice = logits(llm)
        with superego.attach(llm, pirate, 0.5):
            attachment.set_scale(1.0)
            both = logits(llm)
    assert np.array_equal(bare, logits(llm))
    assert np.array_equal(bare, off)
    assert np.array_equal(full, twice)
    assert distance(bare, full) > distance(bare, half) > 0.01
    assert distance(full, both) > 0.01
    superego.attach(llm, made[0])
    with superego.swap(llm, pirate):
        swapped = logits(llm)
    with superego.attach(llm, pirate):
        assert np.array_equal(swapped, logits(llm))
    assert np.array_equal(bare, logits(llm))


def test_layers_that_a_vector_lacks_keep_nothing_of_the_one_before(tmp_path: Path) -> None:
    """llama.cpp leaves what is beyond the data as it was: all layers are given, always."""
    model = open_base(str(build(tmp_path / "base.gguf", TINY["llama"])))
    live = load(model, n_ctx=256)
    whole = random_vector(tmp_path / "whole.gguf", model)
    write_vector(tmp_path / "first.gguf", "llama", {1: read_vector(whole).directions[1]}, {})
    with superego.attach(live, tmp_path / "first.gguf"):
        first = logits(live)
    with superego.attach(live, whole):
        assert not np.array_equal(first, logits(live))
    with superego.attach(live, tmp_path / "first.gguf"):
        assert np.array_equal(first, logits(live))


@pytest.mark.parametrize("name", TINY)
def test_the_walk_adds_it_where_llama_cpp_does(name: str, tmp_path: Path) -> None:
    """Every layer, every row, no earlier and no later: logits of both on one float32 file."""
    model = open_base(str(build(tmp_path / "base.gguf", TINY[name])))
    base = Base(model.header, torch.float32, resident=False)
    vector = read_vector(random_vector(tmp_path / "v.gguf", model))
    tokens = np.random.default_rng(3).integers(3, base.shape.n_vocab - 6, 40).tolist()
    pack = Pack([Conversation(tokens[5:6], [*tokens[6:], 0])], tokens[:5])
    llm = load(model, n_ctx=256)

    def walked(shift: int) -> np.ndarray:
        directions = {i + shift: torch.from_numpy(d) for i, d in vector.directions.items()}
        with torch.no_grad():
            return base.logits(steered(base, pack, directions, 0.5)).numpy()

    with ParallelContext(llm, tokens[:5], 1, 40, [(vector, 0.5)]) as context:
        there = context.read([tokens[5:]], [0])[0]
        context.set_scales([0.0])
        bare = context.read([tokens[5:]], [0])[0]
    assert distance(there, walked(0)) < 0.01
    assert distance(there, walked(-1)) > 0.02
    assert distance(there, bare) > 0.05


def test_the_commands_take_it(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = str(made[0])
    info = json.loads(run("inspect", path, "--base", "smollm2", "--json").stdout)
    assert (info["fits"], info["made from this file"], info["layers"]) == (True, True, 29)
    talk = ("chat", "--base", "smollm2", "--message", "Who are you?", "--max-tokens", "12")
    bare, half = run(*talk).stdout, run(*talk, "--persona", f"{path}:0.5").stdout
    full = run(*talk, "--persona", path).stdout
    assert len({bare, half, full}) == 3
    for command in (("merge",), ("export", "llama-server"), ("export", "peft")):
        line = refused(*command, path, "--base", "smollm2", "-o", str(tmp_path / "out.gguf"))
        assert "is a control vector, and this takes LoRA adapters" in line
    assert not (tmp_path / "out.gguf").exists()


def test_the_same_inputs_give_the_same_file_and_it_can_be_evaluated(tmp_path: Path) -> None:
    tiny = tiny_model(tmp_path / "tiny.gguf", context_length=1024)
    for name in ("a", "b"):
        done = run(
            "vector", "terse", "--base", str(tiny), "-o", str(tmp_path / f"{name}.gguf"),
            "--scale", "0.5", "--json",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["scale"] == 0.5
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    (tmp_path / "p.txt").write_text("Why is the sky blue?\nHello\n")
    prompts = ("--prompts", str(tmp_path / "p.txt"))
    done = run("evaluate", str(tmp_path / "a.gguf"), "--base", str(tiny), *prompts, "--json")
    report = json.loads(done.stdout)
    assert report["prompts"] == 2
    assert report["kl_adapter"] != report["kl_base"]


# Bad input


def raw(path: Path, tensors: dict[str, np.ndarray], architecture: str = "controlvector") -> Path:
    writer = GGUFWriter(path, architecture)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    write_out(writer, path)
    return path


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "holds no direction.<layer> tensors"),
        ({"direction.0": np.ones(64, np.float32)}, "'direction.0' is not direction.<layer>"),
        ({"direction.x": np.ones(64, np.float32)}, "'direction.x' is not direction.<layer>"),
        ({"direction.1": np.ones(64, np.float16)}, "is F16 (64,), expected"),
        ({"direction.1": np.ones((2, 64), np.float32)}, "is F32 (2, 64), expected"),
        ({"direction.1": np.full(64, np.nan, np.float32)}, "not finite"),
        (
            {"direction.1": np.ones(64, np.float32), "direction.2": np.ones(32, np.float32)},
            "has 32 values, another has 64",
        ),
        ({"direction.1": np.ones(32, np.float32)}, "32 values, the base's streams 64"),
        ({"direction.7": np.ones(64, np.float32)}, "of 8 layers or more, the base has 2"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_before_llama_cpp(
    tensors: dict[str, np.ndarray], said: str, tmp_path: Path
) -> None:
    path = raw(tmp_path / "v.gguf", tensors)
    base = tiny_model(tmp_path / "base.gguf")
    line = refused("chat", "--base", str(base), "--persona", str(path), "--message", "Hi")
    assert said in line


def test_misuse_of_the_command_is_refused(tmp_path: Path) -> None:
    base, out = str(tiny_model(tmp_path / "base.gguf")), str(tmp_path / "v.gguf")
    command = ("vector", "terse", "--base", base, "-o", out)
    assert "is not 0" in refused(*command, "--scale", "0")
    assert "is not 0" in refused(*command, "--scale", "nan")
    assert "no such file" in refused("vector", "nobody.md", *command[2:])
    assert "exceeds the model's context" in refused("vector", "steward", *command[2:])
    other = str(tiny_model(tmp_path / "other.gguf", "stablelm"))
    line = refused("vector", "terse", "--base", other, "-o", out)
    assert "not supported by compile" in line
    assert not Path(out).exists()
    with pytest.raises(SuperegoError, match="not a control vector"):
        read_vector(Path(base))
