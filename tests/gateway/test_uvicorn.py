"""`connections` stands on uvicorn's private protocol: what it overrides and uses of it is as in the
versions that pyproject.toml allows.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections import defaultdict
from pathlib import Path

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from radapter_serve.gateway import connections
from tests.helpers.fake_upstream import Served, until

# All methods with their parameters. A new one may be a callback that needs a limit, too.
METHODS: dict[type, str] = {
    HttpToolsProtocol: """__init__(config, server_state, app_state, _loop)
_get_upgrade()
_should_upgrade()
_should_upgrade_to_ws()
_start_asgi_task(cycle, app)
_unset_keepalive_if_required()
_unsupported_upgrade_warning()
connection_lost(exc)
connection_made(transport)
data_received(data)
eof_received()
handle_websocket_upgrade()
on_body(body)
on_header(name, value)
on_headers_complete()
on_message_begin()
on_message_complete()
on_response_complete()
on_url(url)
pause_writing()
resume_writing()
send_400_response(msg)
shutdown()
timeout_keep_alive_handler()""",
    RequestResponseCycle: """__init__(scope, transport, flow, logger, access_logger, access_log, \
default_headers, message_event, expect_100_continue, keep_alive, on_response)
receive()
run_asgi(app)
send(message)
send_500_response()""",
    FlowControl: """__init__(transport)
drain()
pause_reading()
pause_writing()
resume_reading()
resume_writing()""",
}


def methods(kind: type) -> list[str]:
    """Methods that a class defines, as `name(parameter, ...)`."""
    return sorted(
        f"{name}({', '.join([*inspect.signature(member).parameters][1:])})"
        for name, member in vars(kind).items()
        if inspect.isfunction(member)
    )


@pytest.mark.parametrize("kind", METHODS)
def test_uvicorn_has_the_methods_that_were_read(kind: type) -> None:
    assert methods(kind) == sorted(METHODS[kind].split("\n"))


def test_uvicorn_has_the_attributes_that_are_used(served: Served) -> None:
    source = Path(connections.__file__).read_text(encoding="utf-8")
    [connection] = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "_Connection"
    )
    # Attributes by what they are of, such as "self.cycle", and what the class defines itself
    used: dict[str, set[str]] = defaultdict(set)
    defined = {node.name for node in connection.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(connection):
        if isinstance(node, ast.Attribute):
            used[ast.unparse(node.value)].add(node.attr)
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {ast.unparse(target).removeprefix("self.") for target in targets}
    defined -= {"logger", "access_log"}  # uvicorn's, with other values
    with served.connection(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n") as it:
        it.recv(1)
        until(lambda: served.connections.open)
        [live] = served.connections.open
        state = ServerState()
        bare = HttpToolsProtocol(live.config, state, {}, asyncio.new_event_loop())
        for place, there in (
            ("self", bare),
            ("super()", bare),
            ("self.cycle", live.cycle),
            ("self.flow", live.flow),
            ("self.parser", live.parser),
        ):
            names = used.pop(place) - (defined if place == "self" else set())
            assert names and not {name for name in names if not hasattr(there, name)}, place
        assert {"tasks", "default_headers"} <= set(vars(state))
        bare.loop.close()
