"""Which rows of a table meet a condition, by Arrow's own functions on its columns.

A comparison with NULL is neither true nor false, as in SQL; NaN is equal to itself and greater than
all other numbers, as in DataFusion and PostgreSQL.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from sqlglot import exp

from radapter_serve.contract.errors import invalid, redact
from radapter_serve.index.condition import ALLOWED, parse_condition
from radapter_serve.index.store import EXACT

Values = Any  # an Arrow ChunkedArray or Scalar
Types = exp.DataType.Type

_NUMBERS = {
    **{Types.TINYINT: pa.int8(), Types.SMALLINT: pa.int16(), Types.INT: pa.int32()},
    **{Types.BIGINT: pa.int64(), Types.UTINYINT: pa.uint8(), Types.USMALLINT: pa.uint16()},
    **{Types.UINT: pa.uint32(), Types.UBIGINT: pa.uint64()},
    **{Types.FLOAT: pa.float32(), Types.DOUBLE: pa.float64()},
}
_CAST = {
    **_NUMBERS,
    **dict.fromkeys((Types.TEXT, Types.VARCHAR, Types.CHAR), pa.string()),
    **{Types.BOOLEAN: pa.bool_(), Types.DATE: pa.date32(), Types.TIMESTAMP: pa.timestamp("us")},
}
_COMPARED: dict[type, Callable[[Values, Values], Values]] = {
    exp.EQ: pc.equal,
    exp.NEQ: pc.not_equal,
    exp.LT: pc.less,
    exp.LTE: pc.less_equal,
    exp.GT: pc.greater,
    exp.GTE: pc.greater_equal,
}
_TURNED = {exp.LT: exp.GT, exp.LTE: exp.GTE}
_COMPUTED: dict[type, Callable[[Values, Values], Values]] = {
    exp.Add: pc.add,
    exp.Sub: pc.subtract,
    exp.Mul: pc.multiply,
    exp.Div: pc.divide,
}


class Met:
    """The rows that meet a condition.

    Args:
        marks: bool [N].

    Attributes:
        count: how many rows they are.
        bits: uint8 [N / 8], one bit a row, the lowest of a byte first.
    """

    def __init__(self, marks: NDArray[np.bool_]) -> None:
        self.count = int(np.count_nonzero(marks))
        self.bits = np.packbits(marks, bitorder="little")
        self._size = len(marks)
        self._few = np.flatnonzero(marks) if self.count <= EXACT else None

    @property
    def positions(self) -> NDArray[np.int64]:
        """Where they are, int64 [count]; of few rows they are kept."""
        if self._few is not None:
            return self._few
        marks = np.unpackbits(self.bits, count=self._size, bitorder="little")
        return np.flatnonzero(marks)

    def count_of(self, positions: NDArray[np.int64]) -> int:
        """How many of some rows are among them."""
        return int(np.count_nonzero(self.bits[positions >> 3] >> (positions & 7) & 1))


def met_by(where: str, columns: Mapping[str, Any], count: int) -> Met:
    """Which rows meet a condition.

    Args:
        where: a condition in SQL.
        columns: Arrow's chunked arrays by name.
        count: number of rows.

    Raises:
        TaskError: the condition is not allowed, or the columns are not such as it compares.
    """
    condition = parse_condition(where)
    try:
        truth = _evaluated(condition, columns)
    except pa.ArrowException as error:
        why = f"where {where!r:.200} fails: {redact(str(error)):.200}"
        raise invalid(f"{why}; the columns: {', '.join(columns)}") from None
    if not pa.types.is_boolean(truth.type):
        raise invalid(f"where {where!r:.200} says neither yes nor no; {ALLOWED}")
    if isinstance(truth, pa.Scalar):
        return Met(np.full(count, bool(truth.as_py())))
    return Met(np.asarray(pc.fill_null(truth, False).to_numpy(), np.bool_))


def prepare() -> None:
    """Have the first condition take no longer than the next: the parser and Arrow's functions load
    what they need at their first use.
    """
    met_by("path LIKE 'a%' AND path = 'a'", {"path": pa.chunked_array([["a"]])}, 1)


def _evaluated(condition: exp.Expr, columns: Mapping[str, Any]) -> Values:
    """The values of an expression, each operand before what it is an operand of; a chain of
    operators may be longer than Python's stack is deep.
    """
    waiting: list[tuple[exp.Expr, int]] = [(condition, -1)]
    values: list[Values] = []
    while waiting:
        node, count = waiting.pop()
        if count < 0:
            operands = _operands(node)
            waiting.append((node, len(operands)))
            waiting += [(operand, -1) for operand in reversed(operands)]
            continue
        taken = values[len(values) - count :]
        del values[len(values) - count :]
        values.append(_value(node, taken, columns))
    return values.pop()


def _operands(node: exp.Expr) -> list[exp.Expr]:
    if isinstance(node, (exp.Column, exp.Literal)):
        return []
    return [child for child in node.iter_expressions() if not isinstance(child, exp.DataType)]


def _value(node: Any, operands: list[Values], columns: Mapping[str, Any]) -> Values:
    """The values of an expression by those of its operands."""
    if isinstance(node, exp.Column):
        return _column(node.name, columns)
    if isinstance(node, exp.Literal):
        return _literal(node)
    if isinstance(node, exp.Boolean):
        return pa.scalar(bool(node.this))
    if isinstance(node, exp.Null):
        return pa.scalar(None)
    if isinstance(node, exp.Paren):
        return operands[0]
    if isinstance(node, exp.Cast):
        return _cast(node, operands[0])
    if isinstance(node, exp.Coalesce):
        return _coalesce(node, operands)
    if isinstance(node, exp.In):
        return _in(node, operands[0], operands[1:])
    if type(node) in _COMPARED:
        return _compared(node, type(node), *operands)
    return _OPERATORS[type(node)](node, operands)


def _column(name: str, columns: Mapping[str, Any]) -> Values:
    """A column by its name, or by that in other letters where no other has those."""
    same = [one for one in columns if one.lower() == name.lower()]
    if name not in columns and len(same) != 1:
        raise invalid(f"where names {name!r:.80}; the columns: {', '.join(columns)}")
    values = columns.get(name, columns[same[0]])
    if pa.types.is_dictionary(values.type):
        return values.cast(values.type.value_type)
    return values


def _literal(node: exp.Literal) -> Values:
    if node.is_string:
        return pa.scalar(node.this)
    if re.fullmatch(r"[0-9]+", node.this) and int(node.this) < 1 << 63:
        return pa.scalar(int(node.this), pa.int64())
    return pa.scalar(float(node.this), pa.float64())


def _cast(node: exp.Cast, values: Values) -> Values:
    kind = _CAST.get(node.to.this)
    if kind is None:
        raise invalid(f"where casts to {node.to.sql():.40}; {ALLOWED}")
    if pa.types.is_string(kind) and (_is_float(values.type) or pa.types.is_timestamp(values.type)):
        raise invalid(f"where casts {values.type} to text, which may be written in many ways")
    if pa.types.is_integer(kind) and _is_float(values.type):
        values = pc.trunc(values)
    if pa.types.is_timestamp(values.type) and values.type.tz:
        values = values.cast(pa.timestamp(values.type.unit))
    return pc.cast(values, options=pc.CastOptions(kind, allow_time_truncate=True))


def _coalesce(node: exp.Coalesce, operands: list[Values]) -> Values:
    known = [one for one in operands if not pa.types.is_null(one.type)]
    if not known:
        return operands[0]
    first = known[0]
    parts = [first]
    for other in known[1:]:
        first, other = _alike(node, first, other)
        parts.append(other)
    return pc.coalesce(*(part.cast(first.type) for part in parts))


def _in(node: exp.In, values: Values, options: list[Values]) -> Values:
    """Whether values are among others; one that is among none may be a NULL of them."""
    known = [one for one in options if not pa.types.is_null(one.type)]
    alike = [_alike(node, values, one) for one in known]
    plain = all(
        isinstance(other, pa.Scalar) and same.type == values.type == other.type
        for same, other in alike
    )
    if plain and known and not _is_float(values.type):
        there = pa.array([other.as_py() for _, other in alike], values.type)
        found = pc.is_in(values, value_set=there)
        found = pc.if_else(pc.is_valid(values), found, pa.scalar(None, pa.bool_()))
    else:
        found = pa.scalar(False)
        for option in known:
            found = pc.or_kleene(found, _compared(node, exp.EQ, values, option))
    if len(known) < len(options):
        found = pc.or_kleene(found, pa.scalar(None, pa.bool_()))
    return found


def _between(node: exp.Between, operands: list[Values]) -> Values:
    values, low, high = operands
    return pc.and_kleene(
        _compared(node, exp.GTE, values, low), _compared(node, exp.LTE, values, high)
    )


def _compared(node: Any, how: type, left: Values, right: Values) -> Values:
    if pa.types.is_null(left.type) or pa.types.is_null(right.type):
        return pa.scalar(None, pa.bool_())
    left, right = _alike(node, left, right)
    if not _is_float(left.type):
        return _COMPARED[how](left, right)
    if how in _TURNED:
        return _compared(node, _TURNED[how], right, left)
    plain = _COMPARED[how](left, right)
    nan = pc.is_nan(left)
    other = pc.is_nan(right)
    # Not Kleene's: what is compared with NULL stays NULL.
    if how is exp.GTE:
        return pc.or_(plain, nan)
    if how is exp.GT:
        return pc.or_(plain, pc.and_(nan, pc.invert(other)))
    both = pc.and_(nan, other)
    return pc.or_(plain, both) if how is exp.EQ else pc.and_(plain, pc.invert(both))


def _alike(node: Any, left: Values, right: Values) -> tuple[Values, Values]:
    """Two operands in one type.

    Raises:
        TaskError: they can't be compared.
    """
    if left.type == right.type:
        return left, right
    if isinstance(left, pa.Scalar) and not isinstance(right, pa.Scalar):
        turned = _alike(node, right, left)
        return turned[1], turned[0]
    kinds = {_kind(left.type), _kind(right.type)}
    if kinds == {"number"}:
        if isinstance(right, pa.Scalar) and _is_exact(right, left.type):
            return left, right.cast(left.type, safe=False)
        common = _common(left.type, right.type)
        return left.cast(common), right.cast(common)
    if kinds == {"text"}:
        return left.cast(pa.large_string()), right.cast(pa.large_string())
    if kinds == {"time"}:
        return _in_utc(left), _in_utc(right)
    if kinds == {"time", "text"} and isinstance(right, pa.Scalar) and _kind(right.type) == "text":
        return _in_utc(left), _in_utc(right)
    raise invalid(f"where compares {left.type} with {right.type} in {node.sql()!r:.100}; {ALLOWED}")


def _is_exact(literal: Any, kind: Any) -> bool:
    """Whether a column's type has a number; a float has each as exact as it is written."""
    if _is_float(kind):
        return True
    try:
        return bool(literal.cast(kind).cast(literal.type) == literal)
    except pa.ArrowException:
        return False


