"""Ctrl-C that is not lost: Python drops what is raised inside a callback from C, or a destructor.

Knows where Python reports what it drops. Does not know what is interrupted.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from typing import Any

_AGAIN = 0.02  # seconds; by then the callback is over


def _interrupt() -> None:
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)  # ends a wait too
    else:
        _thread.interrupt_main()


def keep_interrupts() -> None:
    """From now on an interrupt that Python would drop is raised again a moment later."""
    before = sys.unraisablehook
    if getattr(before, "keeps_interrupts", False):
        return

    def hook(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            timer = threading.Timer(_AGAIN, _interrupt)
            timer.daemon = True
            timer.start()
        else:
            before(dropped)

    hook.keeps_interrupts = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook
