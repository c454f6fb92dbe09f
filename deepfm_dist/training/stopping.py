"""Signals that ask training to stop."""

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Context in which SIGTERM and SIGUSR1 ask training to stop instead of ending the process.

    Schedulers send both before they take a machine away. A launcher may forward a signal that the
    process has already received, so a second one means the same as the first. Python delivers
    signals to the main thread only; in other threads this does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        return self.received is not None

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {
            s: signal.signal(s, self._note) for s in (SIGNALS if is_main else ())
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
