"""Files appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from superego.atomic import check_writable, replacing
from superego.errors import SuperegoError


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  raised just above
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_killed_in_the_middle_of_a_write_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    code = f"""
        import time, pathlib
        from superego.atomic import replacing
        with replacing(pathlib.Path({str(path)!r})) as temporary:
            temporary.write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    def no_space(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    said = "No space left on device; nothing was changed"
    with pytest.raises(SuperegoError, match=said), replacing(tmp_path / "out"):
        no_space()
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_are_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(SuperegoError, match="is a directory"):
        check_writable(tmp_path)
    with pytest.raises(SuperegoError, match="does not exist"):
        check_writable(tmp_path / "none" / "out")
