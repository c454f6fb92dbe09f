"""Reasons to stop: a scheduler's signal, or a validation metric."""

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While it is entered, SIGTERM and SIGUSR1 ask training to stop instead of ending the process.

    Both are what schedulers send before they take a machine away. A launcher may pass on what each
    process has received already, so that a second signal means no more than the first.

    Python leaves signals to a process' main thread; in another one, nothing changes.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""

    def __call__(self) -> bool:
        """Whether one has come."""
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
