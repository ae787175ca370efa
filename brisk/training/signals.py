"""Graceful shutdown on SIGINT, SIGTERM, SIGHUP and SIGUSR1: finish the step, save, exit."""

import os
import signal
from contextlib import contextmanager, suppress

from brisk.distributed.process_group import Ranks


class StopRequest:
    """The number of the first stop signal received, or None."""

    def __init__(self, prints=True):
        self.number, self.prints = None, prints

    def handle(self, number, frame):
        """Signal handler. A second Ctrl-C stops at once; a second SIGTERM does not, since a
        scheduler and torchrun each send one."""
        if self.number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        name = signal.Signals(number).name
        text = f"\n{name}: finishing this step, then saving; press Ctrl-C to stop immediately\n"
        if self.prints:
            with suppress(OSError):
                os.write(1, text.encode())  # print is not reentrant


@contextmanager
def stop_requests():
    """A context that handles these signals with a `StopRequest`. Only rank 0 prints. A SIGHUP that
    is ignored, as under nohup, stays ignored."""
    request, before = StopRequest(prints=Ranks.from_environment().is_main), {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows does not have them all
        ignored = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
        if number and not ignored:
            before[number] = signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