def _common(left: Any, right: Any) -> Any:
    """The type that two types of numbers are compared and computed in."""
    if all(pa.types.is_integer(one) or pa.types.is_null(one) for one in (left, right)):
        return pa.int64()
    return pa.float64()


def _in_utc(values: Values) -> Values:
    """Dates and times, or text that is one, as times in UTC."""
    kind = values.type
    if pa.types.is_timestamp(kind) and kind.tz:
        values = values.cast(pa.timestamp(kind.unit))
    return values.cast(pa.timestamp("us"), safe=False)


def _kind(kind: Any) -> str:
    if pa.types.is_integer(kind) or _is_float(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return "time"
    return str(kind)


def _is_float(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind))


def _computed(node: Any, operands: list[Values]) -> Values:
    left, right = _numbers(node, operands)
    return _COMPUTED[type(node)](left, right)


def _remainder(node: Any, operands: list[Values]) -> Values:
    """What a division leaves, with the sign of what is divided."""
    left, right = _numbers(node, operands)
    if not _is_float(left.type):
        return pc.subtract(left, pc.multiply(right, pc.divide(left, right)))
    known = pc.and_(pc.is_valid(left), pc.is_valid(right))
    with np.errstate(invalid="ignore"):
        rest = np.fmod(_as_numpy(left), _as_numpy(right))
    if rest.ndim == 0:
        return pa.scalar(float(rest) if known.as_py() else None, pa.float64())
    return pc.if_else(known, pa.array(rest), pa.scalar(None, pa.float64()))


