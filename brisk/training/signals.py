"""Ctrl-C and its kin: a run finishes its step and saves before it leaves."""

import os
import signal
from contextlib import contextmanager, suppress

from brisk.distributed.process_group import Ranks


class StopRequest:
    """The first signal to stop that came, as a number, or None."""

    def __init__(self, speaks=True):
        self.number, self.speaks = None, speaks

    def note(self, number, frame):
        """Take note of a signal; the second Ctrl-C is a person who means it. (A second SIGTERM is
        not: a scheduler and torchrun each send one.)"""
        if self.number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        name = signal.Signals(number).name
        text = f"\n{name}: finishing this step, then saving; Ctrl-C now stops at once\n"
        if self.speaks:
            with suppress(OSError):
                os.write(1, text.encode())  # print would fail where the signal came amid another


@contextmanager
def stop_requests():
    """Take note of SIGINT, SIGTERM and SIGUSR1 instead of dying of them. Of several processes under
    torchrun the main one speaks."""
    request, before = StopRequest(speaks=Ranks.from_environment().is_main), {}
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            number = getattr(signal, name)
            before[number] = signal.signal(number, request.note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
