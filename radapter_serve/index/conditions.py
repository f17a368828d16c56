"""Conditions on an index's columns: SQL comparisons only, computed with Arrow.

A comparison with NULL is neither true nor false, as in SQL. Python values become Arrow values as
texts that Arrow casts (`text_array`): pyarrow's own conversion imports pandas, about 30 MB in every
server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from sqlglot import TokenType, exp, parse_one, tokens
from sqlglot.dialects.dialect import Dialect

from radapter_serve.contract.errors import Cancelled, TaskError, check_cancelled, invalid, redact

MAX_LENGTH = 2000  # characters
MAX_DEPTH = 10  # nested brackets, functions and NOT, each of which costs the parser time and stack
MAX_PARTS = 300  # names and operators, each of which reads all rows
# Bytes that a condition may read: its names and operators × the bytes of its widest column. An
# index of any size takes `FEW_PARTS` of them.
MAX_WORK = 4 << 30
FEW_PARTS = 16
MAX_SIGNS = 8  # signs _ after a % in a pattern; each may double the states of the automaton
ALLOWED = (
    "allowed is a condition such as year > 2020 AND (path LIKE 'cats/%' OR `file name` = 'it''s')"
)
_FUNCTIONS = (exp.Cast, exp.Coalesce, exp.Length, exp.Lower, exp.Upper)
_NESTING = (*_FUNCTIONS, exp.Paren, exp.Not, exp.Neg)
_NODES = (
    *_NESTING,
    *(exp.Column, exp.Identifier, exp.Literal, exp.Boolean, exp.Null, exp.DataType),
    *(exp.And, exp.Or, exp.EQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE),
    *(exp.Like, exp.ILike, exp.Escape, exp.In, exp.Between, exp.Is),
    *(exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod),
)
_OPENING = (TokenType.L_PAREN, TokenType.L_BRACKET, TokenType.L_BRACE)
_CLOSING = (TokenType.R_PAREN, TokenType.R_BRACKET, TokenType.R_BRACE)


class Sql(Dialect):
    """A dialect with names in backticks or double quotes, and no escapes with a backslash."""

    class Tokenizer(tokens.Tokenizer):
        IDENTIFIERS = ["`", '"']  # noqa: RUF012  # a list, as in the base class


def parse_condition(where: str) -> exp.Expr:
    """Parse a condition that only compares columns; raises an error for any other SQL."""
    if len(where) > MAX_LENGTH:
        raise invalid(f"where has {len(where)} characters; at most {MAX_LENGTH} are allowed")
    try:
        where.encode()
        # Limit the depth of brackets before the parser runs.
        depth = 0
        for token in Sql().tokenize(where):
            depth += (token.token_type in _OPENING) - (token.token_type in _CLOSING)
            if depth > MAX_DEPTH:
                raise _too_deep()
        condition = parse_one(where, read=Sql, into=exp.Condition)

        # Refuse nodes that are not on the list of allowed ones.
        parts = 0
        waiting = [(condition, 0)]
        while waiting:
            node, depth = waiting.pop()
            if isinstance(node, (exp.Like, exp.ILike)):
                pattern = re.sub(r"\\.", "", node.expression.unnest().name, flags=re.DOTALL)
                signs = pattern.partition("%")[2].count("_")
                if signs > MAX_SIGNS:
                    raise invalid(
                        f"where has a pattern with {signs} signs _ after a %; at most {MAX_SIGNS}"
                        " are allowed"
                    )
            if isinstance(node, exp.Func) and not isinstance(node, _NODES):
                names = ", ".join(function.sql_name().lower() for function in _FUNCTIONS)
                raise invalid(f"where calls {node.name or node.sql_name()}; functions: {names}")
            nested = isinstance(node, exp.Column) and len(node.parts) > 1
            if nested or not isinstance(node, _NODES):
                raise invalid(f"where has a {type(node).__name__}; {ALLOWED}")
            depth += isinstance(node, _NESTING)
            if depth > MAX_DEPTH:
                raise _too_deep()
            parts += _is_part(node)
            waiting += [(child, depth) for child in node.iter_expressions()]
    except TaskError:
        raise
    except RecursionError:
        raise _too_deep() from None
    except Exception:  # on malformed text the parser raises many kinds of errors
        raise invalid(f"where {where!r:.200} cannot be read; {ALLOWED}") from None
    if parts > MAX_PARTS:
        raise invalid(
            f"where has {parts} operators and names; at most {MAX_PARTS} are allowed: write a list"
            " as path IN ('a.jpg', 'b.jpg')"
        )
    return condition


def _is_part(node: Any) -> bool:
    return not isinstance(node, (exp.Literal, exp.Identifier))


def _too_deep() -> TaskError:
    return invalid(
        f"where has brackets, functions or NOT in each other; at most {MAX_DEPTH} are allowed"
    )


class Met:
    """The rows that meet a condition, stored as bits; `marks` is bool [N]."""

    def __init__(self, marks: NDArray[np.bool_]) -> None:
        self.count = int(np.count_nonzero(marks))
        # One bit for each row, from the lowest of a byte, as FAISS reads them
        self.bits = np.packbits(marks, bitorder="little")
        self._size = len(marks)
        self._in_cells: NDArray[np.int64] | None = None

    def in_cells(self, cell_of: NDArray[np.int32], cells: int) -> NDArray[np.int64]:
        """Count the rows in each cell, int64 [cells]; `cell_of` is the cell of each row."""
        if self._in_cells is None:
            self._in_cells = np.bincount(cell_of[self.marks], minlength=cells)
        return self._in_cells

    @property
    def marks(self) -> NDArray[np.bool_]:
        """True for each row that meets the condition, bool [N]."""
        return np.unpackbits(self.bits, count=self._size, bitorder="little").view(np.bool_)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions of these rows, int64 [count]."""
        return np.flatnonzero(self.marks)


