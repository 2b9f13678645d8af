"""Adapter files (GGUF LoRA): written, read, and checked against a base before C++ sees them.

Knows the file format and Superego's metadata keys. Does not know how an adapter was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from superego.architectures import check_adaptable
from superego.atomic import replacing
from superego.base import BaseModel
from superego.errors import SuperegoError
from superego.gguf_file import FLOAT32, Header, TensorInfo, read_header, read_tensor

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

PREFIX = "superego."
_ALPHA = "adapter.lora.alpha"
# One pair a weight matrix: A (r, in), B (out, r), numpy order.
Pairs = Mapping[str, "tuple[np.ndarray, np.ndarray]"]
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Adapter:
    """An adapter file whose own structure has been checked."""

    path: Path
    header: Header
    pairs: dict[str, tuple[TensorInfo, TensorInfo]]  # base tensor name -> (A, B)

    @property
    def alpha(self) -> float:
        """`adapter.lora.alpha`; 0 means that llama.cpp applies the user's scale alone."""
        return float(self.header.metadata.get("adapter.lora.alpha", 0.0))

    @property
    def rank(self) -> int:
        """The largest rank among its pairs."""
        return max(a.shape[0] for a, _ in self.pairs.values())

    @property
    def own(self) -> dict[str, Any]:
        """Superego's metadata, without its prefix."""
        return own_metadata(self.header)

    def number(self, key: str, default: float) -> float:
        """One of Superego's own numbers; raises SuperegoError where it is none."""
        value = self.own.get(key, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SuperegoError(
                f"{self.path}: {PREFIX}{key} is {str(value)[:40]!r}, expected a number; the file "
                "is damaged"
            )
        return float(value)

    @property
    def name(self) -> str:
        """`general.name`, else the file's stem."""
        return self.header.text("general.name") or self.path.stem


def own_metadata(header: Header) -> dict[str, Any]:
    """Superego's keys and values of a file, without their prefix."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in header.metadata.items()
        if key.startswith(PREFIX)
    }


def write_adapter(
    path: Path, architecture: str, pairs: Pairs, metadata: Mapping[str, str | int | float]
) -> None:
    """Write a GGUF LoRA with F16 tensors, atomically; raises SuperegoError.

    alpha is the largest rank. llama.cpp multiplies each pair by alpha / its own rank, so the
    B of a pair of a smaller rank is stored divided by that: every pair acts as given.
    `metadata` holds full keys: text, whole numbers (written as u32) and floats (f32). Tensors
    whose LoRA llama.cpp would load and not apply are refused.
    """
    check_adaptable(architecture, pairs)
    alpha = max(a.shape[0] for a, _ in pairs.values())
    stored = {name: (a, b * (a.shape[0] / alpha)) for name, (a, b) in pairs.items()}
    write_stored(path, architecture, float(alpha), stored, metadata)


def write_stored(
    path: Path,
    architecture: str,
    alpha: float,
    stored: Pairs,
    metadata: Mapping[str, str | int | float | list[int]],
    kind: type[np.floating] | None = None,
) -> None:
    """As `write_adapter`, with an alpha of one's own and matrices as they stand in the file.

    Lists in `metadata` are written as arrays of u32. `kind` is float16, the default, or float32.
    """
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter

    kind = kind or np.float16
    check_text(path, metadata)
    check_adaptable(architecture, stored)
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)  # a u32 aborts llama.cpp
        for key, value in metadata.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                # llama.cpp takes unsigned 32-bit numbers here, and nothing else
                writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.UINT32)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        for name, pair in stored.items():
            for suffix, matrix in zip("ab", pair, strict=True):
                with np.errstate(over="ignore"):  # checked on the next line
                    values = np.ascontiguousarray(matrix, dtype=kind)
                if not np.isfinite(values).all():
                    raise SuperegoError(
                        f"{path}: {name}.lora_{suffix} overflows {np.dtype(kind).name}"
                    )
                writer.add_tensor(f"{name}.lora_{suffix}", values)
        write_out(writer, temporary)


def check_text(path: Path, metadata: Mapping[str, object]) -> None:
    """Refuse text that no file holds, as JSON may have it; raises SuperegoError."""
    for key, value in metadata.items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise SuperegoError(f"{path}: {key} would hold what is no UTF-8 text") from None


def write_out(writer: GGUFWriter, path: Path) -> None:
    """Write what was added to a GGUF writer to its `path`, and close it.

    Raises SuperegoError where the file is not whole then: numpy does not say so itself.
    """
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    try:
        read_header(path)
    except SuperegoError:
        raise SuperegoError(f"{path}: could not be written whole; is the disk full?") from None


def read_adapter(path: Path) -> Adapter:
    """Read an adapter and check everything that does not need a base; raises SuperegoError."""
    header = read_header(path)
    if header.text("general.architecture") == "controlvector":
        raise SuperegoError(
            f"{path}: is a control vector, and this takes LoRA adapters; chat, evaluate, inspect "
            "and superego.attach take control vectors"
        )
    if header.text("general.type", "model") != "adapter":
        raise SuperegoError(
            f"{path}: general.type is '{header.text('general.type', 'model')}', expected "
            "'adapter'; this is not a LoRA adapter"
        )
    if header.text("adapter.type") != "lora":
        raise SuperegoError(f"{path}: adapter.type is '{header.text('adapter.type')}', not 'lora'")
    alpha = header.metadata.get(_ALPHA, 0.0)
    if header.types.get(_ALPHA, FLOAT32) != FLOAT32:
        raise SuperegoError(
            f"{path}: adapter.lora.alpha is {str(alpha)[:40]}, expected a float32 "
            "(llama.cpp aborts on any other type)"
        )
    if not math.isfinite(alpha):
        raise SuperegoError(f"{path}: adapter.lora.alpha is {alpha}, expected a finite number")
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in header.tensors.items():
        stem, _, suffix = name.rpartition(".lora_")
        if suffix not in ("a", "b") or not stem:
            raise SuperegoError(
                f"{path}: tensor '{name}' is neither <base tensor>.lora_a nor .lora_b"
            )
        if tensor.type.name not in _FLOATS or len(tensor.shape) != 2:
            raise SuperegoError(
                f"{path}: tensor '{name}' is {tensor.type.name} {tensor.shape}, expected a "
                "two-dimensional F32, F16 or BF16 matrix"
            )
        halves.setdefault(stem, {})[suffix] = tensor
    lonely = sorted(stem for stem, found in halves.items() if len(found) != 2)
    if lonely:
        raise SuperegoError(f"{path}: {', '.join(lonely[:4])}: has only one of lora_a and lora_b")
    if not halves:
        raise SuperegoError(f"{path}: holds no LoRA tensors")
    for stem, found in halves.items():
        if found["a"].shape[0] != found["b"].shape[1]:
            raise SuperegoError(
                f"{path}: {stem}: lora_a has rank {found['a'].shape[0]}, lora_b "
                f"{found['b'].shape[1]}"
            )
    return Adapter(path, header, {stem: (found["a"], found["b"]) for stem, found in halves.items()})


def split_scale(text: str) -> tuple[Path, float | None]:
    """FILE or FILE:SCALE; a name with a colon of its own is taken as it is if it exists."""
    path, colon, scale = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return Path(text), None
    try:
        value = float(scale)
    except ValueError:
        return Path(text), None
    if not -100 <= value <= 100:
        raise SuperegoError(f"{text}: scale {scale} is not between -100 and 100")
    return Path(path), value


def mismatches(adapter: Adapter, base: Header) -> list[str]:
    """Everything that keeps this adapter from fitting this base: expected and found."""
    found = []
    if adapter.header.text("general.architecture") != base.text("general.architecture"):
        found.append(
            f"architecture: the adapter is for '{adapter.header.text('general.architecture')}', "
            f"the base is '{base.text('general.architecture')}'"
        )
    for name, (a, b) in sorted(adapter.pairs.items()):
        target = base.tensors.get(name)
        if target is None:
            found.append(f"{name}: the base has no such tensor")
            continue
        if target.shape != (b.shape[0], a.shape[1]):
            found.append(
                f"{name}: the adapter is for (out, in) = {(b.shape[0], a.shape[1])}, "
                f"the base has {target.shape}"
            )
        if name == "token_embd.weight" or (
            name == "output.weight" and "output.weight" not in base.tensors
        ):
            found.append(f"{name}: llama.cpp cannot apply a LoRA to a tied embedding")
    return found


def check_fit(adapter: Adapter, base: Header) -> None:
    """Raise SuperegoError with every mismatch, or for an adapter that is not all finite."""
    import numpy as np

    found = mismatches(adapter, base)
    if found:
        more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
        raise SuperegoError(
            f"{adapter.path}: was made for another base than {base.path}: "
            + "; ".join(found[:6])
            + more
            + "; compile the manifesto for this base"
        )
    for halves in adapter.pairs.values():
        for tensor in halves:
            if not np.isfinite(read_tensor(tensor)).all():
                raise SuperegoError(
                    f"{adapter.path}: {tensor.name} holds values that are not finite; the file "
                    "is damaged"
                )


class Recorded(Protocol):
    """What holds Superego's metadata: an adapter or a control vector."""

    @property
    def own(self) -> dict[str, Any]:
        """Keys without their prefix."""


def same_weights(adapter: Recorded, base: BaseModel) -> bool | None:
    """Whether it was made from exactly this file; None where it does not say."""
    recorded = adapter.own.get("base.fingerprint")
    return None if recorded is None else recorded == base.fingerprint
