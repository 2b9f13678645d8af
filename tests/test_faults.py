"""Full disks, lost folders, changed inputs, odd arguments, two writers, no network: one clear line.

Everything runs on tiny random models; commands in processes of their own where a limit or a
signal is what is tested.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, run, tiny_model

import superego
from superego.adapter import read_adapter, write_adapter
from superego.atomic import replacing, temporary_folder
from superego.base import open_base
from superego.claims import claimed
from superego.errors import SuperegoError
from superego.gguf_file import check_unchanged, read_header, read_raw
from superego.history import with_entry
from superego.manifesto import Manifesto, parse_manifesto
from superego.runtime import load
from superego.template import ChatTemplate, conversation

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("little_memory")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "base.gguf", context_length=2048)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return made_adapter(base, tmp_path / "adapter.gguf")


def made_adapter(base: Path, path: Path) -> Path:
    model = open_base(str(base))
    rng = np.random.default_rng(5)
    pairs = {}
    for layer in range(2):
        name = f"blk.{layer}.ffn_down.weight"
        out, width = model.header.tensors[name].shape
        a, b = rng.standard_normal((4, width)), rng.standard_normal((out, 4))
        pairs[name] = (a.astype(np.float32) / 8, b.astype(np.float32) / 8)
    manifesto = Manifesto("calm", "You are calm.")
    write_adapter(
        path,
        "llama",
        pairs,
        {
            "general.name": "calm",
            "superego.manifesto": manifesto.body,
            "superego.manifesto.sha256": manifesto.sha256,
            "superego.base.fingerprint": model.fingerprint,
            "superego.settings": json.dumps({"effort": "quick", "rank": 4, "seed": 0}),
            "superego.history": with_entry(None, "compile", ""),
        },
    )
    return path


def command(
    *words: str, before: Callable[[], None] | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    code = "import sys; from superego.cli import main; main(prog_name='superego')"
    # -B: some Pythons leave half a .pyc where files may have few bytes, for all that come after
    return subprocess.run(
        [sys.executable, "-B", "-c", code, *words],
        capture_output=True,
        check=False,
        preexec_fn=before,
        env={**os.environ, **environment},
        timeout=120,
    )


def one_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """The error line of a refused command; progress may stand above it."""
    lines = [x for x in done.stderr.decode().splitlines() if x.strip()]
    assert done.returncode == 2, done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert [x for x in lines if x.startswith("Error: ")] == lines[-1:], lines
    return lines[-1]


# the fuzz bench, briefly


def test_500_damaged_files_end_in_success_or_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--cases", "500", "--json"]
        + ["--seed", "7"],
        capture_output=True,
        check=False,
        timeout=300,
    )
    found = json.loads(done.stdout)
    assert found["cases"] >= 500
    assert found["findings"] == []


@pytest.mark.parametrize("signal", ["KILL", "INT"])
def test_ended_at_any_moment_a_command_leaves_the_old_file_or_the_new_one(signal: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--json", "--moments", "5"]
        + ["--signal", signal],
        capture_output=True,
        check=False,
        timeout=300,
    )
    for name, row in json.loads(done.stdout).items():
        assert set(row["ends"]) <= {"old", "new", "between"}, (name, row, done.stderr)
        assert set(row["codes"]) <= {"0", "-9" if signal == "KILL" else "130"}, (name, row)
        assert row["litter after the next run"] == [], (name, row)
        assert row["most litter"] <= 3, (name, row)


def test_an_interrupt_inside_a_callback_is_not_lost() -> None:
    code = """
        import ctypes, signal, time
        from superego.interrupt import keep_interrupts
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
        keep_interrupts()
        def called():
            signal.raise_signal(signal.SIGINT)
            return 0
        back = ctypes.CFUNCTYPE(ctypes.c_int)(called)
        try:
            back()
            time.sleep(5)
        except KeyboardInterrupt:
            print("kept")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False
    )
    assert done.stdout == b"kept\n"
    assert done.stderr == b""


