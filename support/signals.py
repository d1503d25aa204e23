"""How a command is stopped: SIGTERM and Ctrl-C (SIGINT) end it; a run, at a moment at which all is saved.

And how a run's loading processes are: by the run, and by its death.
"""

import contextlib
import os
import signal
import threading
import time

PATIENCE = 2.0    # seconds in which further signals count as the same request
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PARENT_SECONDS = 0.5    # between two looks of a loading process whether its parent lives


class Stopped(BaseException):
    """The run was asked to end, and has saved what it had; or another command, which leaves no half files.

    No Exception, so no handler takes it."""


def exit_code(name: str) -> int:
    """Of a command that a signal has ended, as shells count: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + signal.Signals[name]


class Stop:
    """Handles SIGTERM and SIGINT inside `with Stop() as stop:`. `requested` is the signal's name, or None.

    Inside `with stop.hold():`, around updates and saves, a signal is only noted. Elsewhere it raises Stopped
    at once, because everything is saved there. A signal that comes more than PATIENCE after the first ends
    the process whatever it is doing; an earlier one is the same request, which torchrun passes on a second
    time."""

    def __init__(self):
        self.requested: str | None = None
        self.requested_at = 0.0    # time.monotonic
        self.holding = False
        self.pid = os.getpid()

    def __enter__(self):
        self.previous_handlers = {}
        for number in SIGNALS:
            with contextlib.suppress(ValueError):    # Python has no handlers in a thread
                self.previous_handlers[number] = signal.signal(number, self)
        return self

    def __exit__(self, *error):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def __call__(self, number, frame) -> None:
        """The handler. Errors: Stopped, unless `hold` lasts or the request is known."""
        now = time.monotonic()
        impatient = self.requested is not None and now - self.requested_at > PATIENCE
        if impatient or os.getpid() != self.pid:    # a forked process, such as a loader, has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.requested is not None:
            return
        self.requested, self.requested_at = signal.Signals(number).name, now
        if not self.holding:
            raise Stopped(self.requested)

    @contextlib.contextmanager
    def hold(self):
        """Keeps signals waiting until its end. Errors: Stopped at its end, if one came."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.requested:
            raise Stopped(self.requested)


@contextlib.contextmanager
def signals_wait():
    """Keeps signals waiting, also in processes that start inside, until they have begun by `end_with_parent`.

    Otherwise one that comes between their fork and that ends them, and the run with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(worker: int) -> None:
    """Begins a loading process: it leaves signals to the main process, and ends as soon as that is gone.

    torchrun, SLURM and a terminal signal every process of a run. The main one then finishes its update with
    what is loaded here, saves, and ends this process. Where it is killed it cannot, and PyTorch's own watch
    does not help: an orphan whose queue is full waits for ever to empty it, because its siblings keep the
    pipe open (torch 2.11)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=watch, daemon=True).start()
