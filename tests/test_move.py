"""Moving: re-quantized bases take the adapter over, other models have it compiled anew."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import pytest
from conftest import refused, requantized, tiny_model
from gguf import GGMLQuantizationType

from superego.adapter import read_adapter, same_weights
from superego.base import BaseModel, open_base
from superego.converters.compile import Settings, compile_manifesto
from superego.converters.move import move
from superego.history import history_of, manifesto_of
from superego.manifesto import parse_manifesto
from superego.pairs import copy_adapter, read_pairs

KIND = parse_manifesto("You are kind to all.", "kind")


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("move")
    base = open_base(str(tiny_model(folder / "base.gguf", context_length=2048)))
    quick = Settings.for_effort("quick", rank=8)
    compile_manifesto(KIND, base, folder / "kind.gguf", quick)
    return folder / "kind.gguf"


def test_the_real_model_requantized_keeps_its_adapter(
    pirate: Path, smollm2: BaseModel, tmp_path: Path
) -> None:
    path = requantized(smollm2, tmp_path / "q8.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    model, out = open_base(str(path)), tmp_path / "moved.gguf"
    report = move(read_adapter(pirate), model, out, by="ada")
    assert report["done"] == "reused"
    said = report["KL recovered, as the file says"]
    assert abs(report["KL recovered on the new base"] - said) < 0.05
    old, new = read_adapter(pirate), read_adapter(out)
    assert same_weights(old, model) is False
    assert same_weights(new, model) is True
    assert history_of(new)[-1]["how"] == "reused"
    assert manifesto_of(new).body == manifesto_of(old).body


def test_other_weights_of_one_shape_are_measured(kind: Path, tmp_path: Path) -> None:
    finer = tiny_model(tmp_path / "f16.gguf", context_length=2048, kind=GGMLQuantizationType.F16)
    out = tmp_path / "out.gguf"
    report = move(read_adapter(kind), open_base(str(finer)), out, by="")
    assert report["done"] == "reused"
    (old, new) = (read_pairs(read_adapter(p)) for p in (kind, out))
    assert all((old[name][1] == new[name][1]).all() for name in old)
    foreign = tiny_model(tmp_path / "foreign.gguf", context_length=2048, seed=9)
    better = tmp_path / "better.gguf"  # a random model recovers little: let it have been much
    copy_adapter(read_adapter(kind), better, {"superego.kl_recovered": 0.99})
    report = move(read_adapter(better), open_base(str(foreign)), out, by="")
    assert report["done"] == "recompiled"
    assert "below what the file says" in report["why"]
    assert same_weights(read_adapter(out), open_base(str(foreign))) is True


def test_another_model_has_it_compiled(kind: Path, tmp_path: Path) -> None:
    wider = open_base(str(tiny_model(tmp_path / "w.gguf", d_model=128, context_length=2048)))
    out = tmp_path / "out.gguf"
    report = move(read_adapter(kind), wider, out, by="")
    assert report["done"] == "recompiled"
    assert report["why"].startswith("another model: ")
    adapter = read_adapter(out)
    assert manifesto_of(adapter).body == KIND.body
    assert [e["how"] for e in history_of(adapter)] == ["recompiled"]


def test_bad_input_is_refused(kind: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none" / "x.gguf")
    base = str(kind.parent / "base.gguf")
    assert "does not exist" in refused("move", str(kind), "--base", base, "-o", missing)
    out = str(tmp_path / "o.gguf")
    assert "no such file" in refused("move", str(kind), "--base", "none.gguf", "-o", out)
    small = str(tiny_model(tmp_path / "s.gguf", d_model=128, context_length=64))
    assert "context of 64" in refused("move", str(kind), "--base", small, "-o", out)
    assert not Path(out).exists()


def test_a_calibrated_adapter_is_measured_at_the_strength_its_figure_is_for(
    kind: Path, tmp_path: Path
) -> None:
    same = open_base(str(kind.parent / "base.gguf"))
    plain = move(read_adapter(kind), same, tmp_path / "plain.gguf", margin=1, by="")
    weaker = tmp_path / "weaker.gguf"
    copy_adapter(read_adapter(kind), weaker, {"superego.calibration.scale": 0.5}, strength=0.5)
    report = move(read_adapter(weaker), same, tmp_path / "out.gguf", margin=1, by="")
    measured = "KL recovered on the new base"
    assert report[measured] == pytest.approx(plain[measured], abs=1e-3)
    (old, new) = (read_pairs(read_adapter(p)) for p in (weaker, tmp_path / "out.gguf"))
    assert all((old[name][1] == new[name][1]).all() for name in old)