def test_a_session_ended_between_its_two_files_is_made_anew_from_its_text(
    base: Path, tmp_path: Path
) -> None:
    from superego.session import open_session, save_session, sidecar_path

    model = open_base(str(base))
    llm = load(model, n_ctx=256)
    path = tmp_path / "a.session"
    save_session(llm, model, Manifesto("old", "You are calm."), path)
    beside = sidecar_path(path).read_bytes()
    save_session(llm, model, Manifesto("new", "You are loud."), path)
    sidecar_path(path).write_bytes(beside)  # as where the process was killed before this moved
    found = open_session(llm, model, path)
    assert (found.manifesto, found.tokens) == ("You are calm.", found.prefix)
    assert "read anew and the session saved again" in found.note
    assert open_session(llm, model, path).note == ""


# the disk


def few_bytes(n: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["compile", "terse", "--effort", "quick", "--rank", "4"], "out.gguf"),
        (["session", "terse", "--n-ctx", "1024"], "out.session"),
        (["merge", "ADAPTER", "--rounding", "nearest"], "out.gguf"),
        (["blend", "ADAPTER", "ADAPTER"], "out.gguf"),
        (["tag", "NOTES", "--source", "me"], "out.jsonl"),
        (["export", "ollama", "ADAPTER", "--ollama-version", "0.30.0"], "out"),
        (["export", "llama-server", "ADAPTER:0.5"], "out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_full_disk_is_one_line_and_the_old_file_stays(
    base: Path, adapter: Path, tmp_path: Path, words: list[str], output: str
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("word " * 2000)
    out = tmp_path / "to" / output
    out.parent.mkdir()
    folder = words[0] == "export"
    if not folder:
        out.write_text("old")
    words = [{"ADAPTER": str(adapter), "NOTES": str(notes)}.get(w, w) for w in words]
    words = [w.replace("ADAPTER", str(adapter)) for w in words]
    if words[0] not in ("blend", "tag"):
        words += ["--base", str(base)]
    if words[:2] == ["export", "llama-server"]:
        out.mkdir()
        words[2] = words[2].removesuffix(":0.5")
    limit = 100 if folder else 1500
    done = command(*words, "-o", str(out), before=few_bytes(limit))
    said = one_line(done)
    assert "File too large" in said or "disk full" in said, said
    if folder:
        assert not out.exists() or not list(out.iterdir())
    else:
        assert out.read_text() == "old"
    if words[0] != "tag":  # what it has done is kept there, for the same command to go on
        assert [p.name for p in out.parent.iterdir() if p != out] == []


def test_output_that_goes_nowhere_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        code = "from superego.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "personas"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == b"Error: No space left on device\n"


@pytest.mark.parametrize("target", ["/dev/null", "/dev/full"])
def test_devices_are_no_outputs(base: Path, target: str) -> None:
    said = refused("compile", "terse", "--base", str(base), "-o", target)
    assert "not a regular file" in said
    assert not Path(target).is_file()


def test_a_read_only_file_is_not_replaced(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.gguf"
    path.write_text("old")
    path.chmod(0o444)
    assert "read-only" in refused("compile", "terse", "--base", str(base), "-o", str(path))
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_written_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access  # the tests may run as root, whom permissions do not stop
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != locked and access(p, mode))
    said = refused("compile", "terse", "--base", str(base), "-o", str(locked / "a.gguf"))
    assert "not writable" in said


def test_a_replaced_file_keeps_its_permissions_and_a_link_its_target(tmp_path: Path) -> None:
    path, link = tmp_path / "secret", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_name_as_long_as_names_may_be_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)  # 254 bytes
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    with pytest.raises(SuperegoError, match="too long"), replacing(tmp_path / ("x" * 300)):
        pass


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_holds_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "out"
    left = [tmp_path / ".out.abcdefgh.part", tmp_path / "superego-abcdefgh.tmp"]
    left[0].write_text("x")
    left[1].mkdir()
    others = [tmp_path / ".out.part", tmp_path / ".out.toolonger.part", tmp_path / "out.part"]
    for each in others:
        each.write_text("x")
    with temporary_folder() as held, replacing(path) as mine:
        mine.write_text("1")
        with temporary_folder(), replacing(path) as second:
            second.write_text("2")
        assert held.is_dir()
        assert mine.exists()
    assert path.read_text() == "1"
    assert not any(each.exists() for each in left)
    assert all(each.exists() for each in others)


