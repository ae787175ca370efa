"""uvicorn with limits on idle and stalled connections."""

import asyncio

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from brisk.serving.api import IDLE

CONNECTIONS = 900  # fewer than the 1024 files that a process may usually open


class IdleProtocol(H11Protocol):
    """Closes a connection that sends no complete request, or reads nothing of a response, for
    `IDLE` seconds. uvicorn's own limit ends with the first byte of a request."""

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        close = self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(IDLE, close)

    def data_received(self, data):
        self.conn.receive_data(data)
        self.handle_events()  # keeps the timer running until the headers are complete

    def handle_events(self):
        super().handle_events()
        if self.conn.their_state is h11.DONE:  # keep reading: detects that the client disconnected
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > 2**16:  # of pipelined requests
                self.transport.abort()

    def pause_writing(self):
        super().pause_writing()
        self.stuck = self.loop.call_later(IDLE, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.stuck.cancel()


class Server(uvicorn.Server):
    """A server that closes `engine`, and so all open responses, when it is shut down."""

    def __init__(self, app, engine):
        limits = dict(timeout_keep_alive=IDLE, timeout_graceful_shutdown=2)
        logs = dict(log_level="warning", access_log=False, server_header=False)
        super().__init__(uvicorn.Config(app, http=IdleProtocol, lifespan="off", **limits, **logs))
        self.engine = engine

    async def shutdown(self, sockets=None):
        await asyncio.to_thread(self.engine.close)
        await super().shutdown(sockets)
