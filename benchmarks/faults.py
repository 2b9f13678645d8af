"""Commands ended at random moments: the output is the old file or the new one, whole.

Runs compile, session, merge and amend on a tiny random model, each many times, and sends SIGKILL
or SIGINT at a seeded random moment of the run. After each the output is compared with the old and
the new one, and what was left beside it and among temporary files is counted. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(words: list[str], log: Path, after: float | None, number: int) -> tuple[int, float]:
    """The command in a fork of this process, sent a signal `after` seconds; its exit code.

    A fork, because starting Python and importing torch takes longer than the commands do here.
    """
    start = time.perf_counter()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    child = os.fork()
    if not child:
        code = 130  # where the signal comes before the command begins
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            from superego.cli import main as command

            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            code = 99
            command(words, prog_name="superego")
        except SystemExit as error:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            code = int(error.code or 0)
        except BaseException as error:
            begun = len(traceback.extract_tb(error.__traceback__)) > 3  # past click's entry
            if isinstance(error, KeyboardInterrupt) and not begun:
                code = 130
            elif code == 99:
                traceback.print_exc()
        os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if after is not None:
        time.sleep(max(0.0, start + after - time.perf_counter()))
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - start


def content(files: list[Path]) -> str:
    """One hash over files, "" for none of them."""
    found = [hashlib.sha256(p.read_bytes()).hexdigest() if p.exists() else "" for p in files]
    return "".join(found)


def litter(folders: list[Path], known: set[str]) -> list[str]:
    """What lies in these folders beside what belongs there."""
    return sorted(p.name for f in folders for p in f.iterdir() if p.name not in known)


def measure(
    words: list[str], files: list[Path], moments: int, number: int, rng: random.Random, tmp: Path
) -> dict[str, object]:
    """Ends one command `moments` times; `files` is the output, and a sidecar where it has one."""
    folder, log = files[0].parent, tmp.parent / "log.txt"
    known = {p.name for p in folder.iterdir()} | {p.name for p in files}
    old = content(files)
    olds = [p.read_bytes() for p in files]
    seconds = []
    for _ in range(3):
        for path, raw in zip(files, olds, strict=True):
            path.write_bytes(raw)
        code, took = run(words, log, None, number)
        if code:
            sys.exit(f"{words}: exit code {code}: {log.read_text()}")
        seconds.append(took)
    whole = sorted(seconds)[1]
    new = content(files)
    if new == old:
        sys.exit(f"{words}: writes what was there")
    ends: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    most = 0
    for _ in range(moments):
        for path, raw in zip(files, olds, strict=True):
            path.write_bytes(raw)
        # half of the moments in the last fifth, where the files are written
        share = rng.random() if rng.random() < 0.5 else 0.8 + 0.25 * rng.random()
        code, _ = run(words, log, share * whole, number)
        codes[code] += 1
        now = content(files)
        end = "old" if now == old else "new" if now == new else "neither"
        if end == "neither" and len(files) > 1 and now[:64] in (old[:64], new[:64]):
            end = "between"
        ends[end] += 1
        most = max(most, len(litter([folder, tmp], known)))
        said = log.read_text()
        if "Traceback" in said or "Exception ignored" in said or code not in (0, 130, -9):
            ends["traceback"] += 1
            print(said, file=sys.stderr)
    for path, raw in zip(files, olds, strict=True):
        path.write_bytes(raw)
    if run(words, log, None, number)[0] or content(files) != new:
        ends["next run fails"] += 1
    return {
        "seconds": round(whole, 2),
        "ends": dict(ends),
        "codes": {str(k): n for k, n in sorted(codes.items())},
        "most litter": most,
        "litter after the next run": litter([folder, tmp], known),
    }


def prepare(folder: Path) -> dict[str, tuple[list[str], list[Path]]]:
    """A tiny base and old outputs; the commands and what they write."""
    sys.path.append(str(ROOT / "tests"))
    from conftest import tiny_model

    base = tiny_model(folder / "base.gguf", context_length=2048)
    old, new = folder / "old.md", folder / "new.md"
    old.write_text("You are calm.\n")
    new.write_text("You are a pirate, and loud.\n")
    adapter, made, saved, merged = (
        folder / name for name in ("old.gguf", "out.gguf", "out.session", "whole.gguf")
    )
    on = ["--base", str(base)]
    commands = [
        ["compile", str(old), *on, "-o", str(adapter), "--effort", "quick", "--rank", "8"],
        ["session", str(old), *on, "-o", str(saved), "--n-ctx", "512"],
    ]
    for words in commands:
        code, _ = run(words, folder / "log.txt", None, 0)
        if code:
            sys.exit(f"{words}: exit code {code}: {(folder / 'log.txt').read_text()}")
    shutil.copy(adapter, made)
    shutil.copy(base, merged)
    outputs = {
        "compile": (["compile", str(new), *on, "-o", str(made), *commands[0][-4:]], [made]),
        "session": (
            ["session", str(new), *on, "-o", str(saved), "--n-ctx", "512"],
            [saved, saved.with_name(saved.name + ".json")],
        ),
        "merge": (["merge", str(adapter), *on, "-o", str(merged), "--type", "Q8_0"], [merged]),
        "amend": (["amend", str(adapter), "Be brief.", *on, "-o", str(adapter)], [adapter]),
    }
    for name, (words, files) in list(outputs.items()):
        place = folder / name
        place.mkdir()
        moved = [place / file.name for file in files]
        for file, target in zip(files, moved, strict=True):
            shutil.copy(file, target)
        # amend reads the file that it writes
        names = {str(f): str(m) for f, m in zip(files, moved, strict=True)}
        outputs[name] = ([names.get(word, word) for word in words], moved)
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--signal", choices=["KILL", "INT"], default="KILL")
    parser.add_argument("--commands", nargs="+", default=["compile", "session", "merge", "amend"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    number = getattr(signal, f"SIG{args.signal}")
    rng = random.Random(args.seed)
    home = Path(tempfile.mkdtemp(prefix="superego-faults-"))
    try:
        tmp = home / "tmp"
        tmp.mkdir()
        os.environ.update(
            TMPDIR=str(tmp), XDG_CACHE_HOME=str(home / "cache"), SOURCE_DATE_EPOCH="1700000000"
        )
        tempfile.tempdir = str(tmp)
        import llama_cpp  # noqa: F401
        import torch  # noqa: F401

        import superego.converters.amend
        import superego.converters.merge  # noqa: F401

        made = prepare(home)
        work: Callable[[str], dict[str, object]] = lambda name: measure(  # noqa: E731
            *made[name], args.moments, number, rng, tmp
        )
        found = {name: work(name) for name in args.commands}
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if args.json:
        print(json.dumps(found))
        return
    print(f"SIG{args.signal} at {args.moments} random moments of each\n")
    print("| command | run takes | what was there afterwards | exit codes | most litter | left |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        ends = ", ".join(f"{n} {k}" for k, n in sorted(dict(row["ends"]).items()))  # type: ignore[call-overload]
        codes = ", ".join(f"{n} × {k}" for k, n in dict(row["codes"]).items())  # type: ignore[call-overload]
        left = row["litter after the next run"] or "nothing"
        print(f"| {name} | {row['seconds']} s | {ends} | {codes} | {row['most litter']} | {left} |")


if __name__ == "__main__":
    main()
