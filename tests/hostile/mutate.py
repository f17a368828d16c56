"""Mutations of right requests: of their structure, of their bytes, and of the whole message."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

from tests.hostile import images
from tests.hostile.asks import LENGTH, Ask, as_text, pack, right
from tests.hostile.case import BROKEN, CHECKED, Case

TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "../../etc/passwd",
        "..\\..\\windows",
        "/etc/passwd",
        "%2e%2e%2f",
        "file:///etc/passwd",
    ),
    *(
        ".",
        "..",
        "~",
        "con",
        "a/b",
        "-rf",
        "$(id)",
        "`id`",
        "{}",
        "{}" * 5,
        "{0.__class__}",
        "%s%n",
        "{{7*7}}",
    ),
    *(
        "'; DROP TABLE x; --",
        "1=1",
        "<script>",
        "\r\nX: y",
        "\u202e",
        "\ud800",
        "\ufeff",
        "\U0010ffff",
        "é",
        "猫" * 30,
    ),
    *(
        "a" * 1001,
        "b" * 10_001,
        "," * 500,
        "nan",
        "null",
        "photos",
        "colours",
        "image_encoder",
        "[overloaded] x",
    ),
)
NUMBERS = (
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        64,
        65,
        255,
        256,
        65_535,
        65_536,
        2**31 - 1,
        2**31,
        2**32,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
    ),
    *(
        -(2**31),
        -(2**63),
        10**400,
        0.5,
        -0.0,
        1e-320,
        1e38,
        1e39,
        1e308,
        float("inf"),
        float("-inf"),
        float("nan"),
    ),
)
NAMES = (
    *(
        "image",
        "text",
        "labels",
        "label_set",
        "templates",
        "top_k",
        "index",
        "where",
        "alpha",
        "threshold",
        "refine",
    ),
    *(
        "short_side",
        "stride",
        "proposals",
        "proposal_scores",
        "proposal_weight",
        "tokens",
        "nothing",
    ),
)
DATATYPES = (
    "BYTES",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "FP16",
    "FP32",
    "FP64",
    "BOOL",
    "STRING",
    "bytes",
    "",
)
WHERE = (
    *(
        "width > 10 OR 1=1",
        "1/0",
        "width",
        "width > 'a'",
        "nothing = 1",
        "path IN (SELECT path FROM photos)",
        "--",
        "/*",
    ),
    *(
        "width > 10; DELETE FROM x",
        "(" * 9 + "width>1" + ")" * 9,
        "(" * 1000,
        "NOT " * 500 + "width>1",
        "width >",
    ),
    *(
        " AND ".join(["width>1"] * 200),
        "path LIKE '" + "%a" * 400 + "'",
        "sleep(10)",
        "read_csv('/etc/passwd')",
        "\0",
    ),
    *(
        "path = '\ud800'",
        "width > " + "9" * 500,
        "width BETWEEN 1 AND",
        "CAST(path AS INT) > 1",
        "x'00'",
        "1e999 > 1",
    ),
)


def value(random: Random) -> Any:
    """Any JSON."""
    kind = random.randrange(8)
    if kind < 3:
        return random.choice(TEXTS)
    if kind < 6:
        return random.choice(NUMBERS)
    if kind == 6:
        return random.choice([None, True, False, {}, [], [[]], {"a": []}])
    nested: Any = random.choice(NUMBERS)
    for _ in range(random.choice([2, 5, 300])):
        nested = [nested]
    return nested


def of_structure(random: Random) -> Case:
    """A right request with one to three parts of its JSON, tensors or headers changed."""
    ask = right(random)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        name, change = random.choice(_CHANGES)
        change(ask, random)
    return Case(f"mutated structure: {name}", (ask.raw(),), CHECKED)


def of_values(random: Random) -> Case:
    """A right request with one value exchanged for a hostile one, packed as it should be."""
    ask = right(random)
    tensors = ask.head["inputs"]
    chosen = random.randrange(len(tensors))
    tensor = tensors[chosen]
    name = tensor["name"]
    count = max(1, len(tensor.get("data", [1])))
    if tensor["datatype"] != "BYTES":
        values: list[Any] = [random.choice(NUMBERS) for _ in range(count)]
    elif name == "image":
        values = [images.made(random.choice(list(images.small())))]
    else:
        pool = WHERE if name == "where" and random.random() < 0.8 else TEXTS
        values = [random.choice(pool) for _ in range(count)]
    if ask.binary and tensor["datatype"] == "BYTES":
        size = tensor["parameters"]["binary_data_size"]
        start = _start(ask, chosen)
        if random.random() < 0.2:
            values = [random.randbytes(random.choice([1, 10, 1000]))]
        packed = pack(values)
        tensor["shape"] = [*tensor["shape"][:-1], len(values)]
        tensor["parameters"]["binary_data_size"] = len(packed)
        ask.tail = ask.tail[:start] + packed + ask.tail[start + size :]
    elif ask.binary:
        size = tensor["parameters"]["binary_data_size"]
        start = _start(ask, chosen)
        ask.tail = ask.tail[:start] + random.randbytes(size) + ask.tail[start + size :]
    else:
        tensor["data"] = [as_text(one) if isinstance(one, bytes) else one for one in values]
    return Case(f"hostile values: {name}", (ask.raw(),), CHECKED)


def of_body(random: Random) -> Case:
    """A right request whose body has some bytes changed; the header tells its new length."""
    ask = right(random)
    body = damaged(ask.body, random)
    if random.random() < 0.2:
        body = damaged(body + right(random).body, random)
    end = min(len(body), len(ask.body) - len(ask.tail)) or 1
    raw = Ask(
        ask.model, None, binary=ask.binary, headers={LENGTH: str(end)} if ask.binary else {}
    ).raw(body)
    return Case("mutated bytes of the body", (raw,), CHECKED)


def of_message(random: Random) -> Case:
    """A right request with some of all its bytes changed, those of HTTP too."""
    raw = right(random).raw()
    end = raw.index(b"\r\n\r\n") + 4
    broken = (
        damaged(raw[:end], random) + raw[end:] if random.random() < 0.7 else damaged(raw, random)
    )
    return Case("mutated bytes of HTTP", (broken,), BROKEN, hang_up=0.3)


def of_noise(random: Random) -> Case:
    """Random bytes: as the whole message, as a body, or as a tensor."""
    noise = random.randbytes(random.choice([1, 10, 100, 1000, 20_000]))
    where = random.randrange(3)
    if where == 0:
        return Case("random bytes as HTTP", (noise,), BROKEN, hang_up=0.3)
    ask = right(random)
    if where == 1:
        return Case(
            "random bytes as a body",
            (ask.raw(noise) if not ask.binary else _plain(ask).raw(noise),),
        )
    ask.tail = noise
    ask.binary = True
    return Case("random bytes as tensors", (ask.raw(),), CHECKED)


def damaged(data: bytes, random: Random) -> bytes:
    """Some bytes flipped, taken out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5, 20])):
        at = random.randrange(len(changed) + 1)
        way = random.randrange(6)
        if way < 2 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif way == 2:
            del changed[at : at + random.choice([1, 2, 10, 100])]
        elif way == 3:
            changed[at:at] = changed[at : at + random.choice([1, 10, 100])]
        elif way == 4:
            changed[at:at] = random.choice(
                [b"\0", b"\xff", b'"', b"[", b"{", b",", b"-", b"1e9", b"\r\n", b"\xed\xa0\x80"]
            )
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def _plain(ask: Ask) -> Ask:
    return Ask(ask.model, ask.head)