def _as_numpy(values: Values) -> Any:
    if isinstance(values, pa.Scalar):
        return np.float64(math.nan if values.as_py() is None else values.as_py())
    return np.asarray(values.to_numpy(), np.float64)


def _numbers(node: Any, operands: Sequence[Values]) -> tuple[Values, Values]:
    """Two operands that are numbers, in a type that holds what is computed of narrow ones."""
    if any(_kind(one.type) not in ("number", "null") for one in operands):
        _refuse(node)
    left, right = operands
    common = _common(left.type, right.type)
    return left.cast(common), right.cast(common)


def _negative(node: Any, operands: list[Values]) -> Values:
    if _kind(operands[0].type) != "number":
        _refuse(node)
    return pc.negate(operands[0].cast(_common(operands[0].type, operands[0].type)))


def _both(how: Callable[[Values, Values], Values]) -> Callable[[Any, list[Values]], Values]:
    return lambda node, operands: how(*(_truth(node, one) for one in operands))


def _not(node: Any, operands: list[Values]) -> Values:
    return pc.invert(_truth(node, operands[0]))


def _is(node: exp.Is, operands: list[Values]) -> Values:
    values = operands[0]
    if isinstance(node.expression, exp.Null):
        return pc.is_null(values)
    if not isinstance(node.expression, exp.Boolean):
        _refuse(node)
    return pc.fill_null(pc.equal(_truth(node, values), operands[1]), False)