def text_array(texts: Sequence[str]) -> pa.StringArray:
    """Convert texts to an Arrow array."""
    data = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, data)], dtype=np.int32)
    return pa.StringArray.from_buffers(
        len(data), pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(data))
    )


def evaluate(where: str, table: pa.Table, cancelled: Cancelled | None = None) -> Met:
    """Find the rows of a table that meet a condition."""
    condition = parse_condition(where)

    # Refuse a condition that reads too much of this table.
    parts = sum(map(_is_part, condition.walk()))
    names = {column.name.lower() for column in condition.find_all(exp.Column)}
    sizes = [table[name].nbytes for name in table.column_names if name.lower() in names]
    widest = max(sizes, default=0)
    most = max(FEW_PARTS, MAX_WORK // max(widest, 1))
    if parts > most:
        raise invalid(
            f"where has {parts} operators and names, and reads {widest >> 20:,} MiB for each of"
            f" them; at most {most} are allowed in this index"
        )

    marks = np.zeros(len(table), np.uint8)
    start = 0
    rows = _BATCH_WORK * len(table) // max(parts * widest, 1)
    for batch in table.to_batches(max_chunksize=min(max(rows, 1), _ROWS)):
        check_cancelled(cancelled)
        try:
            term = _evaluate(condition, batch)
            if term.kind != "truth":
                raise invalid(f"where {where!r:.200} says neither yes nor no; {ALLOWED}")
            met = pc.coalesce(term.values, _FALSE).cast(pa.uint8())
        except pa.ArrowException as error:
            why = f"where {where!r:.200} fails: {redact(str(error)):.200}"
            raise invalid(f"{why}; the columns: {', '.join(table.column_names)}") from None
        if isinstance(met, pa.Scalar):  # a condition without a column
            values: Any = met.as_py()
        else:
            values = np.frombuffer(met.buffers()[1], np.uint8, len(met), met.offset)
        marks[start : start + len(batch)] = values
        start += len(batch)
    return Met(marks.view(np.bool_))


@dataclass(frozen=True)
class _Term:
    """A part of a condition: its values in a batch, an Arrow array or a scalar, and their kind."""

    values: Any
    # "integer", "float", "narrow" (float32 or float16), "text", "date", "time", "truth", "null", or
    # an Arrow type that has no comparisons.
    kind: str
    literal: Any = None  # the value of a literal in the condition


_ROWS = 1 << 16  # most rows compared at once
_BATCH_WORK = 256 << 20  # bytes read until the deadline and the caller are asked again
_NULL = pa.nulls(1)[0]
_UNKNOWN = pa.nulls(1, pa.bool_())[0]
_FALSE = text_array(["false"])[0].cast(pa.bool_())
_NUMBERS = ("integer", "float", "narrow")
_TYPES = {
    **dict.fromkeys(_NUMBERS, pa.float64()),
    **{"integer": pa.int64(), "text": pa.string(), "truth": pa.bool_()},
    **{"date": pa.date32(), "time": pa.timestamp("us")},
}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    **{exp.EQ: pc.equal, exp.NEQ: pc.not_equal},
    **{exp.LT: pc.less, exp.LTE: pc.less_equal},
    **{exp.GT: pc.greater, exp.GTE: pc.greater_equal},
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    exp.Add: pc.add,
    exp.Sub: pc.subtract,
    exp.Mul: pc.multiply,
    exp.Div: pc.divide,
}
_CASTS = {
    **dict.fromkeys(("TINYINT", "SMALLINT", "INT", "BIGINT"), "integer"),
    **dict.fromkeys(("UTINYINT", "USMALLINT", "UINT", "UBIGINT"), "integer"),
    **dict.fromkeys(("FLOAT", "DOUBLE"), "float"),
    **dict.fromkeys(("TEXT", "VARCHAR", "CHAR"), "text"),
    **{"BOOLEAN": "truth", "DATE": "date", "TIMESTAMP": "time"},
}
_TEXT_FUNCTIONS: dict[type, Callable[[Any], Any]] = {
    exp.Lower: pc.utf8_lower,
    exp.Upper: pc.utf8_upper,
    exp.Length: pc.utf8_length,
}


