"""Conditions on an index's columns: SQL that compares and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from sqlglot import TokenType, exp, parse_one, tokens
from sqlglot.dialects.dialect import Dialect

from radapter_serve.contract.errors import TaskError, invalid

MAX_LENGTH = 2000  # characters
MAX_DEPTH = 10  # of brackets, functions and NOT in each other: parsers need time and stack for them
MAX_PARTS = 300  # names and operators, each of which reads all rows
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
    """Names in backticks or double quotes, and no backslash that ends a text."""

    class Tokenizer(tokens.Tokenizer):
        IDENTIFIERS = ["`", '"']  # noqa: RUF012  # as its base has it; the first is written


def parse_condition(where: str) -> exp.Expr:
    """A condition that compares columns, as a tree in which nothing else is.

    Raises:
        TaskError: it is no condition, too long, too deep, or has something in it that no comparison
            needs.
    """
    if len(where) > MAX_LENGTH:
        raise _refused(f"has {len(where)} characters; at most {MAX_LENGTH} are allowed")
    try:
        if _brackets(where) > MAX_DEPTH:
            raise _too_deep()
        parsed = parse_one(where, read=Sql, into=exp.Condition)
        _check(parsed)
        return parsed
    except TaskError:
        raise
    except RecursionError:
        raise _too_deep() from None
    # On input that makes no sense the parser raises errors of its own and of Python's.
    except Exception:
        raise _refused(f"{where!r:.200} cannot be read; {ALLOWED}") from None


def _brackets(where: str) -> int:
    """How deep brackets are nested, before any is parsed."""
    depth = 0
    max_depth = 0
    for token in Sql().tokenize(where):
        depth += (token.token_type in _OPENING) - (token.token_type in _CLOSING)
        max_depth = max(max_depth, depth)
    return max_depth


def _check(condition: exp.Expr) -> None:
    parts = 0
    for node, depth in _walk(condition):
        if isinstance(node, exp.Func) and not isinstance(node, _NODES):
            names = ", ".join(function.sql_name().lower() for function in _FUNCTIONS)
            raise _refused(f"calls {node.name or node.sql_name()}; functions: {names}")
        if not isinstance(node, _NODES) or (isinstance(node, exp.Column) and len(node.parts) > 1):
            raise _refused(f"has a {type(node).__name__}; {ALLOWED}")
        if depth > MAX_DEPTH:
            raise _too_deep()
        parts += not isinstance(node, (exp.Literal, exp.Identifier))
    if parts > MAX_PARTS:
        raise _refused(
            f"has {parts} operators and names; at most {MAX_PARTS} are allowed: "
            "write a list as path IN ('a.jpg', 'b.jpg')"
        )


def _walk(condition: exp.Expr) -> Iterator[tuple[exp.Expr, int]]:
    waiting = [(condition, 0)]
    while waiting:
        node, depth = waiting.pop()
        depth += isinstance(node, _NESTING)
        yield node, depth
        waiting += [(child, depth) for child in node.iter_expressions()]


def _too_deep() -> TaskError:
    return _refused(
        f"has brackets, functions or NOT in each other; at most {MAX_DEPTH} are allowed"
    )


def _refused(why: str) -> TaskError:
    return invalid(f"where {why}")
