"""PEFT's adapter_config.json: read, and everything that a GGUF LoRA cannot carry refused by name.

Knows PEFT's settings and what they do to the arithmetic. Does not know tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superego.errors import SuperegoError

CONFIG = "adapter_config.json"
_MAX_BYTES = 8_000_000
_MAX_PATTERN = 500  # characters; they are regular expressions from a stranger's file
# Initializations that leave the base as it was. The others move a part of the base into the
# adapter, which then fits no unchanged base.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_REFUSED: dict[str, str] = {
    "use_dora": "DoRA scales each output by a learned magnitude",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
    "lora_bias": "the LoRA has a bias",
    "modules_to_save": "whole modules were trained",
    "trainable_token_indices": "embeddings of tokens were trained",
    "target_parameters": "parameters that are not modules were trained",
    "layer_replication": "layers were replicated",
    "layers_pattern": "the layers have a container of another name",
    "arrow_config": "Arrow chooses among adapters at every token",
    "kasa_config": "KaSA truncates the base's weights",
    "monteclora_config": "MonteCLoRA samples its weights",
}
_KNOWN_VARIANTS = {
    "use_rslora",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_config",
    "velora_config",  # changes the backward pass alone
    "runtime_config",
}


@dataclass(frozen=True)
class PeftConfig:
    """What decides the strength of each module's pair."""

    path: Path
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base: str  # base_model_name_or_path, "" where it is not said
    invocation: list[int]  # tokens that an activated LoRA waits for

    def rank_of(self, module: str) -> int:
        """The rank that PEFT would make this module's pair with."""
        return _match(self.rank_pattern, module, self.rank)

    def scaling(self, module: str) -> float:
        """What PEFT multiplies this module's B A by."""
        alpha, rank = _match(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that PEFT would take for a module."""
    key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module)), None)
    return default if key is None else patterns[key]


def read_config(folder: Path) -> PeftConfig:
    """Read and check a folder's configuration; raises SuperegoError naming what is refused."""
    path = folder / CONFIG
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise SuperegoError(f"{path}: is not a regular file; not a configuration")
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise SuperegoError(f"{path}: has over {_MAX_BYTES:,} bytes; not a configuration")
        data = json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise SuperegoError(
            f"{folder}: holds no {CONFIG}; expected a folder that peft's save_pretrained wrote"
        ) from None
    except OSError as error:
        raise SuperegoError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SuperegoError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise SuperegoError(f"{path}: expected a JSON object, found a {type(data).__name__}")
    kind = data.get("peft_type")
    if kind != "LORA":
        raise SuperegoError(f"{path}: peft_type is {kind!r}; a GGUF adapter can only hold LORA")
    refused = [f"{key} ({why})" for key, why in _REFUSED.items() if data.get(key)]
    if data.get("bias", "none") not in ("none", None):
        refused.append(f"bias {data['bias']!r} (the base's biases were trained)")
    init = data.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        refused.append(
            f"init_lora_weights {init!r} (it changes the base's weights; save the adapter with "
            "peft's path_initial_model_for_weight_conversion)"
        )
    refused += [
        f"{key} (a variant that is not known here)"
        for key, value in data.items()
        if value
        and (key.startswith("use_") or key.endswith("_config"))
        and key not in _KNOWN_VARIANTS
        and key not in _REFUSED
    ]
    if refused:
        raise SuperegoError(f"{path}: a GGUF adapter cannot carry " + "; ".join(refused))
    return PeftConfig(
        path=path,
        rank=_checked(path, "r", data.get("r"), _is_rank),
        alpha=_checked(path, "lora_alpha", data.get("lora_alpha"), _is_alpha),
        rslora=data.get("use_rslora") is True,
        rank_pattern=_patterns(path, "rank_pattern", data, _is_rank),
        alpha_pattern=_patterns(path, "alpha_pattern", data, _is_alpha),
        base=str(data.get("base_model_name_or_path") or ""),
        invocation=_tokens(path, data.get("alora_invocation_tokens")),
    )


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 20


def _is_alpha(value: object) -> bool:
    # alpha 0 makes an adapter that does nothing, and llama.cpp takes 0 for "no alpha given"
    return type(value) in (int, float) and math.isfinite(value) and value != 0  # type: ignore[arg-type]


def _checked(path: Path, key: str, value: Any, right: Callable[[object], bool]) -> Any:
    if not right(value):
        expected = "a positive whole number" if right is _is_rank else "a number that is not 0"
        raise SuperegoError(f"{path}: {key} is {value!r}, expected {expected}")
    return value


def _patterns(
    path: Path, key: str, data: Mapping[str, Any], right: Callable[[object], bool]
) -> dict[str, Any]:
    found = data.get(key) or {}
    if not isinstance(found, dict):
        raise SuperegoError(f"{path}: {key} is {found!r}, expected names with their values")
    for pattern, value in found.items():
        _checked(path, f"{key} of {pattern[:80]!r}", value, right)
        try:
            if len(pattern) > _MAX_PATTERN:
                raise re.error("it is too long")
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise SuperegoError(
                f"{path}: {key} has {pattern[:80]!r}, which is no regular expression: {error}"
            ) from None
    return found


def _tokens(path: Path, value: Any) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(t) is int and 0 <= t < 2**32 for t in value):
        raise SuperegoError(f"{path}: alora_invocation_tokens is not a list of token ids")
    return value
