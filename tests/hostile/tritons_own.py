"""The same requests, and hostile gRPC, against Triton's own ports: what comes of them is told, not
judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from tests.hostile.asks import pack
from tests.hostile.campaign import Report, Row, group, result
from tests.hostile.case import Case
from tests.hostile.generate import case, of_kind
from tests.hostile.images import made, small
from tests.hostile.mutate import DATATYPES, NAMES, TEXTS, damaged
from tests.hostile.wire import exchange
from tests.hostile.world import World

LIMIT = 5.0  # seconds after which a request counts as hanging
SERVER_DIED = "tritonserver died"
MODEL_DIED = "a model died"
HUNG = "hung"
_METHODS = (
    *(
        "ModelInfer",
        "ModelMetadata",
        "ModelConfig",
        "ModelReady",
        "ModelStatistics",
        "ServerMetadata",
    ),
    *(
        "RepositoryIndex",
        "RepositoryModelLoad",
        "SystemSharedMemoryRegister",
        "TraceSetting",
        "LogSettings",
    ),
    "NoSuchMethod",
)


def over_http(
    world: World, seed: int, count: int, seconds: float, progress: Callable[[int], None]
) -> Report:
    """Send hostile requests one by one, in any order; whatever dies or hangs is started again
    before the next. Those whose bodies the gateway throws away are left out: Triton waits for them.

    Args:
        world: with the server.
        seed: of the mutations, and of the order.
        count: the requests 0 to count - 1.
        seconds: after which no more are sent.
        progress: told how many are done.
    """
    report = Report()
    deadline = time.monotonic() + seconds
    numbers = sorted({*range(count)} - {*of_kind("refused body")})
    Random(seed).shuffle(numbers)
    for number in numbers:
        if time.monotonic() > deadline:
            break
        one = case(seed, number)
        outcome = exchange(world.triton, one, LIMIT)
        _count(world, report, one, result(outcome), outcome.seconds)
        progress(report.count)
    return report


def over_grpc(
    world: World, seed: int, count: int, seconds: float, progress: Callable[[int], None]
) -> Report:
    """Send hostile messages over gRPC, one by one; the arguments are those of `over_http`."""
    report = Report()
    address = world.server.grpc_url.removeprefix("grpc://")
    deadline = time.monotonic() + seconds
    for number in range(count):
        if time.monotonic() > deadline:
            break
        kind, method, message = hostile_message(Random(f"{seed}/grpc/{number}"))
        with grpc.insecure_channel(address) as channel:
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}", _as_is, _as_is)
            try:
                call(message, timeout=LIMIT, wait_for_ready=True)
                status = "OK"
            except grpc.RpcError as error:
                status = error.code().name
        _count(
            world,
            report,
            Case(kind, (message,)),
            HUNG if status == "DEADLINE_EXCEEDED" else status,
            0.0,
        )
        progress(report.count)
    return report


def hostile_message(random: Random) -> tuple[str, str, bytes]:
    """A kind, a method of Triton's service, and a message for it."""
    way = random.randrange(4)
    if way == 0:
        return (
            "random bytes",
            random.choice(_METHODS),
            random.randbytes(random.choice([0, 1, 10, 100, 10_000])),
        )
    message = _right(random)
    if way == 1:
        return (
            "mutated bytes",
            random.choice(["ModelInfer", *_METHODS]),
            damaged(message.SerializeToString(), random),
        )
    tensor = random.choice(message.inputs)
    if way == 2:
        del tensor.shape[:]
        sizes = (0, -1, 1, 2, 65, 2**31, 2**62, 2**63 - 1, -(2**63))
        tensor.shape.extend(random.choice(sizes) for _ in range(random.choice([0, 1, 2, 3, 1000])))
        if random.random() < 0.5:
            tensor.datatype = random.choice(DATATYPES)
        return "wrong shapes and types", "ModelInfer", message.SerializeToString()
    number = list(message.inputs).index(tensor)
    values: list[Any] = [
        random.choice(TEXTS) if random.random() < 0.5 else made(random.choice(list(small())))
    ]
    contents: list[bytes] = [pack(values), random.randbytes(50), b"", b"\xff" * 8]
    message.raw_input_contents[number] = random.choice(contents)
    if random.random() < 0.3:
        tensor.name = random.choice(NAMES)
    return "wrong values", "ModelInfer", message.SerializeToString()


def _right(random: Random) -> service_pb2.ModelInferRequest:
    model, name = random.choice(
        [
            ("embed_text", "text"),
            ("embed_image", "image"),
            ("retrieve", "text"),
            ("segment", "image"),
        ]
    )
    message = service_pb2.ModelInferRequest(model_name=model)
    names = [name] + (
        ["index"] if model == "retrieve" else ["labels"] if model == "segment" else []
    )
    for one in names:
        values: list[Any] = [made("odd image: one pixel") if one == "image" else "photos"]
        message.inputs.add(name=one, datatype="BYTES", shape=[1] * (1 if len(names) > 1 else 2))
        message.raw_input_contents.append(pack(values))
    return message


def _as_is(message: bytes) -> bytes:
    return message


def _count(world: World, report: Report, one: Case, found: str, seconds: float) -> None:
    if found in (HUNG, "closed", "reset", "refused", "UNAVAILABLE") or found.startswith("5"):
        found = _mended(world, found)
    row = report.rows.setdefault(group(one.kind), Row(one.promise))
    row.count += 1
    row.results[found] += 1
    row.slowest = max(row.slowest, seconds)


def _mended(world: World, found: str) -> str:
    """What died, if anything did; all is up again afterwards."""
    server = world.server
    failures = [failure.name for _ in range(2) for failure in server.failures()]
    if "tritonserver" in failures or (not failures and found == HUNG):
        server.restart()
    else:
        for name in set(failures):
            server.reload(name)
    if failures or found == HUNG:
        world.warm_up()
    if "tritonserver" in failures:
        return SERVER_DIED
    return MODEL_DIED if failures else found
