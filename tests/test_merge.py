"""Merging: what is written, what is left alone, what survives rounding, what is refused."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import documented, refused, run, tiny_model
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from gguf import quantize as quantize_in_python
from tiny import TINY, build

from superego.adapter import read_adapter, write_adapter
from superego.base import BaseModel, open_base
from superego.converters.ggml_quantize import quantize
from superego.converters.levels import LINEAR, read_grid
from superego.converters.merge import FINER, Plan, merge
from superego.converters.moments import Watch, groups, messages
from superego.converters.rounding import Feedback
from superego.evaluate import bundled
from superego.evaluate_merged import evaluate_merged
from superego.gguf_file import metadata_spans, read_header
from superego.logits import ParallelContext
from superego.runtime import load

Type = GGMLQuantizationType
Pair = tuple[np.ndarray, np.ndarray]
TOUCHED = {
    "blk.0.attn_q.weight": (3, 64, 64),
    "blk.0.attn_output.weight": (4, 64, 64),
    "blk.1.ffn_down.weight": (8, 64, 128),
}


def pairs(seed: int = 0, size: float = 0.05) -> dict[str, Pair]:
    """Low-rank changes of several matrices, each with a rank of its own."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal((r, columns)).astype(np.float16),
            (size * rng.standard_normal((rows, r))).astype(np.float16),
        )
        for name, (r, rows, columns) in TOUCHED.items()
    }


def write(path: Path, changes: Mapping[str, Pair], alpha: float = 0.0) -> Path:
    """An adapter as llama.cpp reads it; alpha 0: the user's scale alone."""
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_name("tester")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_string("superego.manifesto", "Be brief.")
    for name, (a, b) in changes.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base.gguf", kind=Type.Q4_1)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "a.gguf", pairs())


@pytest.mark.parametrize("kind", sorted(LINEAR), ids=lambda kind: kind.name)
def test_levels_and_their_grid_are_the_quantized_rows(kind: Type) -> None:
    rng = np.random.default_rng(0)
    rows = quantize(rng.standard_normal((5, 512)).astype(np.float32), kind)
    grid, pack = read_grid(rows, kind)
    np.testing.assert_allclose(grid.weights(), dequantize(rows, kind), rtol=1e-5, atol=1e-6)
    assert np.array_equal(pack(grid.levels), rows)
    other = rng.integers(grid.low, grid.high + 1, grid.levels.shape)
    np.testing.assert_allclose(
        grid.step * other + grid.offset, dequantize(pack(other), kind), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_1, Type.Q8_0, Type.F16])
def test_the_c_quantizer_is_called_rightly(kind: Type) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    expected = quantize_in_python(rows, kind).view(np.uint8).reshape(7, -1)
    assert np.mean(quantize(rows, kind) == expected) > 0.999  # ties may round either way


def test_feedback_keeps_a_small_change_that_nearest_rounding_loses() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2000, 16)) @ rng.standard_normal((16, 128))
    moments = (inputs.T @ inputs).astype(np.float32)
    rows = quantize(rng.standard_normal((32, 128)).astype(np.float32), Type.Q4_1)
    grid, _ = read_grid(rows, Type.Q4_1)
    change = (0.04 * rng.standard_normal((32, 128))).astype(np.float32)  # an eighth of a step
    feedback = Feedback([moments])
    target = grid.weights() + change
    levels = feedback.round(target, grid, 2)
    assert levels.min() >= grid.low
    assert levels.max() <= grid.high
    nearest = np.clip(np.rint((target - grid.offset) / grid.step), 0, 15)
    before = np.square(change @ inputs.T).sum()
    lost = [
        np.square((target - (grid.step * q + grid.offset)) @ inputs.T).sum() / before
        for q in (nearest, levels)
    ]
    assert lost[0] > 0.9
    assert lost[1] < 0.5