def _evaluate(node: Any, batch: pa.RecordBatch) -> _Term:
    """Evaluate a parsed condition on a batch, operands first. The recursion is as deep as a chain
    of `MAX_PARTS` operators, which Python allows.
    """
    operands: list[_Term] = []
    if not isinstance(node, (exp.Column, exp.Literal)):
        for child in node.iter_expressions():
            if not isinstance(child, exp.DataType):
                operands.append(_evaluate(child, batch))
    match node:
        case exp.Column():
            return _column(node.name, batch)
        case exp.Literal(is_string=True):
            return _literal(node.this)
        case exp.Literal():
            is_integer = re.fullmatch(r"[0-9]+", node.this) and int(node.this) < 1 << 63
            return _literal(int(node.this) if is_integer else float(node.this))
        case exp.Boolean():
            return _literal(bool(node.this))
        case exp.Null():
            return _Term(_NULL, "null")
        case exp.Paren():
            return operands[0]
        case exp.Neg():
            (number,) = _check_kinds(node, operands, *_NUMBERS)
            if number.literal is not None:
                return _literal(-number.literal)
            return _Term(pc.negate(number.values), number.kind)
        case exp.And():
            return _Term(pc.and_kleene(*_truths(node, operands)), "truth")
        case exp.Or():
            return _Term(pc.or_kleene(*_truths(node, operands)), "truth")
        case exp.Not():
            return _Term(pc.invert(*_truths(node, operands)), "truth")
        case exp.Is(expression=exp.Null()):
            return _Term(pc.is_null(operands[0].values), "truth")
        case exp.Is(expression=exp.Boolean()):
            return _Term(pc.coalesce(pc.equal(*_truths(node, operands)), _FALSE), "truth")
        case exp.Between():
            values, low, high = operands
            low_met = _compared(node, exp.GTE, values, low)
            high_met = _compared(node, exp.LTE, values, high)
            return _Term(pc.and_kleene(low_met, high_met), "truth")
        case exp.In():
            return _Term(_in(node, operands[0], operands[1:]), "truth")
        case exp.Like() | exp.ILike():
            text, pattern = _check_kinds(node, operands, "text", "null")
            if "null" in (text.kind, pattern.kind):
                return _Term(_UNKNOWN, "truth")
            if pattern.literal is None:
                _refuse(node)
            ignores_case = isinstance(node, exp.ILike)
            met = pc.match_like(text.values, pattern.literal, ignore_case=ignores_case)
            return _Term(pc.invert(met) if node.args.get("negate") else met, "truth")
        case exp.Escape() if operands[1].literal == "\\":  # the default of LIKE
            return operands[0]
        case exp.Lower() | exp.Upper() | exp.Length():
            (text,) = _check_kinds(node, operands, "text", "null")
            kind = "integer" if isinstance(node, exp.Length) else "text"
            return _Term(_TEXT_FUNCTIONS[type(node)](text.values.cast(pa.string())), kind)
        case exp.Coalesce():
            return _coalesce(node, operands)
        case exp.Cast():
            return _cast(node, operands[0])
        case exp.Mod():  # the remainder of a division, with the sign of the dividend
            left, right, kind = _numbers(node, operands)
            quotient = pc.divide(left, right)
            if kind == "float":
                quotient = pc.trunc(quotient)
            return _Term(pc.subtract(left, pc.multiply(right, quotient)), kind)
    if type(node) in _COMPARISONS:
        return _Term(_compared(node, type(node), *operands), "truth")
    if type(node) not in _ARITHMETIC:
        _refuse(node)
    left, right, kind = _numbers(node, operands)
    return _Term(_ARITHMETIC[type(node)](left, right), kind)