def test_without_a_folder_for_temporary_files_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tempfile

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(SuperegoError, match="set TMPDIR"), temporary_folder():
        pass


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(base: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("no folder")
    words = ["compile", "terse", "--base", str(base), "-o", str(tmp_path / "a.gguf")]
    done = command(*words, "--effort", "quick", "--rank", "4", XDG_CACHE_HOME=str(nowhere))
    assert done.returncode == 0, done.stderr.decode()


# inputs that change


def test_a_base_that_is_cut_short_is_an_error_where_a_mapped_one_ends_the_process(
    tmp_path: Path,
) -> None:
    path = tiny_model(tmp_path / "base.gguf")
    header = read_header(path)
    last = max(header.tensors.values(), key=lambda t: t.offset)
    whole = read_raw(last)
    assert whole.nbytes == last.n_bytes
    assert np.array_equal(read_raw(last, 3, 2), whole[3:5])
    os.truncate(path, last.offset + 10)
    with pytest.raises(SuperegoError, match="cut it short"):
        read_raw(last)
    with pytest.raises(SuperegoError, match="was changed while it was in use"):
        check_unchanged(header)
    path.unlink()
    with pytest.raises(SuperegoError, match="was removed while it was in use"):
        check_unchanged(header)


def test_a_base_that_changes_during_a_compile_is_noticed_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from superego.converters import compile as compiling

    path = tiny_model(tmp_path / "base.gguf", context_length=2048)
    out = tmp_path / "out.gguf"
    out.write_text("old")
    solve = compiling.solve

    def touched(*args: object) -> object:
        os.utime(path, ns=(1, 1))
        return solve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(compiling, "solve", touched)
    words = ["compile", "terse", "--base", str(path), "-o", str(out), "--effort", "quick"]
    result = run(*words, "--rank", "4")
    assert result.exit_code == 2
    assert "was changed while it was in use" in result.stderr
    assert out.read_text() == "old"


def test_an_adapter_that_changes_between_check_and_load_is_not_loaded(
    base: Path, adapter: Path
) -> None:
    from superego.loaded import Loaded

    llm = load(open_base(str(base)), n_ctx=64)
    checked = read_adapter(adapter)
    with adapter.open("r+b") as file:
        file.write(b"GGUF\xff\xff\xff\xff")
    os.utime(adapter, ns=(1, 1))
    with pytest.raises(SuperegoError, match="was changed"):
        Loaded(llm._model.model, checked)


def test_no_command_writes_onto_what_it_reads(base: Path, adapter: Path, tmp_path: Path) -> None:
    text = tmp_path / "my.md"
    text.write_text("Be kind.")
    before = base.read_bytes()
    on = ["--base", str(base), "-o", str(base)]
    for words in (["compile", str(text)], ["merge", str(adapter)], ["move", str(adapter)]):
        assert "an input" in refused(*words, *on)
    assert "an input" in refused("amend", str(adapter), "More.", *on)
    assert "an input" in refused("calibrate", str(adapter), *on)
    on = ["--base", str(base), "-o", str(text)]
    assert "an input" in refused("compile", str(text), *on)
    assert base.read_bytes() == before
    assert text.read_text() == "Be kind."


# two at once


def test_a_second_writer_of_one_output_is_told_at_once(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with claimed(out):
        done = command("compile", "terse", "--base", str(base), "-o", str(out))
        assert "another superego is writing it" in one_line(done)
        other = tmp_path / "else.gguf"
        assert "no such file" in one_line(
            command("compile", str(tmp_path / "none.md"), "--base", str(base), "-o", str(other))
        )
    done = command("compile", "none.md", "--base", str(base), "-o", str(out))
    assert "no such file" in one_line(done)


def test_of_two_writers_that_do_not_know_of_each_other_the_last_one_is_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "out"
    with replacing(path) as first, replacing(path) as second:
        first.write_bytes(b"1" * 5000)
        second.write_bytes(b"2" * 3000)
    assert path.read_bytes() == b"1" * 5000
    assert list(tmp_path.iterdir()) == [path]


# templates and manifestos


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}{{ n.x }}",
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    ],
)
def test_a_template_without_bounds_is_refused_before_llama_cpp_compiles_it(
    tmp_path: Path, source: str
) -> None:
    model = open_base(str(tiny_model(tmp_path / "t.gguf", template=source)))
    with pytest.raises(SuperegoError, match="do not use this file"):
        ChatTemplate(model.header)
    if "for" not in source:  # what llama-cpp-python would compute as it loads the model
        with pytest.raises(SuperegoError, match="do not use this file"):
            load(model, vocab_only=True)