def _truth(node: Any, values: Values) -> Values:
    if pa.types.is_null(values.type):
        return pa.scalar(None, pa.bool_())
    if not pa.types.is_boolean(values.type):
        _refuse(node)
    return values


def _like(node: Any, operands: list[Values]) -> Values:
    values, pattern = operands
    if pa.types.is_null(pattern.type) or pa.types.is_null(values.type):
        return pa.scalar(None, pa.bool_())
    if not isinstance(pattern, pa.Scalar) or _kind(pattern.type) != "text":
        _refuse(node)
    same = isinstance(node, exp.ILike)
    found = pc.match_like(_text(node, values), pattern.as_py(), ignore_case=same)
    return pc.invert(found) if node.args.get("negate") else found


def _escape(node: exp.Escape, operands: list[Values]) -> Values:
    """LIKE with the one escape that it has anyway."""
    if operands[1].as_py() != "\\":
        _refuse(node)
    return operands[0]


def _of_text(how: Callable[[Values], Values]) -> Callable[[Any, list[Values]], Values]:
    return lambda node, operands: how(_text(node, operands[0]))


def _text(node: Any, values: Values) -> Values:
    if pa.types.is_null(values.type):
        return values.cast(pa.string())
    if _kind(values.type) != "text":
        _refuse(node)
    return values


def _refuse(node: Any) -> NoReturn:
    raise invalid(f"where has {node.sql()!r:.100}; {ALLOWED}")


_OPERATORS: dict[type, Callable[[Any, list[Values]], Values]] = {
    exp.And: _both(pc.and_kleene),
    exp.Or: _both(pc.or_kleene),
    exp.Not: _not,
    exp.Is: _is,
    exp.Between: _between,
    exp.Like: _like,
    exp.ILike: _like,
    exp.Escape: _escape,
    exp.Lower: _of_text(pc.utf8_lower),
    exp.Upper: _of_text(pc.utf8_upper),
    exp.Length: _of_text(pc.utf8_length),
    exp.Neg: _negative,
    exp.Mod: _remainder,
    **dict.fromkeys(_COMPUTED, _computed),
}
