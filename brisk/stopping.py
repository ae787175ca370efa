"""Ctrl-C and its kin: a run finishes its step and saves before it leaves."""

import signal
from contextlib import contextmanager

from brisk.distributed import Ranks


class StopRequest:
    """The first signal to stop that came, as a number, or None."""

    number = None

    def note(self, number, frame):
        if self.number is not None:  # the second time somebody means it
            raise KeyboardInterrupt
        self.number = number
        name = signal.Signals(number).name
        print(f"\n{name}: finishing this step, then saving; once more to stop at once", flush=True)


@contextmanager
def stop_requests():
    """Take note of SIGINT, SIGTERM and SIGUSR1 instead of dying of them. Several processes under
    torchrun are left to it: they would have to stop at the same step."""
    request, before = StopRequest(), {}
    names = ("SIGINT", "SIGTERM", "SIGUSR1") if Ranks.from_environment().is_alone else ()
    for name in names:
        if hasattr(signal, name):  # Windows has no SIGUSR1
            number = getattr(signal, name)
            before[number] = signal.signal(number, request.note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