def _start(ask: Ask, chosen: int) -> int:
    sizes = [tensor["parameters"]["binary_data_size"] for tensor in ask.head["inputs"][:chosen]]
    return sum(size for size in sizes if isinstance(size, int))


# Changes of structure. All take what an earlier change has left.


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    keys = (
        tree.keys()
        if isinstance(tree, dict)
        else range(len(tree))
        if isinstance(tree, list)
        else ()
    )
    for key in keys:
        found += [(tree, key), *_places(tree[key])]
    return found


def _replace(ask: Ask, random: Random) -> None:
    if places := _places(ask.head):
        tree, key = random.choice(places)
        tree[key] = value(random)


def _remove(ask: Ask, random: Random) -> None:
    if places := _places(ask.head):
        tree, key = random.choice(places)
        del tree[key]


def _add(ask: Ask, random: Random) -> None:
    trees = [ask.head, *(tree[key] for tree, key in _places(ask.head))]
    tree = random.choice([one for one in trees if isinstance(one, (dict, list))] or [{}])
    if isinstance(tree, dict):
        tree[
            random.choice(
                ["name", "shape", "data", "parameters", "x", "", "priority", "sequence_id"]
            )
        ] = value(random)
    else:
        tree.insert(random.randrange(len(tree) + 1), value(random))


def _tensors(ask: Ask) -> list[dict[str, Any]]:
    inputs = ask.head.get("inputs") if isinstance(ask.head, dict) else None
    return [one for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) else []


def _tensor(key: str, values: tuple[Any, ...]) -> Callable[[Ask, Random], None]:
    def change(ask: Ask, random: Random) -> None:
        if tensors := _tensors(ask):
            random.choice(tensors)[key] = random.choice(values)

    return change


