"""llama.cpp's own server out of the xllamacpp wheel, behind llama-server's command line.

Run as `python -m superego.wheel_server OPTIONS`. Knows xllamacpp's parameters. Takes only the
options that `superego serve` gives, in llama-server's spelling, so that one command serves
both. Does not know about personas.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from typing import Any


class _ListDevices(argparse.Action):
    """Prints what there is beside the CPU, as llama-server does, and ends."""

    def __call__(self, *given: object) -> None:
        import xllamacpp as x

        print("Available devices:")
        for device in x.get_device_info():
            if device["type"] != x.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU:
                print(f"  {device['name']}: {device['description']}")
        sys.exit(0)


def parser() -> argparse.ArgumentParser:
    """The options, spelled as llama-server spells them."""
    options = argparse.ArgumentParser(prog="superego.wheel_server", allow_abbrev=False)
    options.add_argument("-m", "--model", required=True)
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8080)
    options.add_argument("--lora", default="", help="adapters, separated by commas")
    options.add_argument("-c", "--ctx-size", type=int, default=0)
    options.add_argument("-np", "--parallel", type=int, default=1)
    options.add_argument("-cram", "--cache-ram", type=int, default=8192)
    options.add_argument("-t", "--threads", type=int)
    options.add_argument("-tb", "--threads-batch", type=int)
    options.add_argument("-ngl", "--gpu-layers", type=int, default=-1)
    options.add_argument("-ub", "--ubatch-size", type=int, default=512)
    options.add_argument("-fa", "--flash-attn", choices=["on", "off", "auto"], default="auto")
    options.add_argument("--no-kv-unified", action="store_true")
    options.add_argument("--no-warmup", action="store_true")
    options.add_argument("--no-ui", action="store_true")
    options.add_argument("--no-slots", action="store_true")
    options.add_argument("--list-devices", action=_ListDevices, nargs=0)
    return options


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM."""
    import xllamacpp as x

    options = parser().parse_args(arguments)
    parameters: Any = x.CommonParams()
    parameters.model.path = options.model
    parameters.hostname, parameters.port = options.host, options.port
    parameters.lora_adapters = [
        x.CommonAdapterLoraInfo(path, 1.0) for path in options.lora.split(",") if path
    ]
    parameters.n_ctx, parameters.n_parallel = options.ctx_size, options.parallel
    parameters.n_ubatch = options.ubatch_size
    parameters.cache_ram_mib = options.cache_ram
    if options.threads:
        parameters.cpuparams.n_threads = options.threads
        parameters.cpuparams_batch.n_threads = options.threads_batch or options.threads
    parameters.n_gpu_layers = options.gpu_layers
    parameters.flash_attn_type = getattr(
        x.llama_flash_attn_type,
        {"on": "LLAMA_FLASH_ATTN_TYPE_ENABLED", "off": "LLAMA_FLASH_ATTN_TYPE_DISABLED"}.get(
            options.flash_attn, "LLAMA_FLASH_ATTN_TYPE_AUTO"
        ),
    )
    parameters.kv_unified = not options.no_kv_unified
    parameters.warmup = not options.no_warmup
    parameters.ui = not options.no_ui
    parameters.endpoint_slots = not options.no_slots
    key = os.environ.get("LLAMA_API_KEY")  # as llama-server has it: a key is no argument
    if key:
        parameters.api_keys = [key]
    server = x.Server(parameters)
    print(f"listening on {server.listening_address}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
