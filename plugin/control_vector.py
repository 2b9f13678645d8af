"""Control vectors (GGUF): written, read, and checked against a base before C++ sees them.

Knows llama.cpp's format: one F32 vector a layer, added to the residual stream behind it, at every
token. `direction.N` is added behind layer N counted from 0, and layer 0 never has one. Does not
know how a vector was made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superego.adapter import check_text, own_metadata, write_out
from superego.atomic import replacing
from superego.errors import SuperegoError
from superego.gguf_file import Header, read_header, read_tensor

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.([1-9]\d{0,4})")


@dataclass(frozen=True)
class ControlVector:
    """A control vector whose own structure has been checked."""

    path: Path
    header: Header
    directions: dict[int, np.ndarray]  # layer, counted from 0 -> (n_embd,) float32

    @property
    def own(self) -> dict[str, Any]:
        """Superego's metadata, without its prefix."""
        return own_metadata(self.header)

    @property
    def name(self) -> str:
        """`general.name`, else the file's stem."""
        return self.header.text("general.name") or self.path.stem

    @property
    def width(self) -> int:
        """Values of one direction: the base's embedding length."""
        return len(next(iter(self.directions.values())))


def is_vector(header: Header) -> bool:
    """Whether a GGUF says that it is a control vector."""
    return header.text("general.architecture") == ARCHITECTURE


def write_vector(
    path: Path,
    model_hint: str,
    directions: Mapping[int, np.ndarray],
    metadata: Mapping[str, str | int | float],
) -> None:
    """Write directions (n_embd,) by layer, counted from 0, atomically; raises SuperegoError.

    `model_hint` is the base's architecture; llama.cpp's loader checks nothing of it.
    """
    import numpy as np
    from gguf import GGUFWriter

    check_text(path, metadata)
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_int32(f"{ARCHITECTURE}.layer_count", len(directions))
        for key, value in metadata.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        for layer, direction in sorted(directions.items()):
            if layer < 1 or not np.isfinite(direction).all():
                raise SuperegoError(f"{path}: direction of layer {layer} cannot be written")
            writer.add_tensor(f"direction.{layer}", direction.astype(np.float32))
        write_out(writer, temporary)


def read_vector(path: Path) -> ControlVector:
    """Read a control vector and check everything that needs no base; raises SuperegoError."""
    import numpy as np

    header = read_header(path)
    if not is_vector(header):
        raise SuperegoError(
            f"{path}: general.architecture is '{header.text('general.architecture')}', expected "
            f"'{ARCHITECTURE}'; this is not a control vector"
        )
    directions: dict[int, np.ndarray] = {}
    width = None
    for name, tensor in header.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise SuperegoError(
                f"{path}: tensor '{name}' is not direction.<layer>, from layer 1 on"
            )
        if tensor.type.name != "F32" or len(tensor.shape) != 1 or not tensor.shape[0]:
            raise SuperegoError(
                f"{path}: tensor '{name}' is {tensor.type.name} {tensor.shape}, expected a "
                "one-dimensional F32 vector"
            )
        width = width or tensor.shape[0]
        if tensor.shape[0] != width:
            raise SuperegoError(
                f"{path}: tensor '{name}' has {tensor.shape[0]} values, another has {width}"
            )
        values = read_tensor(tensor)
        if not np.isfinite(values).all():
            raise SuperegoError(f"{path}: tensor '{name}' holds values that are not finite")
        directions[int(match[1])] = np.array(values, np.float32)
    if not directions:
        raise SuperegoError(f"{path}: holds no direction.<layer> tensors")
    return ControlVector(path, header, directions)


def vector_mismatches(vector: ControlVector, base: Header) -> list[str]:
    """Everything that keeps this vector from fitting this base: expected and found.

    llama.cpp itself leaves out directions of layers that are not there without a word.
    """
    architecture = base.text("general.architecture")
    width = base.metadata.get(f"{architecture}.embedding_length")
    n_layer = base.metadata.get(f"{architecture}.block_count")
    found = []
    if vector.width != width:
        found.append(f"its directions have {vector.width} values, the base's streams {width}")
    last = max(vector.directions)
    if isinstance(n_layer, int) and last >= n_layer:
        found.append(
            f"direction.{last} is for a model of {last + 1} layers or more, the base has {n_layer}"
        )
    return found