def _shape(ask: Ask, random: Random) -> None:
    if tensors := _tensors(ask):
        sizes = (0, -1, 1, 2, 65, 2**31, 2**32, 2**62, 2**63, -(2**63), 1.5, "1", None, True)
        dims = random.choice([0, 1, 2, 2, 3, 9, 100, 10_000])
        shape = [random.choice(sizes) for _ in range(dims)]
        random.choice(tensors)["shape"] = random.choice(
            [shape, [2**62, 2**62], [2**32, 2**32], [1] * 1000]
        )


def _twice(ask: Ask, random: Random) -> None:
    if tensors := _tensors(ask):
        ask.head["inputs"].append(random.choice(tensors))


def _lengths(ask: Ask, random: Random) -> None:
    """What is told of sizes: of binary tensors, of the JSON, of the texts in a tensor."""
    way = random.randrange(3)
    if way == 0:
        ask.headers[LENGTH] = random.choice(
            ["0", "-1", "1", "99999999999999999999", "abc", "", "1.5", "0x10", "²", " 5 "]
        )
    elif way == 1 and (tensors := _tensors(ask)):
        size = random.choice([0, 1, 3, -1, 2**31, 2**40, 2**63, None, "4", 1.0, True])
        random.choice(tensors)["parameters"] = {"binary_data_size": size}
    elif len(ask.tail) > 4:
        at = random.randrange(len(ask.tail) - 3)
        length = struct.pack("<I", random.choice([0, 1, 5, 2**16, 2**31, 2**32 - 1]))
        ask.tail = ask.tail[: 0 if random.random() < 0.5 else at] + length + ask.tail[at + 4 :]


def _outputs(ask: Ask, random: Random) -> None:
    if isinstance(ask.head, dict):
        names = (
            "label",
            "score",
            "mask",
            "thumbnail",
            "id",
            "image_embeds",
            "text_embeds",
            "nothing",
            *TEXTS[:6],
        )
        parameters: Any = [
            {},
            {"binary_data": True},
            {"classification": 5},
            {"shared_memory_region": "x"},
            None,
            3,
        ]
        ask.head["outputs"] = [
            {"name": random.choice(names), "parameters": random.choice(parameters)}
            for _ in range(random.choice([0, 1, 1, 2, 100]))
        ]


def _parameters(ask: Ask, random: Random) -> None:
    names = (
        "timeout",
        "priority",
        "sequence_id",
        "sequence_start",
        "binary_data_output",
        "headers",
        "x",
    )
    shared = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
    if isinstance(ask.head, dict) and random.random() < 0.6:
        ask.head["parameters"] = {random.choice(names): value(random)}
    elif tensors := _tensors(ask):
        random.choice(tensors)["parameters"] = {
            name: random.choice(["x", 0, 2**40]) for name in shared
        }


def _header(ask: Ask, random: Random) -> None:
    name = random.choice(
        [
            "Content-Type",
            "Content-Encoding",
            "Accept-Encoding",
            "Host",
            "Authorization",
            "Expect",
            LENGTH,
        ]
    )
    values = (
        "",
        "gzip",
        "deflate",
        "text/html",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
    )
    ask.headers[name] = random.choice(
        [None, *values, "a" * 5000, "identity, gzip", "application/json; charset=utf-16"]
    )


def _path(ask: Ask, random: Random) -> None:
    name = random.choice(["image_encoder", "text_encoder", "patch_encoder", *TEXTS]).encode(
        "utf-8", "replace"
    )
    model = "".join(
        chr(one) if chr(one).isalnum() or one in b"./" else f"%{one:02x}" for one in name[:2000]
    )
    version = random.choice(
        ["", "/versions/0", "/versions/-1", f"/versions/{2**63}", "/versions/1", "/versions/x"]
    )
    ask.path = f"/v2/models/{random.choice([ask.model, model])}{version}/infer"


def _reshaped(ask: Ask, random: Random) -> None:
    """As many rows, labels or texts as were never meant, with the data to them."""
    if tensors := [
        one for one in _tensors(ask) if isinstance(one.get("data"), list) and one["data"]
    ]:
        tensor = random.choice(tensors)
        count = random.choice([0, 2, 3, 65, 300])
        tensor["data"] = [tensor["data"][0]] * count
        tensor["shape"] = random.choice([[1, count], [count], [count, 1], [1, 1, count]])


_CHANGES: list[tuple[str, Callable[[Ask, Random], None]]] = [
    ("a value", _replace),
    ("a value", _replace),
    ("something missing", _remove),
    ("something missing", _remove),
    ("something more", _add),
    ("a tensor's name", _tensor("name", NAMES)),
    ("a tensor's type", _tensor("datatype", DATATYPES)),
    ("a tensor's shape", _shape),
    ("a tensor twice", _twice),
    ("lengths", _lengths),
    ("outputs", _outputs),
    ("parameters", _parameters),
    ("HTTP headers", _header),
    ("paths", _path),
    ("counts", _reshaped),
]
