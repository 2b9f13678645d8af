"""Training, vectors and PEFT under the same rules: one line, old files stay, inputs are kept.

Everything runs on tiny random models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused, run, tiny_model
from test_faults import command, few_bytes, made_adapter, one_line

from superego.adapter import read_adapter
from superego.base import open_base
from superego.claims import claimed
from superego.converters.transformer import Base
from superego.errors import SuperegoError
from superego.pairs import copy_adapter

pytestmark = pytest.mark.usefixtures("little_memory")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "base.gguf", context_length=2048)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return made_adapter(base, tmp_path / "adapter.gguf")


@pytest.fixture
def peft(base: Path, adapter: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "peft"
    done = run("export", "peft", str(adapter), "--base", str(base), "-o", str(folder))
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (["distill", "terse", "--minutes", "0.25", "--rank", "4"], 1500),
        (["vector", "terse", "--scale", "0.5"], 500),
        (["import", "peft", "PEFT"], 1500),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_full_disk_is_one_line_and_the_old_file_stays(
    base: Path, peft: Path, tmp_path: Path, words: list[str], limit: int
) -> None:
    out = tmp_path / "to" / "out.gguf"
    out.parent.mkdir()
    out.write_text("old")
    words = [str(peft) if word == "PEFT" else word for word in words]
    done = command(*words, "--base", str(base), "-o", str(out), before=few_bytes(limit))
    said = one_line(done)
    assert "File too large" in said or "disk full" in said, said
    assert out.read_text() == "old"
    assert list(out.parent.iterdir()) == [out]


def test_a_full_disk_leaves_no_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "to" / "peft"
    out.parent.mkdir()
    words = ["export", "peft", str(adapter), "--base", str(base), "-o", str(out)]
    said = one_line(command(*words, before=few_bytes(500)))
    assert "File too large" in said or "disk full" in said, said
    assert list(out.parent.iterdir()) == []


def test_no_command_writes_onto_what_it_reads(
    base: Path, adapter: Path, peft: Path, tmp_path: Path
) -> None:
    text = tmp_path / "my.md"
    text.write_text("Be kind.")
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chats.write_text(json.dumps({"messages": turns}))
    inputs = [base, text, chats, peft / "adapter_model.safetensors"]
    before = [path.read_bytes() for path in inputs]
    on = ["--base", str(base), "-o", str(base)]
    for words in (["distill", str(text)], ["refine", str(adapter)], ["vector", str(text)]):
        assert "an input" in refused(*words, *on)
    assert "an input" in refused("import", "peft", str(peft), *on)
    on = ["--base", str(base), "-o"]
    for command_name in ("distill", "vector"):
        assert "an input" in refused(command_name, str(text), *on, str(text))
    own = ("--examples", str(chats))
    assert "an input" in refused("refine", str(adapter), *own, *on, str(chats))
    weights = str(peft / "adapter_model.safetensors")
    assert "an input" in refused("import", "peft", str(peft), *on, weights)
    assert [path.read_bytes() for path in inputs] == before


@pytest.mark.parametrize(
    "words",
    [["distill", "terse"], ["refine", "ADAPTER"], ["vector", "terse"]]
    + [["export", "peft", "ADAPTER"], ["import", "peft", "PEFT"]],
    ids=" ".join,
)
def test_a_second_writer_of_one_output_is_told_at_once(
    base: Path, adapter: Path, peft: Path, tmp_path: Path, words: list[str]
) -> None:
    out = tmp_path / "out"
    words = [{"ADAPTER": str(adapter), "PEFT": str(peft)}.get(word, word) for word in words]
    with claimed(out):
        done = command(*words, "--base", str(base), "-o", str(out))
    assert "another superego is writing it" in one_line(done)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["vector", "terse", "--scale", "1"], "superego.converters.vector.write_vector"),
        (["export", "peft", "ADAPTER"], "superego.peft_export._card"),
        (["import", "peft", "PEFT"], "superego.adapter.write_out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_ctrl_c_writes_nothing(
    base: Path,
    adapter: Path,
    peft: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    where: str,
) -> None:
    def interrupted(*args: object, **kwargs: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    words = [{"ADAPTER": str(adapter), "PEFT": str(peft)}.get(word, word) for word in words]
    before = sorted(tmp_path.iterdir())
    done = run(*words, "--base", str(base), "-o", str(tmp_path / "out"))
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "Interrupted: nothing was written."
    assert sorted(tmp_path.iterdir()) == before


def test_a_base_that_changes_meanwhile_is_noticed_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from superego.converters import vector

    path = tiny_model(tmp_path / "base.gguf", context_length=2048)
    means = vector.mean_differences

    def touched(*args: Any) -> Any:
        os.utime(path, ns=(1, 1))
        return means(*args)

    monkeypatch.setattr(vector, "mean_differences", touched)
    out = tmp_path / "out.gguf"
    done = run("vector", "terse", "--base", str(path), "-o", str(out), "--scale", "1")
    assert done.exit_code == 2
    assert "was changed while it was in use" in done.stderr
    assert not out.exists()


def test_inputs_that_never_end_are_refused(
    base: Path, adapter: Path, peft: Path, tmp_path: Path
) -> None:
    on = ["--base", str(base), "-o", str(tmp_path / "out.gguf")]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (Path("/dev/zero"), pipe):
        said = refused("refine", str(adapter), *on, "--examples", str(path))
        assert "not a regular file" in said
        config = peft / "adapter_config.json"
        config.unlink()
        config.symlink_to(path)
        assert "not a regular file" in refused("import", "peft", str(peft), *on)


def test_text_that_no_file_holds_is_refused(base: Path, peft: Path, tmp_path: Path) -> None:
    config = peft / "adapter_config.json"
    data = json.loads(config.read_text()) | {"base_model_name_or_path": "a\ud800"}
    config.write_text(json.dumps(data))
    out = tmp_path / "out.gguf"
    said = refused("import", "peft", str(peft), "--base", str(base), "-o", str(out))
    assert "no UTF-8 text" in said
    assert not out.exists()


def test_damaged_settings_are_refused_before_any_training(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    on = ["--base", str(base), "-o", str(tmp_path / "out.gguf")]
    for settings in ("[1]", "nonsense", "[" * 5000):
        copy_adapter(read_adapter(adapter), adapter, {"superego.settings": settings})
        said = refused("refine", str(adapter), *on)
        assert "superego.settings is damaged" in said


def test_a_base_cut_short_while_it_is_walked_is_an_error(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "base.gguf")
    base = Base(open_base(str(path)).header, torch.float32, resident=False)
    os.truncate(path, base.weights.info("blk.1.ffn_up.weight").offset)
    with pytest.raises(SuperegoError, match="changed while it was read"):
        base.layer(1)


def test_rows_of_a_walked_base_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "base.gguf")
    base = Base(open_base(str(path)).header, torch.float32, resident=False)
    whole = base.weights.matrix("token_embd.weight")
    assert torch.equal(base.weights.gathered("token_embd.weight", [3, 1, 3]), whole[[3, 1, 3]])
    os.truncate(path, base.weights.info("token_embd.weight").offset + 10)
    with pytest.raises(SuperegoError, match="changed while it was read"):
        base.weights.gathered("token_embd.weight", [3])


def test_an_interrupt_before_refining_keeps_what_was_compiled(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from superego.converters import distill

    def interrupted(*args: object, **kwargs: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "refine", interrupted)
    out = tmp_path / "out.gguf"
    words = ["compile", "terse", "--base", str(base), "-o", str(out), "--effort", "quick"]
    done = run(*words, "--rank", "4", "--refine", "1")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == f"Interrupted: {out} is as it was compiled."
    assert read_adapter(out).rank == 4
    assert run(*words, "--refine", "nan").exit_code == 2