def test_moments_are_those_of_what_the_matrix_reads(tmp_path: Path) -> None:
    """The first layer's attn_q reads normed embeddings, which numpy can compute."""
    path = tiny_model(tmp_path / "base.gguf")
    tensors = weights(path)
    llm = load(open_base(str(path)), n_ctx=256)
    watch = Watch({"blk.0.attn_q.weight": 64})
    prefix, texts = [1, 30, 40], [[50, 60, 70, 80], [90, 100]]
    with ParallelContext(llm, prefix, 2, 8, callback=watch.callback) as context:
        context.read(texts, [3, 1])
        watch.finish()
    x = tensors["token_embd.weight"][[*prefix, *texts[0], *texts[1]]]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * tensors["blk.0.attn_norm.weight"]
    assert watch.rows == {"blk.0.attn_q.weight": 9}
    np.testing.assert_allclose(
        watch.moments["blk.0.attn_q.weight"][0], x.T @ x, rtol=1e-3, atol=0.1
    )
    llm.close()


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (8.0, 0.5)])
def test_a_float_base_gets_exactly_the_change(tmp_path: Path, alpha: float, scale: float) -> None:
    base = tiny_model(tmp_path / "base.gguf", kind=Type.F16)
    path, out = write(tmp_path / "a.gguf", pairs(), alpha), tmp_path / "out.gguf"
    run("merge", f"{path}:{scale}", "--base", str(base), "-o", str(out))
    before, after = weights(base), weights(out)
    for name, (a, b) in pairs().items():
        factor = scale * (alpha / len(a) if alpha else 1.0)
        wanted = before[name] + factor * b.astype(np.float32) @ a.astype(np.float32)
        np.testing.assert_allclose(after[name], wanted, rtol=1e-3, atol=1e-6)  # float16


