"""How a run is stopped: SIGTERM and Ctrl-C end it at a moment at which everything is saved."""

import contextlib
import os
import signal
import time

PATIENCE = 2.0  # seconds in which further signals are the same request


class Stopped(BaseException):
    """The run was asked to end, and has saved what it had."""


class Stop:
    """SIGTERM and SIGINT: noted while an update or a save is under way, else the end at once: all is saved then.

    Another signal after `PATIENCE` ends the process whatever it is doing; sooner, it is the same request come twice."""

    def __init__(self):
        self.requested: str | None = None
        self.when = 0.0
        self.held = False
        self.pid = os.getpid()

    def __enter__(self):
        """Signals come here until the end. Not in a thread, where Python forbids it."""
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):
                self.before[number] = signal.signal(number, self)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame) -> None:
        again, now = self.requested is not None, time.monotonic()
        if os.getpid() != self.pid or (again and now - self.when > PATIENCE):      # a forked process; no patience left
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if again:
            return
        self.requested, self.when = signal.Signals(number).name, now
        if not self.held:
            raise Stopped(self.requested)

    @contextlib.contextmanager
    def hold(self):
        """While this lasts a signal waits; afterwards it is obeyed."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        if self.requested:
            raise Stopped(self.requested)
