"""What is wrong with an outcome, by the promise of its case."""

from __future__ import annotations

import json
import math
import re
import struct
from typing import Any

import numpy as np

from radapter_serve.gateway.errors import CODES
from tests.hostile.case import BROKEN, CHECKED, Case
from tests.hostile.wire import Answer, Outcome

_CODE = re.compile(r"\[([a-z_]+)\] \S")
_LEAK = re.compile(
    rb"Traceback|\w\.py\b|site-packages|/tmp|/work|/home|/root|/usr|/proc|/dev/shm|0x[0-9a-f]{8}|radapter_serve[._]"
)
_DTYPES = {"FP32": "<f4", "UINT16": "<u2"}


def trouble(case: Case, outcome: Outcome) -> str | None:
    """Why an outcome breaks the promise; None where it keeps it."""
    if outcome.how in ("hung", "refused"):
        return outcome.how
    if not outcome.answers:
        if outcome.rest:
            return "half an answer"
        return None if case.promise == BROKEN else f"{outcome.how} without an answer"
    answers = outcome.answers
    if case.promise == BROKEN and len(answers) == case.answers + 1 and _of_no_request(answers[-1]):
        answers = answers[:-1]  # what follows the body that was announced is no request
    if outcome.rest or len(answers) > case.answers:
        return "more than was asked for"
    if len(answers) < case.answers and case.promise != BROKEN:
        return f"{len(answers)} answers of {case.answers}"
    found = (_of_answer(case, answer) for answer in answers)
    return next((why for why in found if why), None)


def _of_no_request(answer: Answer) -> bool:
    """Whether this refuses what is no request, and ends the connection."""
    closes = answer.headers.get("connection") == "close"
    return answer.status == 400 and closes and b"no request of HTTP/1.1" in answer.body


def _of_answer(case: Case, answer: Answer) -> str | None:
    if 400 <= answer.status < 500:
        if answer.status == 429:
            return "429 where nothing is overloaded"
        bare = not answer.body and case.method == "HEAD"
        return None if bare else _of_error(answer)
    if answer.status == 200:
        if case.promise not in (CHECKED, BROKEN):
            return "answered as if it were right"
        return wrong(answer)
    if answer.status == 504 and b'"timeout"' in case.raw:  # as its caller wished
        return _of_error(answer)
    return f"status {answer.status}: {answer.body[:200].decode(errors='replace')}"


def _of_error(answer: Answer) -> str | None:
    """What is wrong with a refusal."""
    try:
        error = json.loads(answer.body)["error"]
        if isinstance(error, dict):  # OpenAI's form
            error = f"[{error['code']}] {error['message']}"
    except (ValueError, KeyError, TypeError):
        return f"a refusal without JSON: {answer.body[:100]!r}"
    found = _CODE.match(error)
    if not found or found[1] not in CODES:
        return f"a refusal without a code: {error[:100]}"
    if _LEAK.search(answer.body):
        return f"a refusal that tells too much: {error[:200]}"
    if len(answer.body) > 4000 or "\n" in error:
        return f"a refusal of {len(answer.body)} bytes or several lines"
    return None


def wrong(answer: Answer) -> str | None:
    """What is wrong with an answer that says it is right."""
    if "json" not in answer.headers.get("content-type", "") and "octet" not in answer.headers.get(
        "content-type", ""
    ):
        return None if answer.body.startswith(b"# HELP") else "an answer of an unknown kind"
    try:
        size = int(answer.headers.get("inference-header-content-length", len(answer.body)))
        head = json.loads(answer.body[:size])
        rest = answer.body[size:]
        if "object" in head:
            return _of_openai(head)
        if "outputs" not in head:
            return None if {"live", "ready", "name"} & set(head) else "an answer without outputs"
        for output in head["outputs"]:
            values, rest = _values(output, rest)
            if why := _of_output(output, values):
                return why
        return "bytes behind the outputs" if rest else None
    except (ValueError, KeyError, TypeError, struct.error) as error:
        return f"an answer that cannot be read ({error!r})"


def _of_openai(head: dict[str, Any]) -> str | None:
    """What is wrong with a list of embeddings, or of models."""
    if [one.get("index", place) for place, one in enumerate(head["data"])] != list(
        range(len(head["data"]))
    ):
        return "embeddings out of order"
    rows = [one["embedding"] for one in head["data"] if "embedding" in one]
    fine = np.allclose(np.linalg.norm(rows or [[1]], axis=-1), 1, atol=1e-3)
    return None if fine else "an embedding that is not of unit length"


def _values(output: dict[str, Any], rest: bytes) -> tuple[Any, bytes]:
    """The values of an output, and what stands behind them."""
    count = math.prod(output["shape"])
    if "data" in output:
        if len(output["data"]) != count:
            raise ValueError(f"{output['name']} has not {count} values")
        return output["data"], rest
    size = output["parameters"]["binary_data_size"]
    part = rest[:size]
    rest = rest[size:]
    if len(part) != size:
        raise ValueError(f"{output['name']} is cut")
    if output["datatype"] != "BYTES":
        return np.frombuffer(part, _DTYPES[output["datatype"]]).tolist(), rest
    texts = []
    while part:
        (length,) = struct.unpack_from("<I", part)
        texts.append(part[4 : 4 + length])
        part = part[4 + length :]
    if len(texts) != count:
        raise ValueError(f"{output['name']} has not {count} texts")
    return texts, rest


def _of_output(output: dict[str, Any], values: list[Any]) -> str | None:
    name = output["name"]
    if name in ("image_embeds", "text_embeds"):
        lengths = np.linalg.norm(np.reshape(values, output["shape"]), axis=-1)
        return (
            None
            if np.allclose(lengths, 1, atol=1e-3)
            else "an embedding that is not of unit length"
        )
    if name == "score":
        fine = all(-1.001 <= score <= 1.001 for score in values)
        return None if fine else "a score that is none"
    if name == "mask":
        return None if max(values, default=0) < 65_535 else "a mask that points to no label"
    return None
