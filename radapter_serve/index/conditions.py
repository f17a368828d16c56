"""Conditions on an index's columns: SQL comparisons only, computed with Arrow.

A comparison with NULL is neither true nor false, as in SQL. Python values become Arrow values as
texts that Arrow casts (`text_array`): pyarrow's own conversion imports pandas, about 30 MB in every
server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
            met = _evaluate(condition, batch)
            if not pa.types.is_boolean(met.type):
                raise invalid(f"where {where!r:.200} says neither yes nor no; {ALLOWED}")
            met = pc.coalesce(met, _FALSE).cast(pa.uint8())
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


_ROWS = 1 << 16  # most rows compared at once
_BATCH_WORK = 256 << 20  # bytes read until the deadline and the caller are asked again
_NULL = pa.nulls(1)[0]
_UNKNOWN = _NULL.cast(pa.bool_())
_FALSE = text_array(["false"])[0].cast(pa.bool_())
_TIME = pa.timestamp("us")
_COMPARISONS: dict[type, Callable[..., Any]] = {
    **{exp.EQ: pc.equal, exp.NEQ: pc.not_equal, exp.Coalesce: pc.coalesce},
    **{exp.LT: pc.less, exp.LTE: pc.less_equal},
    **{exp.GT: pc.greater, exp.GTE: pc.greater_equal},
}
_LOGIC: dict[type, Callable[..., Any]] = {
    **{exp.And: pc.and_kleene, exp.Or: pc.or_kleene, exp.Not: pc.invert},
}
_ARITHMETIC: dict[type, Callable[..., Any]] = {
    **{exp.Neg: pc.negate, exp.Add: pc.add, exp.Sub: pc.subtract},
    **{exp.Mul: pc.multiply, exp.Div: pc.divide},
}
_TEXT_FUNCTIONS: dict[type, Callable[..., Any]] = {
    **{exp.Lower: pc.utf8_lower, exp.Upper: pc.utf8_upper, exp.Length: pc.utf8_length},
}
_CASTS = {
    **dict.fromkeys(("TINYINT", "SMALLINT", "INT", "BIGINT"), pa.int64()),
    **dict.fromkeys(("UTINYINT", "USMALLINT", "UINT", "UBIGINT"), pa.int64()),
    **dict.fromkeys(("FLOAT", "DOUBLE"), pa.float64()),
    **dict.fromkeys(("TEXT", "VARCHAR", "CHAR"), pa.string()),
    **{"BOOLEAN": pa.bool_(), "DATE": pa.date32(), "TIMESTAMP": _TIME},
}


def _evaluate(node: Any, batch: pa.RecordBatch) -> Any:
    """Evaluate a parsed condition on a batch, operands first, to an Arrow array or a scalar. The
    recursion is as deep as a chain of `MAX_PARTS` operators, which Python allows.
    """
    match node:
        case exp.Column():
            return _column(node.name, batch)
        case exp.Literal(is_string=True):
            return _scalar(node.this, pa.string())
        case exp.Literal():
            is_integer = re.fullmatch(r"[0-9]+", node.this) and int(node.this) < 1 << 63
            return _scalar(node.this, pa.int64() if is_integer else pa.float64())
        case exp.Boolean():
            return _scalar(str(node.this), pa.bool_())
        case exp.Null():
            return _NULL
    parts = [part for part in node.iter_expressions() if not isinstance(part, exp.DataType)]
    operands = [_evaluate(part, batch) for part in parts]
    if function := _LOGIC.get(type(node)):
        return function(*_truths(node, operands))
    if function := _ARITHMETIC.get(type(node)):
        return function(*_numbers(node, operands))
    if function := _TEXT_FUNCTIONS.get(type(node)):
        return function(*_texts(node, operands))
    if function := _COMPARISONS.get(type(node)):
        return function(*_alike(node, operands))
    match node:
        case exp.Paren():
            return operands[0]
        case exp.Is(expression=exp.Null()):
            return pc.is_null(operands[0])
        case exp.Is(expression=exp.Boolean()):
            return pc.coalesce(pc.equal(*_truths(node, operands)), _FALSE)
        case exp.Between():
            low_met = pc.greater_equal(*_alike(node, operands[:2]))
            high_met = pc.less_equal(*_alike(node, operands[::2]))
            return pc.and_kleene(low_met, high_met)
        case exp.In():
            return _in(node, *operands)
        case exp.Like() | exp.ILike() if not _is_column(operands[1]):
            text, pattern = _texts(node, operands)
            if not pattern.is_valid:
                return _UNKNOWN
            ignores_case = isinstance(node, exp.ILike)
            met = pc.match_like(text, pattern.as_py(), ignore_case=ignores_case)
            return pc.invert(met) if node.args.get("negate") else met
        case exp.Escape() if node.expression.name == "\\":  # the default of LIKE
            return operands[0]
        case exp.Cast():
            return _cast(node, operands[0])
        case exp.Mod():  # the remainder of a division, with the sign of the dividend
            left, right = _numbers(node, operands)
            quotient = pc.divide(left, right)
            if pa.types.is_floating(left.type):
                quotient = pc.trunc(quotient)
            return pc.subtract(left, pc.multiply(right, quotient))
    _refuse(node)


def _column(name: str, batch: pa.RecordBatch) -> Any:
    """Find a column by its name, and cast it to the type in which its values are computed."""
    names = [other for other in batch.schema.names if other.lower() == name.lower()]
    if name not in names:
        if len(names) != 1:
            known = ", ".join(batch.schema.names)
            raise invalid(f"where names {name!r:.80}; the columns: {known}")
        name = names[0]
    column = batch.column(name)
    kinds = pa.types
    if kinds.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kinds.is_integer(column.type):
        return column.cast(pa.int64())
    if kinds.is_float16(column.type):
        return column.cast(pa.float32())
    if kinds.is_decimal(column.type):
        return column.cast(pa.float64())
    if kinds.is_date(column.type):
        return column.cast(pa.date32())
    if kinds.is_timestamp(column.type):
        return column.cast(_TIME, safe=False)  # in UTC
    return column


@lru_cache(MAX_PARTS)  # the same for every batch
def _scalar(text: str, kind: pa.DataType) -> pa.Scalar:
    return text_array([text])[0].cast(kind)


def _is_column(operand: Any) -> bool:
    return not isinstance(operand, pa.Scalar)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _alike(node: Any, operands: list[Any]) -> list[Any]:
    """Cast operands to one type; raises an error if they cannot be compared."""
    types = {operand.type for operand in operands if operand.type != pa.null()}
    columns = {operand.type for operand in operands if _is_column(operand)}
    safe = True
    if len(types) < 2:
        kind = next(iter(types), pa.bool_())
    elif all(map(_is_number, types)):
        # A number in the condition gets the precision of the column that it is compared with.
        is_float = any(map(pa.types.is_floating, types))
        kind = pa.float64() if is_float else pa.int64()
        if columns == {pa.float32()}:
            kind = pa.float32()
            safe = False
    elif all(map(_is_text, types)):
        kind = pa.large_string()
    elif types <= {pa.date32(), _TIME, pa.string()} and pa.string() not in columns:
        kind = _TIME
    else:
        compared = " with ".join(map(str, dict.fromkeys(operand.type for operand in operands)))
        raise invalid(f"where compares {compared} in {node.sql()!r:.100}; {ALLOWED}")
    cast = []
    for operand in operands:
        try:
            cast.append(operand if operand.type == kind else operand.cast(kind, safe=safe))
        except pa.ArrowInvalid:
            if operand.type != pa.string():
                raise
            text = operand.as_py()
            raise invalid(f"where has {text!r:.100}, which is not a date or time") from None
    return cast


def _in(node: Any, values: Any, *options: Any) -> Any:
    is_exact = pa.types.is_integer(values.type) or _is_text(values.type)
    types = {option.type for option in options} - {pa.null()}
    if types == {values.type} and is_exact and not any(map(_is_column, options)):
        # One look-up for a long list; `is_in` treats NULL as a value, so restore it.
        known = [option for option in options if option.is_valid]
        wanted = pa.concat_arrays([pa.repeat(option, 1) for option in known])
        met = pc.if_else(pc.is_valid(values), pc.is_in(values, value_set=wanted), _UNKNOWN)
        # A NULL among the options may equal any value.
        return met if len(known) == len(options) else pc.or_kleene(met, _UNKNOWN)
    met = _FALSE
    for option in options:
        met = pc.or_kleene(met, pc.equal(*_alike(node, [values, option])))
    return met


def _cast(node: exp.Cast, values: Any) -> Any:
    kind = _CASTS.get(node.to.this.name)
    if kind is None:
        raise invalid(f"where casts to {node.to.sql():.40}; {ALLOWED}")
    is_float = pa.types.is_floating(values.type)
    if kind == pa.string() and (is_float or values.type == _TIME):
        raise invalid(f"where casts a {values.type} to text, which may be written in many ways")
    if kind == pa.int64() and is_float:
        values = pc.trunc(values)
    return values.cast(kind)


def _numbers(node: Any, operands: list[Any]) -> list[Any]:
    is_float = any(pa.types.is_floating(operand.type) for operand in operands)
    kind = pa.float64() if is_float else pa.int64()
    return [operand.cast(kind) for operand in _of_kind(node, operands, _is_number, kind)]


def _truths(node: Any, operands: list[Any]) -> list[Any]:
    return _of_kind(node, operands, pa.types.is_boolean, pa.bool_())


def _texts(node: Any, operands: list[Any]) -> list[Any]:
    return _of_kind(node, operands, _is_text, pa.string())


def _of_kind(
    node: Any, operands: list[Any], is_kind: Callable[[Any], bool], kind: pa.DataType
) -> list[Any]:
    """Check that operands are of a kind; NULL gets the type `kind`."""
    if not all(operand.type == pa.null() or is_kind(operand.type) for operand in operands):
        _refuse(node)
    return [operand.cast(kind) if operand.type == pa.null() else operand for operand in operands]


def _refuse(node: Any) -> NoReturn:
    raise invalid(f"where has {node.sql()!r:.100}; {ALLOWED}")
