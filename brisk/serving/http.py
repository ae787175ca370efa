"""HTTP by uvicorn, with limits on the time that a client may be idle or read nothing."""

import asyncio

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from brisk.serving.api import IDLE

CONNECTIONS = 900  # fewer than the 1024 files that a process may usually open


class IdleProtocol(H11Protocol):
    """A connection that is closed when no whole request has come on it for `IDLE` seconds, or when
    nothing of a response was taken. uvicorn's own limit ends with the first byte of a request."""

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        close = self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(IDLE, close)

    def data_received(self, data):
        self.conn.receive_data(data)
        self.handle_events()  # the timer runs until all headers of a request are here

    def handle_events(self):
        super().handle_events()
        if self.conn.their_state is h11.DONE:  # read on, to see when the client leaves
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > 2**16:  # of requests behind this one
                self.transport.abort()

    def pause_writing(self):
        super().pause_writing()
        self.stuck = self.loop.call_later(IDLE, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.stuck.cancel()


class Server(uvicorn.Server):
    """A server that closes `engine` when a signal ends it, and with it the open answers."""

    def __init__(self, app, engine):
        limits = dict(timeout_keep_alive=IDLE, timeout_graceful_shutdown=2)
        logs = dict(log_level="warning", access_log=False, server_header=False)
        super().__init__(uvicorn.Config(app, http=IdleProtocol, lifespan="off", **limits, **logs))
        self.engine = engine

    async def shutdown(self, sockets=None):
        await asyncio.to_thread(self.engine.close)
        await super().shutdown(sockets)