def test_after_a_refused_template_others_are_rendered(tmp_path: Path, base: Path) -> None:
    bad = open_base(str(tiny_model(tmp_path / "t.gguf", template="{{ 9 ** (9 ** 9) }}")))
    good = ChatTemplate(open_base(str(base)).header)
    with pytest.raises(SuperegoError):
        ChatTemplate(bad.header)
    assert "Hi" in good.render(conversation(None, "Hi"))


def test_a_manifesto_is_text_and_never_code(base: Path) -> None:
    body = (
        "{{ 7 * 7 }} {% raw %} {% for i in range(10 ** 9) %} !!python/object:os.system {}\n"
        "<|im_end|>\n${HOME} $(true) `true` %s %(x)s {0}"
    )
    manifesto = parse_manifesto(body, "m")
    assert manifesto.body == body
    rendered = ChatTemplate(open_base(str(base)).header).render(conversation(body, "Hi"))
    assert body in rendered


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("a: &a [x]\nname: *a", "aliases"),
        ("<<: *a", "aliases"),
        ("name: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ('name: "a\\0b"', "plain text"),
        ('description: "\\ud800"', "plain text"),
        ('name: "a\\nb"', "one line"),
        ("name: " + "x" * 300, "at most 200"),
        ("license: " + "x" * 20_000, "at most 16,000"),
        ("examples: " + "[" * 5000, "nested too deeply"),
        ("version: " + "9" * 9000, "broken"),
    ],
)
def test_front_matter_that_could_do_harm_is_refused(front: str, said: str) -> None:
    with pytest.raises(SuperegoError, match=said) as error:
        parse_manifesto(f"---\n{front}\n---\nBe kind.", "m")
    assert "\n" not in str(error.value)


# arguments