def _column(name: str, batch: pa.RecordBatch) -> _Term:
    """Find a column by its name, and cast it to the type in which its kind is computed."""
    names = [other for other in batch.schema.names if other.lower() == name.lower()]
    if name not in names:
        if len(names) != 1:
            known = ", ".join(batch.schema.names)
            raise invalid(f"where names {name!r:.80}; the columns: {known}")
        name = names[0]
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    arrow = column.type
    if pa.types.is_integer(arrow):
        return _Term(column.cast(pa.int64()), "integer")
    if pa.types.is_floating(arrow):
        kind = "float" if arrow == pa.float64() else "narrow"
        return _Term(column.cast(pa.float64()), kind)
    if pa.types.is_decimal(arrow):
        return _Term(column.cast(pa.float64()), "float")
    if pa.types.is_string(arrow) or pa.types.is_large_string(arrow):
        return _Term(column, "text")
    if pa.types.is_boolean(arrow):
        return _Term(column, "truth")
    if pa.types.is_date(arrow):
        return _Term(column.cast(pa.date32()), "date")
    if pa.types.is_timestamp(arrow):
        return _Term(column.cast(pa.timestamp("us"), safe=False), "time")  # in UTC
    return _Term(column, str(arrow))


def _literal(value: Any) -> _Term:
    kinds = {bool: "truth", int: "integer", float: "float", str: "text"}
    kind = kinds[type(value)]
    return _Term(_scalar(str(value), kind), kind, value)


@lru_cache(MAX_PARTS)  # the same for every batch
def _scalar(text: str, kind: str) -> pa.Scalar:
    return text_array([text])[0].cast(_TYPES[kind])


def _compared(node: Any, how: type, left: _Term, right: _Term) -> Any:
    if "null" in (left.kind, right.kind):
        return _UNKNOWN
    left, right = _alike(node, left, right)
    return _COMPARISONS[how](left.values, right.values)


def _alike(node: Any, left: _Term, right: _Term) -> tuple[_Term, _Term]:
    """Convert two operands to one type; raises an error if they cannot be compared."""
    kinds = {left.kind, right.kind}
    if kinds <= set(_NUMBERS):
        # A literal gets the precision of the column that it is compared with.
        if left.kind == "narrow":
            right = _narrow(right)
        elif right.kind == "narrow":
            left = _narrow(left)
        return left, right
    if len(kinds) == 1 and left.kind in _TYPES:
        return left, right
    if kinds <= {"date", "time", "text"}:
        return _time(node, left), _time(node, right)
    raise invalid(f"where compares {left.kind} with {right.kind} in {node.sql()!r:.100}; {ALLOWED}")


