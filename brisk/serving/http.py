"""HTTP by uvicorn, with a limit on the time that a connection may be idle."""

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from brisk.serving.api import IDLE

CONNECTIONS = 1024


class IdleProtocol(H11Protocol):
    """A connection that is closed when no request has come on it for `IDLE` seconds: uvicorn's own
    limit begins after the first request, and ends with the first byte of the next."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.answered, self.timer = None, self.loop.call_later(IDLE, self.check)

    def check(self):
        if self.cycle and not (self.cycle.response_complete and self.cycle is self.answered):
            self.answered, self.timer = self.cycle, self.loop.call_later(IDLE, self.check)
        else:
            self.transport.close()

    def connection_lost(self, exc):
        self.timer.cancel()
        super().connection_lost(exc)


def make_server(app):
    """A `uvicorn.Server`; its `run(sockets=[…])` ends with a signal."""
    limits = {"limit_concurrency": CONNECTIONS, "timeout_keep_alive": IDLE}
    limits["timeout_graceful_shutdown"] = 2  # seconds for answers that are under way
    logs = {"log_level": "warning", "access_log": False, "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, http=IdleProtocol, lifespan="on", **limits, **logs))
