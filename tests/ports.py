"""Ports for a server that a test starts."""

from __future__ import annotations

import socket


def free_ports() -> tuple[int, int, int]:
    """Three ports that are free on loopback."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    first, second, third = (listener.getsockname()[1] for listener in sockets)
    for listener in sockets:
        listener.close()
    return first, second, third