def _narrow(number: _Term) -> _Term:
    """Round a literal to float32; other numbers are unchanged."""
    if number.literal is None:
        return number
    with np.errstate(over="ignore"):
        return _literal(float(np.float32(number.literal)))


def _time(node: Any, term: _Term) -> _Term:
    """Convert a date, a time, or a literal text of one to a time."""
    if term.kind == "text" and term.literal is None:
        _refuse(node)
    try:
        return _Term(term.values.cast(_TYPES["time"]), "time")
    except pa.ArrowException:
        if term.kind != "text":
            raise
        raise invalid(f"where has {term.literal!r:.100}, which is not a date or time") from None


def _in(node: Any, values: _Term, options: list[_Term]) -> Any:
    known = [option for option in options if option.kind != "null"]
    alike = [_alike(node, values, option) for option in known]
    literals = [option.literal for _, option in alike]
    if values.kind in ("integer", "text") and all(type(each) in (int, str) for each in literals):
        # One look-up for a long list; `is_in` treats NULL as a value, so restore it.
        wanted = text_array([str(literal) for literal in literals]).cast(_TYPES[values.kind])
        met = pc.is_in(values.values, value_set=wanted)
        met = pc.if_else(pc.is_valid(values.values), met, _UNKNOWN)
    else:
        met = _FALSE
        for left, option in alike:
            met = pc.or_kleene(met, pc.equal(left.values, option.values))
    # A NULL among the options may equal any value.
    return met if len(known) == len(options) else pc.or_kleene(met, _UNKNOWN)


def _coalesce(node: Any, operands: list[_Term]) -> _Term:
    known = [operand for operand in operands if operand.kind != "null"]
    if not known:
        return operands[0]
    kinds = {operand.kind for operand in known}
    if kinds <= set(_NUMBERS):
        kind = "integer" if kinds == {"integer"} else "float"
    elif len(kinds) == 1:
        kind = known[0].kind
    else:
        raise invalid(f"where mixes {' and '.join(sorted(kinds))} in {node.sql()!r:.100}")
    if kind not in _TYPES:
        return _Term(pc.coalesce(*(operand.values for operand in known)), kind)
    values = [operand.values.cast(_TYPES[kind]) for operand in known]
    return _Term(pc.coalesce(*values), kind)


def _cast(node: exp.Cast, term: _Term) -> _Term:
    kind = _CASTS.get(node.to.this.name)
    if kind is None:
        raise invalid(f"where casts to {node.to.sql():.40}; {ALLOWED}")
    if kind == "text" and term.kind in ("float", "narrow", "time"):
        raise invalid(f"where casts a {term.kind} to text, which may be written in many ways")
    values = term.values
    if kind == "integer" and term.kind in ("float", "narrow"):
        values = pc.trunc(values)
    return _Term(values.cast(_TYPES[kind]), kind)


def _numbers(node: Any, operands: list[_Term]) -> tuple[Any, Any, str]:
    """Convert two numbers to one type, and return their kind."""
    left, right = _check_kinds(node, operands, *_NUMBERS, "null")
    kind = "integer" if {left.kind, right.kind} <= {"integer", "null"} else "float"
    return left.values.cast(_TYPES[kind]), right.values.cast(_TYPES[kind]), kind


def _truths(node: Any, operands: list[_Term]) -> list[Any]:
    terms = _check_kinds(node, operands, "truth", "null")
    return [term.values.cast(pa.bool_()) for term in terms]


def _check_kinds(node: Any, operands: list[_Term], *kinds: str) -> list[_Term]:
    if any(operand.kind not in kinds for operand in operands):
        _refuse(node)
    return operands


def _refuse(node: Any) -> NoReturn:
    raise invalid(f"where has {node.sql()!r:.100}; {ALLOWED}")
