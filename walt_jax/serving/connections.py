"""Connections of clients that are too slow: before a request's header, and while they read what they asked for."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0  # from a header's first byte, or from the connection, to its end
READING_SECONDS = 60.0  # without 64 KiB of an answer read


class Connection(H11Protocol):
    """HTTP/1.1 that does not wait for ever; bodies have their limits in `app.Guard`."""

    header_late: asyncio.TimerHandle | None = None
    reading_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts to wait for a header."""
        super().connection_made(transport)
        self._watch_header()

    def data_received(self, data: bytes) -> None:
        """Waits for a header that has begun."""
        super().data_received(data)
        self._watch_header()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self.reading_late = self.loop.call_later(READING_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self.reading_late = _cancelled(self.reading_late)

    def connection_lost(self, error: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(error)
        self.header_late = _cancelled(self.header_late)
        self.reading_late = _cancelled(self.reading_late)

    def _watch_header(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the header is there
            self.header_late = _cancelled(self.header_late)
        elif self.header_late is None:
            self.header_late = self.loop.call_later(HEADER_SECONDS, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
