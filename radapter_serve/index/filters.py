"""Conditions in SQL as filters of Qdrant: those that it answers exactly, and no others."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from qdrant_client import models
from sqlglot import exp

from radapter_serve.contract.errors import invalid
from radapter_serve.index.conditions import parse_condition

ALLOWED = (
    "an index in Qdrant takes a column compared with a value by = <> < <= > >= IN BETWEEN (texts by"
    " = <> IN), IS NULL, AND, OR, NOT and brackets"
)
#: columns that every index has, as Arrow types
OWN = {"path": "string", "width": "int32", "height": "int32", "digest": "string"}
_KINDS = {  # Arrow types whose values Qdrant compares as SQL does
    "number": r"u?int(8|16|32|64)|halffloat|float|double",
    "text": r"(large_)?string",
    "truth": r"bool",
    "time": r"date32\[day\]|timestamp\[(s|ms|us)\]",
}
_BOUND = {exp.GT: "gt", exp.GTE: "gte", exp.LT: "lt", exp.LTE: "lte"}
_OPPOSITE = {"gt": "lte", "gte": "lt", "lt": "gte", "lte": "gt"}
_TURNED = {"gt": "lt", "gte": "lte", "lt": "gt", "lte": "gte"}  # 2020 < year is year > 2020
_EXACT = 2**53  # whole numbers up to here are floats, which Qdrant's ranges are


def key_of(column: str) -> str:
    """Qdrant's name of a column, in quotes unless it is one plain word."""
    return column if re.fullmatch(r"[A-Za-z0-9_-]+", column) else f'"{column}"'


def kind_of(arrow: str) -> str | None:
    """How the values of a column are compared; None where Qdrant does so otherwise than SQL, or not
    at all.
    """
    return next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, arrow)), None)


def to_filter(where: str, types: Mapping[str, str]) -> models.Filter:
    """Translate a condition on columns of these Arrow types into a filter."""
    return models.Filter(must=[_filter(parse_condition(where), types, True)])


def _filter(node: Any, types: Mapping[str, str], positive: bool) -> Any:
    """A filter that is met where a condition is true, or, if not `positive`, false.

    NOT is moved inwards to the comparisons. A missing value meets neither a comparison nor its
    negation: that is SQL's logic of three values.
    """
    node = node.unnest()
    match node:
        case exp.Not():
            return _filter(node.this, types, not positive)
        case exp.And() | exp.Or():
            parts = [_filter(part, types, positive) for part in node.flatten()]
            both = isinstance(node, exp.And) == positive
            return models.Filter(must=parts) if both else models.Filter(should=parts)
        case exp.Between():
            low = exp.GTE(this=node.this, expression=node.args["low"])
            high = exp.LTE(this=node.this, expression=node.args["high"])
            return _filter(exp.And(this=low, expression=high), types, positive)
        case exp.Is(expression=exp.Null()):
            column, _ = _column(node.this, types)
            missing: list[Any] = [_is_null(column)]
            return models.Filter(must=missing) if positive else models.Filter(must_not=missing)
        case exp.In() if node.expressions:
            return _equal(node.this, node.expressions, types, positive)
        case exp.EQ() | exp.NEQ():
            left, right = _column_first(node)
            return _equal(left, [right], types, isinstance(node, exp.EQ) == positive)
        case exp.Column():
            return _equal(node, [exp.true()], types, positive)
    if type(node) not in _BOUND:
        _refuse(node)
    left, right = _column_first(node)
    bound = _BOUND[type(node)]
    if left is not node.this.unnest():
        bound = _TURNED[bound]
    column, kind = _column(left, types)
    if kind not in ("number", "time"):
        _refuse(node)
    value = _value(right, column, kind, types)
    return _range(column, kind, **{bound if positive else _OPPOSITE[bound]: value})


def _equal(left: Any, right: list[Any], types: Mapping[str, str], positive: bool) -> models.Filter:
    """A filter that is met where a column has one of some values, or none of them."""
    column, kind = _column(left, types)
    key = key_of(column)
    values = [_value(node, column, kind, types) for node in right]
    met: list[Any]
    if kind == "text":
        met = [models.FieldCondition(key=key, match=models.MatchAny(any=values))]
    elif kind == "truth":
        matches = [models.MatchValue(value=value) for value in values]
        met = [models.FieldCondition(key=key, match=match) for match in matches]
    else:
        met = [_range(column, kind, gte=value, lte=value) for value in values]
    if positive:
        return models.Filter(should=met)
    return models.Filter(must_not=[*met, _is_null(column)])


def _column_first(node: Any) -> tuple[Any, Any]:
    left = node.this.unnest()
    right = node.expression.unnest()
    if not isinstance(left, exp.Column):
        left, right = right, left
    if not isinstance(left, exp.Column):
        _refuse(node)
    return left, right


def _column(node: Any, types: Mapping[str, str]) -> tuple[str, str]:
    """The name of a column, and its kind."""
    node = node.unnest()
    if not isinstance(node, exp.Column):
        _refuse(node)
    if node.name not in types:
        raise invalid(f"where names {node.name!r:.80}; the columns: {', '.join(types)}")
    kind = kind_of(types[node.name])
    if kind is None:
        raise invalid(f"where names {node.name!r:.80}, which is {types[node.name]}; {ALLOWED}")
    return node.name, kind


def _value(node: Any, column: str, kind: str, types: Mapping[str, str]) -> Any:
    """The value of a literal that a column of some kind is compared with."""
    literal = node.unnest()
    value: Any = None
    if kind == "truth" and isinstance(literal, exp.Boolean):
        value = bool(literal.this)
    elif kind == "number":
        sign = 1
        if isinstance(literal, exp.Neg):
            literal = literal.this.unnest()
            sign = -1
        if isinstance(literal, exp.Literal) and not literal.is_string:
            number = sign * float(literal.this)
            if math.isfinite(number) and abs(number) < _EXACT:
                value = number
    elif kind in ("text", "time"):
        if (
            kind == "time"
            and isinstance(literal, exp.Cast)
            and literal.is_type("date", "timestamp")
        ):
            literal = literal.this.unnest()
        if isinstance(literal, exp.Literal) and literal.is_string:
            value = literal.this if kind == "text" else _time(literal.this)
    if value is None:
        raise invalid(
            f"where compares {column!r:.80}, a {kind}, with {node.unnest().sql()!r:.100}; {ALLOWED}"
        )
    narrow: Any = {"float": np.float32, "halffloat": np.float16}.get(types[column])
    return float(narrow(value)) if narrow else value


def _time(text: str) -> datetime.datetime | None:
    """A date, or a time without a zone, which is in UTC, as everywhere in conditions."""
    try:
        value = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return None if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)


def _range(column: str, kind: str, **bounds: Any) -> models.FieldCondition:
    span = models.DatetimeRange(**bounds) if kind == "time" else models.Range(**bounds)
    return models.FieldCondition(key=key_of(column), range=span)


def _is_null(column: str) -> models.IsNullCondition:
    return models.IsNullCondition(is_null=models.PayloadField(key=key_of(column)))


def _refuse(node: Any) -> NoReturn:
    raise invalid(f"where has {node.sql()!r:.100}; {ALLOWED}")
