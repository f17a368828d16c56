"""An HTTP server in the process of a test, whose answers a function gives."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]  # status, headers and body


@contextmanager
def listening(answer: Callable[[BaseHTTPRequestHandler, bytes], Answer | None]) -> Iterator[int]:
    """Serve what a function answers to a request and its body, where None breaks the connection;
    yields the port. At the end connections that are open get no more answers.
    """
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer on a kept connection takes 40 ms

        def log_message(self, *_: object) -> None:
            pass

        def _any(self) -> None:
            if ended.is_set():
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            reply = answer(self, body)
            if reply is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any  # names of the base class

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a caller that gave up
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            ended.set()
            server.shutdown()
            thread.join()


@contextmanager
def answering(answer: Callable[[str, str, Message, bytes], Answer]) -> Iterator[int]:
    """Serve what a function answers to a method, a path, headers and a body; yields the port."""
    with listening(
        lambda handler, body: answer(
            handler.command, unquote(urlsplit(handler.path).path), handler.headers, body
        )
    ) as port:
        yield port
