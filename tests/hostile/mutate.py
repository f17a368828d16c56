"""Mutations of right requests: of their structure, of their values, of their bytes and of HTTP."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

from tests.hostile import images
from tests.hostile.asks import LENGTH, Ask, as_text, pack, right

TEXTS = (
    *("", " ", "\0", "a\0b", "../../etc/passwd", "..\\..\\windows", "/etc/passwd", "%2e%2e%2f"),
    *("file:///etc/passwd", ".", "..", "~", "con", "a/b", "-rf", "$(id)", "`id`", "{}", "{}" * 5),
    *("{0.__class__}", "%s%n", "{{7*7}}", "'; DROP TABLE x; --", "1=1", "<script>", "\r\nX: y"),
    *("\u202e", "\ud800", "\ufeff", "\U0010ffff", "é", "猫" * 30, "a" * 1001, "b" * 10_001),
    *("," * 500, "nan", "null", "photos", "colours", "image_encoder", "[overloaded] x"),
)
NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 64, 65, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**62),
    *(2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e38, 1e39, 1e308),
    *(float("inf"), float("-inf"), float("nan")),
)
NAMES = (
    *("image", "text", "labels", "label_set", "templates", "top_k", "index", "where", "alpha"),
    *("threshold", "refine", "short_side", "stride", "proposals", "tokens", "nothing"),
)
DATATYPES = ("BYTES", "INT32", "INT64", "UINT8", "FP16", "FP32", "BOOL", "STRING", "bytes", "")
SIZES = (0, -1, 1, 2, 65, 2**31, 2**32, 2**62, 2**63, -(2**63), 1.5, "1", None, True)
WHERE = (
    *("width > 10 OR 1=1", "1/0", "width", "width > 'a'", "nothing = 1", "--", "/*", "\0"),
    *("path IN (SELECT path FROM photos)", "width > 10; DELETE FROM x", "(" * 1000, "width >"),
    *("NOT " * 500 + "width>1", " AND ".join(["width>1"] * 200), "path LIKE '" + "%a" * 400 + "'"),
    *("sleep(10)", "read_csv('/etc/passwd')", "path = '\ud800'", "width > " + "9" * 500),
    *("width BETWEEN 1 AND", "CAST(path AS INT) > 1", "x'00'", "1e999 > 1"),
)


def hostile(random: Random) -> tuple[str, bytes, bool]:
    """Kind and bytes of a hostile request, and whether HTTP itself is broken."""
    request = right(random)
    way = random.randrange(100)
    if way < 40:
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            random.choice(_CHANGES)(request, random)
        return "mutated structure", request.raw(), False
    if way < 60:
        _exchange_value(request, random)
        return "hostile values", request.raw(), False
    if way < 80:
        return "mutated bytes of a body", request.raw(damaged(request.body, random)), False
    noise = random.randbytes(random.choice([1, 10, 100, 1000, 20_000]))
    if way < 84:
        return "random bytes as a body", Ask(request.model, request.head).raw(noise), False
    if way < 86:
        request.tail = noise
        request.binary = True
        return "random bytes as tensors", request.raw(), False
    if way < 88:
        return "random bytes as HTTP", noise, True
    raw = request.raw()
    end = raw.index(b"\r\n\r\n") + 4
    if random.random() < 0.7:
        return "mutated bytes of HTTP", damaged(raw[:end], random) + raw[end:], True
    return "mutated bytes of HTTP", damaged(raw, random), True


def damaged(data: bytes, random: Random) -> bytes:
    """Flip, take out, double or put in some bytes."""
    changed = bytearray(data)
    snippets = [b"\0", b"\xff", b'"', b"[", b"{", b",", b"-", b"1e9", b"\r\n", b"\xed\xa0\x80"]
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
            changed[at:at] = random.choice(snippets)
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def _exchange_value(request: Ask, random: Random) -> None:
    """Exchange the values of one tensor for hostile ones, packed as they should be."""
    tensors = request.head["inputs"]
    place = random.randrange(len(tensors))
    tensor = tensors[place]
    count = max(1, len(tensor.get("data", [1])))
    if tensor["datatype"] != "BYTES":
        values: list[Any] = [random.choice(NUMBERS) for _ in range(count)]
    elif tensor["name"] == "image":
        values = [images.made(random.choice(list(images.small())))]
    else:
        pool = WHERE if tensor["name"] == "where" else TEXTS
        values = [random.choice(pool) for _ in range(count)]
    if not request.binary:
        tensor["data"] = [as_text(one) if isinstance(one, bytes) else one for one in values]
        return
    sizes = [one["parameters"]["binary_data_size"] for one in tensors]
    start = sum(sizes[:place])
    packed = random.randbytes(sizes[place])
    if tensor["datatype"] == "BYTES":
        packed = pack(values)
        tensor["shape"] = [*tensor["shape"][:-1], len(values)]
        tensor["parameters"]["binary_data_size"] = len(packed)
    request.tail = request.tail[:start] + packed + request.tail[start + sizes[place] :]


# Changes of structure, each of which takes what an earlier one has left


def _json(random: Random) -> Any:
    nested: Any = random.choice(NUMBERS)
    for _ in range(random.choice([2, 5, 300])):
        nested = [nested]
    odd: list[Any] = [None, True, False, {}, [], [[]], {"a": []}, nested]
    return random.choice([random.choice(TEXTS), random.choice(NUMBERS), random.choice(odd)])


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value in JSON, as its parent and its key."""
    keys: Any = ()
    if isinstance(tree, dict):
        keys = tree.keys()
    elif isinstance(tree, list):
        keys = range(len(tree))
    places: list[tuple[Any, Any]] = []
    for key in keys:
        places += [(tree, key), *_places(tree[key])]
    return places


