"""Conditions in SQL as filters of Qdrant: those that it answers exactly, and no others."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping
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
    """What Qdrant calls a column, which has quotes where it is not one plain word."""
    return column if re.fullmatch(r"[A-Za-z0-9_-]+", column) else f'"{column}"'


def kind_of(arrow: str) -> str | None:
    """How the values of a column are compared; None where Qdrant does so otherwise than SQL, or not
    at all.
    """
    return next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, arrow)), None)


def to_filter(where: str, types: Mapping[str, str]) -> models.Filter:
    """A filter that is met by the points that meet a condition.

    NOT is moved inwards to the comparisons, each of which a missing value meets neither as it
    stands nor negated: that is SQL's logic of three values.
    """
    return models.Filter(must=[_Translation(types).of(parse_condition(where), True)])


class _Translation:
    def __init__(self, types: Mapping[str, str]) -> None:
        self._types = types

    def of(self, node: Any, positive: bool) -> Any:
        """What holds where a condition is true, or, where not `positive`, is false."""
        node = node.unnest()
        if isinstance(node, exp.Not):
            return self.of(node.this, not positive)
        if isinstance(node, (exp.And, exp.Or)):
            parts = [self.of(part, positive) for part in node.flatten()]
            both = isinstance(node, exp.And) == positive
            return models.Filter(must=parts) if both else models.Filter(should=parts)
        if isinstance(node, exp.Between):
            low = exp.GTE(this=node.this, expression=node.args["low"])
            high = node.args["high"]
            return self.of(
                exp.And(this=low, expression=exp.LTE(this=node.this, expression=high)), positive
            )
        if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
            column, _ = self._column(node.this)
            missing: list[Any] = [_is_null(column)]
            return models.Filter(must=missing) if positive else models.Filter(must_not=missing)
        if isinstance(node, exp.In) and node.expressions:
            return self._equal(node.this, node.expressions, positive)
        if isinstance(node, (exp.EQ, exp.NEQ)):
            left, right = _column_first(node)
            return self._equal(left, [right], isinstance(node, exp.EQ) == positive)
        if type(node) in _BOUND:
            return self._ordered(node, positive)
        if isinstance(node, exp.Column):
            return self._equal(node, [exp.true()], positive)
        _refuse(node)

    def _equal(self, left: Any, right: list[Any], positive: bool) -> models.Filter:
        column, kind = self._column(left)
        values = [self._value(one, column, kind) for one in right]
        if kind == "text":
            met: list[Any] = [
                models.FieldCondition(key=key_of(column), match=models.MatchAny(any=values))
            ]
        elif kind == "truth":
            met = [
                models.FieldCondition(key=key_of(column), match=models.MatchValue(value=one))
                for one in values
            ]
        else:
            met = [_range(column, kind, gte=value, lte=value) for value in values]
        return (
            models.Filter(should=met)
            if positive
            else models.Filter(must_not=[*met, _is_null(column)])
        )

    def _ordered(self, node: Any, positive: bool) -> models.FieldCondition:
        left, right = _column_first(node)
        bound = _BOUND[type(node)] if left is node.this.unnest() else _TURNED[_BOUND[type(node)]]
        column, kind = self._column(left)
        if kind not in ("number", "time"):
            _refuse(node)
        value = self._value(right, column, kind)
        return _range(column, kind, **{bound if positive else _OPPOSITE[bound]: value})

    def _column(self, node: Any) -> tuple[str, str]:
        node = node.unnest()
        if not isinstance(node, exp.Column):
            _refuse(node)
        if node.name not in self._types:
            raise invalid(f"where names {node.name!r:.80}; the columns: {', '.join(self._types)}")
        kind = kind_of(self._types[node.name])
        if kind is None:
            raise invalid(
                f"where names {node.name!r:.80}, which is {self._types[node.name]}; {ALLOWED}"
            )
        return node.name, kind

    def _value(self, node: Any, column: str, kind: str) -> Any:
        node = node.unnest()
        value = _READ[kind](node)
        if value is None:
            raise invalid(
                f"where compares {column!r:.80}, a {kind}, with {node.sql()!r:.100}; {ALLOWED}"
            )
        narrow: Any = {"float": np.float32, "halffloat": np.float16}.get(self._types[column])
        return float(narrow(value)) if narrow else value


def _column_first(node: Any) -> tuple[Any, Any]:
    left = node.this.unnest()
    right = node.expression.unnest()
    if not isinstance(left, exp.Column):
        left, right = right, left
    if not isinstance(left, exp.Column):
        _refuse(node)
    return left, right


def _number(node: Any) -> float | None:
    sign = 1
    if isinstance(node, exp.Neg):
        node = node.this.unnest()
        sign = -1
    if not isinstance(node, exp.Literal) or node.is_string:
        return None
    value = sign * float(node.this)
    return value if math.isfinite(value) and abs(value) < _EXACT else None


def _text(node: Any) -> str | None:
    return node.this if isinstance(node, exp.Literal) and node.is_string else None


def _truth(node: Any) -> bool | None:
    return bool(node.this) if isinstance(node, exp.Boolean) else None


def _time(node: Any) -> datetime.datetime | None:
    """A date, or a time without a zone, which is in UTC, as everywhere in conditions."""
    if isinstance(node, exp.Cast) and node.is_type("date", "timestamp"):
        node = node.this.unnest()
    text = _text(node)
    try:
        value = datetime.datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return None if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)


_READ: dict[str, Callable[[Any], Any]] = {
    "number": _number,
    "text": _text,
    "truth": _truth,
    "time": _time,
}


def _range(column: str, kind: str, **bounds: Any) -> models.FieldCondition:
    made = models.DatetimeRange(**bounds) if kind == "time" else models.Range(**bounds)
    return models.FieldCondition(key=key_of(column), range=made)


def _is_null(column: str) -> models.IsNullCondition:
    return models.IsNullCondition(is_null=models.PayloadField(key=key_of(column)))


def _refuse(node: Any) -> NoReturn:
    raise invalid(f"where has {node.sql()!r:.100}; {ALLOWED}")