def test_everything_else_is_copied_byte_for_byte(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    merge(Plan(read_adapter(adapter), 0.5), open_base(str(base)), out)
    old, new = read_header(base), read_header(out)
    raw_old, raw_new = base.read_bytes(), out.read_bytes()
    spans = metadata_spans(new)
    for key, (start, end) in metadata_spans(old).items():
        assert raw_new[slice(*spans[key])] == raw_old[start:end]
    for name, tensor in old.tensors.items():
        other = new.tensors[name]
        assert (other.type, other.shape) == (tensor.type, tensor.shape)
        same = (
            raw_old[tensor.offset : tensor.offset + tensor.n_bytes]
            == raw_new[other.offset : other.offset + other.n_bytes]
        )
        assert same == (name not in TOUCHED)
    assert list(new.tensors) == list(old.tensors)
    said = new.metadata
    assert said["superego.merge.persona"] == "tester"
    assert said["superego.merge.scale"] == 0.5
    assert said["superego.merge.base.fingerprint"] == open_base(str(base)).fingerprint
    assert said["superego.manifesto"] == "Be brief."
    again = tmp_path / "again.gguf"
    merge(Plan(read_adapter(adapter), 1.0), open_base(str(out)), again)
    before = json.loads(read_header(again).metadata["superego.merge.before"])
    assert before["superego.merge.scale"] == 0.5


def test_without_a_change_the_weights_are_the_bases_own(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    merge(Plan(read_adapter(adapter), 0.0), open_base(str(base)), out)
    assert {n: w.tobytes() for n, w in weights(out).items()} == {
        n: w.tobytes() for n, w in weights(base).items()
    }


def test_rounding_with_feedback_loses_less(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    lost = {
        (rounding, keep): merge(
            Plan(read_adapter(adapter), 1.0, keep=keep, rounding=rounding),
            open_base(str(base)),
            out,
        )["rounding error"]
        for rounding in ("nearest", "feedback")
        for keep in (False, True)
    }
    for kind in ("attn_q", "attn_output", "ffn_down"):
        assert lost["feedback", True][kind] < lost["feedback", False][kind]


def test_rows_without_a_change_keep_their_bytes(base: Path, tmp_path: Path) -> None:
    one = np.zeros((128, 1), np.float16)
    one[5] = 1
    name = "blk.0.ffn_up.weight"
    out = tmp_path / "out.gguf"
    path = write(tmp_path / "a.gguf", {name: (np.ones((1, 64), np.float16), one)})
    merge(Plan(read_adapter(path), 1.0), open_base(str(base)), out)
    same = (weights(out)[name] == weights(base)[name]).all(axis=1)
    assert np.flatnonzero(~same).tolist() == [5]


def test_kept_tensors_are_one_step_finer_and_the_cost_is_said(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    said = json.loads(
        run("merge", str(adapter), "--base", str(base), "-o", str(out), "--keep", "--json").stdout
    )
    kinds = {name: tensor.type for name, tensor in read_header(out).tensors.items()}
    assert {name for name, kind in kinds.items() if kind == Type.Q5_1} == set(TOUCHED)
    values = sum(rows * columns for _, rows, columns in TOUCHED.values())
    assert said["kept finer costs bytes"] == values // 32 * 4  # 24 instead of 20 bytes a block
    load(open_base(str(out)), n_ctx=256).close()


def test_every_finer_type_can_be_written() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    for kind in set(FINER.values()):
        assert quantize(rows, kind).size


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "F16"])
def test_other_types_are_llama_cpps_own_mixtures(tmp_path: Path, kind: str) -> None:
    base = tiny_model(tmp_path / "base.gguf", d_model=256, kind=Type.Q8_0)
    rng = np.random.default_rng(0)
    name = "blk.1.ffn_down.weight"
    change = (
        rng.standard_normal((4, 512)).astype(np.float16),
        (0.05 * rng.standard_normal((256, 4))).astype(np.float16),
    )
    path, out = write(tmp_path / "a.gguf", {name: change}), tmp_path / "out.gguf"
    merge(Plan(read_adapter(path), 1.0, kind), open_base(str(base)), out)
    header = read_header(out)
    expected = {"Q4_K_M": Type.Q4_K, "Q8_0": Type.Q8_0, "F16": Type.F16}[kind]
    assert header.tensors["blk.0.ffn_up.weight"].type == expected
    assert header.metadata["general.file_type"] == {"Q4_K_M": 15, "Q8_0": 7, "F16": 1}[kind]
    assert header.metadata["superego.merge.type"] == kind
    wanted = weights(base)[name] + change[1].astype(np.float32) @ change[0].astype(np.float32)
    error = np.abs(weights(out)[name] - wanted).mean() / np.abs(wanted).mean()
    assert error < {"Q4_K_M": 0.15, "Q8_0": 0.01, "F16": 0.001}[kind]
    load(open_base(str(out)), n_ctx=256).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "base.gguf", "out.gguf"]


def test_the_merged_model_speaks_as_base_and_adapter(tmp_path: Path) -> None:
    """On a float base, merged and attached differ by rounding alone, in llama.cpp itself."""
    base = tiny_model(tmp_path / "f.gguf", kind=Type.F16)
    path, out = write(tmp_path / "a.gguf", pairs(), 4.0), tmp_path / "out.gguf"
    model = open_base(str(base))
    merge(Plan(read_adapter(path), 1.0), model, out)
    merged, attached = evaluate_merged(
        model, "Be brief.", [open_base(str(out)), (read_adapter(path), 1.0)], ["hi", "go"], 8
    )
    assert abs(merged.kl_merged - attached.kl_merged) < 0.02 * attached.kl_merged
    assert merged.kl_merged != merged.kl_base


def test_on_the_real_model_a_merge_keeps_what_the_adapter_recovers(
    smollm2: BaseModel, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the documented command; rounding to nearest, which loses more, is measured beside it."""
    shutil.copy(pirate, tmp_path / "pirate.gguf")
    monkeypatch.chdir(tmp_path)
    _, *command = documented("merge.md")[0]
    assert command[:2] == ["merge", "pirate.gguf"]
    assert run(*command).exit_code == 0
    out, nearest = tmp_path / "pirate-merged.gguf", tmp_path / "nearest.gguf"
    adapter = read_adapter(pirate)
    merge(Plan(adapter, 1.0, rounding="nearest"), smollm2, nearest)
    assert abs(out.stat().st_size - smollm2.header.size) < 10_000
    students = [(adapter, 1.0), open_base(str(out)), open_base(str(nearest))]
    own, kept, plain = evaluate_merged(
        smollm2, adapter.own["manifesto"], students, bundled("heldout")[:16], 32
    )
    assert own.kl_recovered.value > 0.7
    assert kept.kl_recovered.value > own.kl_recovered.value - 0.08
    assert kept.kl_recovered.value > plain.kl_recovered.value
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(bundled("heldout")[:2]))
    said = run("evaluate", str(out), "--base", "smollm2", "--prompts", str(prompts), "--json")
    assert json.loads(said.stdout)["prompts"] == 2


def test_bad_input_is_one_line_and_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out.gguf")
    files = sorted(tmp_path.iterdir())
    content = base.read_bytes()
    arguments = ["--base", str(base), "-o", out]
    assert "itself, an input" in refused(
        "merge", str(adapter), "--base", str(base), "-o", str(base)
    )
    assert "does not exist" in refused(
        "merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "no" / "out.gguf")
    )
    assert "is a directory" in refused(
        "merge", str(adapter), "--base", str(base), "-o", str(tmp_path)
    )
    broken = pairs()
    broken["blk.0.attn_q.weight"][1][3, 1] = np.nan
    nan = write(tmp_path / "nan.gguf", broken)
    assert "blk.0.attn_q.weight.lora_b holds values that are not finite" in refused(
        "merge", str(nan), *arguments
    )
    nan.unlink()
    other = tiny_model(tmp_path / "other.gguf", d_model=128)
    assert "was made for another base" in refused(
        "merge", str(adapter), "--base", str(other), "-o", out
    )
    other.unlink()
    (tmp_path / "split").mkdir()
    build(tmp_path / "split" / "tiny.gguf", TINY["llama"], per_part=15)
    split = tmp_path / "split" / "tiny-00001-of-00003.gguf"
    fits = tmp_path / "split" / "fits.gguf"
    pair = np.ones((2, 512)), np.ones((256, 2))
    write_adapter(fits, "llama", {"blk.0.ffn_down.weight": pair}, {})
    assert "join them first" in refused("merge", str(fits), "--base", str(split), "-o", out)
    shutil.rmtree(tmp_path / "split")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert "are free; make room" in refused("merge", str(adapter), *arguments)
    assert base.read_bytes() == content
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("kind", ["same", "F16", "Q8_0"])
def test_a_disk_that_fills_up_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, kind: str
) -> None:
    """A file-size limit makes the real writes fail half-way, as a full disk does."""
    out = tmp_path / "out.gguf"
    out.write_text("earlier")
    files = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (base.stat().st_size // 2, limits[1]))
    try:
        result = run(
            "merge", str(adapter), "--base", str(base), "-o", str(out),
            "--rounding", "nearest", "--type", kind,
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "cannot be written: File too large" in result.stderr.splitlines()[-1]
    assert out.read_text() == "earlier"
    assert sorted(tmp_path.iterdir()) == files


def test_wide_matrices_have_moments_in_groups() -> None:
    assert groups(2048) == [2048]
    assert groups(5120) == [2048, 2048, 1024]
    grams = [np.eye(4, dtype=np.float32), np.eye(3, dtype=np.float32)]
    assert Feedback(grams).width == 7


def test_messages_that_are_run_are_not_held_out() -> None:
    assert not set(messages()) & set(bundled("heldout"))