@pytest.mark.parametrize(
    "words",
    [
        ["compile", "terse", "-o", "x.gguf", "--rank", "0"],
        ["compile", "terse", "-o", "x.gguf", "--rank", "-1"],
        ["compile", "terse", "-o", "x.gguf", "--seed", "-1"],
        ["compile", "terse", "-o", "x.gguf", "--seed", str(2**80)],
        ["compile", "terse", "-o", "x.gguf", "--threads", "0"],
        ["compile", "terse", "-o", "x.gguf", "--threads", str(10**9)],
        ["chat", "--message", "Hi", "--temperature", "nan"],
        ["chat", "--message", "Hi", "--max-tokens", "0"],
        ["chat", "--message", "Hi", "--n-ctx", str(2**40)],
        ["chat", "--message", "Hi", "--gpu-layers", str(2**40)],
        ["chat", "--message", "Hi", "--persona", "ADAPTER:nan"],
        ["chat", "--message", "Hi", "--persona", "ADAPTER:inf"],
        ["chat", "--message", "Hi", "--persona", "ADAPTER:1e300"],
        ["chat", "--message", "Hi", "--persona", "a" * 5000],
        ["chat", "--message", "Hi", "--system", "a" * 5000],
        ["session", "terse", "-o", "a" * 300 + ".session"],
        ["calibrate", "ADAPTER", "--limit", "nan"],
        ["move", "ADAPTER", "-o", "x.gguf", "--margin", "nan"],
        ["evaluate", "ADAPTER", "--prompts", "/dev/zero"],
        ["amend", "ADAPTER", "", "-o", "x.gguf"],
        ["diff", "ADAPTER", "none.gguf"],
        ["export", "llama-server", "ADAPTER", "--port", "0"],
        ["export", "ollama", "ADAPTER", "-o", "d", "--ollama-version", "x" * 9999],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_odd_arguments_are_refused_without_a_traceback(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("ADAPTER", str(adapter)) for word in words]
    result = run(*words, "--base", str(base))
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert result.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.gguf"]


@pytest.mark.parametrize("name", [b"a\nb", b"caf\xe9", b"\x1b[31mred", b"tab\there"])
def test_odd_file_names_work_and_are_printed_in_one_line(
    base: Path, tmp_path: Path, name: bytes
) -> None:
    manifesto = os.fsencode(tmp_path) + b"/" + name + b".md"
    Path(os.fsdecode(manifesto)).write_text("Be kind.")
    missing = os.fsdecode(manifesto + b".none")
    said = refused("compile", missing, "--base", str(base), "-o", str(tmp_path / "x.gguf"))
    assert "no such file" in said
    out = os.fsdecode(manifesto.removesuffix(b".md") + b".session")
    done = command("session", os.fsdecode(manifesto), "--base", str(base), "-o", out)
    assert done.returncode == 0, done.stderr.decode()
    assert b"\x1b" not in done.stdout
    assert Path(out).is_file()


def test_a_context_that_does_not_fit_the_memory_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    few = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    with pytest.raises(SuperegoError, match="give a smaller --n-ctx"):
        load(open_base(str(base)), n_ctx=4096)


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert "not a regular file" in refused("inspect", str(pipe))


# the network


def test_nothing_is_fetched(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Sockets and names are cut off, and any attempt ends the process."""
    code = f"""
        import os, socket
        def cut(*args, **kwargs):
            os.write(2, b"NETWORK " + repr(args).encode())
            os._exit(77)
        socket.socket.connect = socket.socket.connect_ex = cut
        socket.getaddrinfo = socket.gethostbyname = socket.create_connection = cut
        socket.socket.sendto = cut
        from superego.cli import main
        def do(*words):
            try:
                main(words, prog_name="superego")
            except SystemExit as error:
                assert not error.code, (words, error.code)
        base, adapter, folder = {str(base)!r}, {str(adapter)!r}, {str(tmp_path)!r}
        on = ("--base", base)
        do("compile", "terse", *on, "-o", folder + "/a.gguf", "--effort", "quick", "--rank", "4")
        do("chat", *on, "--persona", folder + "/a.gguf", "--message", "Hi", "--max-tokens", "4")
        do("session", "terse", *on, "-o", folder + "/a.session")
        do("chat", *on, "--session", folder + "/a.session", "--message", "Hi", "--max-tokens", "4")
        open(folder + "/p.txt", "w").write("Hello?")
        do("evaluate", adapter, *on, "--prompts", folder + "/p.txt", "--max-tokens", "4")
        do("merge", adapter, *on, "-o", folder + "/m.gguf", "--type", "Q8_0")
        do("inspect", adapter, *on)
    """
    isolated = ["unshare", "--net"] if _can_unshare() else []  # no network at all, below Python
    done = subprocess.run(
        [*isolated, sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()


def _can_unshare() -> bool:
    try:
        return not subprocess.run(
            ["unshare", "--net", "true"], capture_output=True, check=False
        ).returncode
    except OSError:
        return False


def test_the_cut_would_be_seen() -> None:
    """The test above cannot pass by looking away: a connection does end such a process."""
    code = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
    assert hasattr(socket.socket, "connect")


def test_adapters_that_are_not_finite_or_not_of_one_rank_are_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    raw = bytearray(adapter.read_bytes())
    tensor = next(iter(read_adapter(adapter).header.tensors.values()))
    raw[tensor.offset : tensor.offset + 2] = b"\x00\x7e"  # a half float that is not a number
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(raw)
    llm = load(open_base(str(base)), n_ctx=64)
    with pytest.raises(SuperegoError, match="not finite"):
        superego.attach(llm, bad)