def _tensor(request: Ask, random: Random) -> dict[str, Any]:
    inputs = request.head.get("inputs") if isinstance(request.head, dict) else None
    tensors = [one for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) else []
    return random.choice(tensors) if tensors else {}


def _replace(request: Ask, random: Random) -> None:
    if places := _places(request.head):
        tree, key = random.choice(places)
        tree[key] = _json(random)


def _remove(request: Ask, random: Random) -> None:
    if places := _places(request.head):
        tree, key = random.choice(places)
        del tree[key]


def _add(request: Ask, random: Random) -> None:
    trees = [request.head, *(tree[key] for tree, key in _places(request.head))]
    tree = random.choice([one for one in trees if isinstance(one, (dict, list))] or [{}])
    if isinstance(tree, dict):
        keys = ("name", "shape", "data", "parameters", "x", "", "priority", "sequence_id")
        tree[random.choice(keys)] = _json(random)
    else:
        tree.insert(random.randrange(len(tree) + 1), _json(random))


def _change_tensor(request: Ask, random: Random) -> None:
    tensor = _tensor(request, random)
    dims = random.choice([0, 1, 2, 2, 3, 9, 100, 10_000])
    shared = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
    changes: list[dict[str, Any]] = [
        {"name": random.choice(NAMES)},
        {"datatype": random.choice(DATATYPES)},
        {"shape": [random.choice(SIZES) for _ in range(dims)]},
        {"parameters": {"binary_data_size": random.choice(SIZES)}},
        {"parameters": {name: random.choice(["x", 0, 2**40]) for name in shared}},
    ]
    if isinstance(tensor.get("data"), list) and tensor["data"]:
        count = random.choice([0, 2, 3, 65, 300])
        shape = random.choice([[1, count], [count], [count, 1], [1, 1, count]])
        changes.append({"data": [tensor["data"][0]] * count, "shape": shape})
    tensor |= random.choice(changes)


def _twice(request: Ask, random: Random) -> None:
    if tensor := _tensor(request, random):
        request.head["inputs"].append(tensor)


def _lengths(request: Ask, random: Random) -> None:
    if random.random() < 0.3 or len(request.tail) <= 4:
        lengths = ("0", "-1", "1", "9" * 20, "abc", "", "1.5", "0x10", "²", " 5 ")
        request.headers[LENGTH] = random.choice(lengths)
        return
    at = random.randrange(len(request.tail) - 3)
    length = struct.pack("<I", random.choice([0, 1, 5, 2**16, 2**31, 2**32 - 1]))
    request.tail = request.tail[: random.choice([0, at])] + length + request.tail[at + 4 :]


def _outputs(request: Ask, random: Random) -> None:
    names = ("label", "score", "mask", "thumbnail", "id", "image_embeds", "nothing", *TEXTS[:6])
    shared = {"shared_memory_region": "x"}
    odd: list[Any] = [{}, {"binary_data": True}, {"classification": 5}, shared, None, 3]
    if isinstance(request.head, dict):
        request.head["outputs"] = [
            {"name": random.choice(names), "parameters": random.choice(odd)}
            for _ in range(random.choice([0, 1, 1, 2, 100]))
        ]


def _parameters(request: Ask, random: Random) -> None:
    names = ("timeout", "priority", "sequence_id", "sequence_start", "binary_data_output", "x")
    if isinstance(request.head, dict):
        request.head["parameters"] = {random.choice(names): _json(random)}


def _header(request: Ask, random: Random) -> None:
    names = ("Content-Type", "Content-Encoding", "Host", "Authorization", "Expect", LENGTH)
    values = (None, "", "gzip", "text/html", "multipart/form-data; boundary=x", "a" * 5000)
    request.headers[random.choice(names)] = random.choice([*values, "identity, gzip"])


def _path(request: Ask, random: Random) -> None:
    text = random.choice(["image_encoder", "text_encoder", "patch_encoder", *TEXTS])
    name = "".join(
        chr(one) if chr(one).isalnum() or one in b"./" else f"%{one:02x}"
        for one in text.encode("utf-8", "replace")[:2000]
    )
    versions = ("", "/versions/0", "/versions/-1", f"/versions/{2**63}", "/versions/1")
    model = random.choice([request.model, name])
    request.path = f"/v2/models/{model}{random.choice(versions)}/infer"


_CHANGES: list[Callable[[Ask, Random], None]] = [
    *[_replace] * 2,
    *[_remove] * 2,
    *[_change_tensor] * 5,
    *(_add, _twice, _lengths, _outputs, _parameters, _header, _path),
]
