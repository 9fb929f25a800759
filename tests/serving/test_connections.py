"""Clients that do not read what they asked for, or never end a header, are dropped."""

import contextlib
import socket
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from walt_jax.serving import connections


@contextlib.contextmanager
def served(size):
    """The port of a server of an answer of so many bytes."""
    app = Starlette(routes=[Route("/", lambda request: Response(bytes(size)))])
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=connections.Connection, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], server
    server.should_exit = True
    thread.join(10)


def dropped(server, seconds=10):
    end = time.monotonic() + seconds
    while server.server_state.connections and time.monotonic() < end:
        time.sleep(0.02)
    return not server.server_state.connections


def test_who_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(connections, "READING_SECONDS", 0.3)
    with served(50 * 2**20) as (port, server):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            assert dropped(server)
        with socket.create_connection(("127.0.0.1", port)) as client:  # who reads gets all of it
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            total = 0
            while part := client.recv(2**20):
                total += len(part)
            assert total > 50 * 2**20


def test_who_never_ends_a_header_is_dropped(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with served(1) as (port, server), socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        while not server.server_state.connections:
            time.sleep(0.01)
        assert dropped(server)
