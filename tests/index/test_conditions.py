"""Conditions on columns: against SQLite's answers or SQL's rules, and those that are refused."""

from __future__ import annotations

import contextlib
import datetime
import sqlite3
import time
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from radapter_serve.contract.errors import CANCELLED, INVALID_ARGUMENT, TaskError
from radapter_serve.index.conditions import evaluate, parse_condition

TEXTS = ["", "a", "A", "a/x.jpg", "b%c", "c_d", "line\nbreak", "it's"]
INTEGERS = [-3, 0, 1, 2, 7, 2020]
FRACTIONS = [-1.5, 0.25, 1.0, 7.0, 2020.5]
Rows = list[tuple[str | None, str | None, int | None, int | None, float | None, bool | None]]


COLUMNS: list[list[Any]] = [TEXTS, TEXTS, INTEGERS, INTEGERS, FRACTIONS, [True, False]]
ROWS = st.lists(
    st.tuples(*(st.none() | st.sampled_from(values) for values in COLUMNS)), min_size=1, max_size=12
)


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def one_of(*values: str) -> st.SearchStrategy[str]:
    return st.sampled_from(values)


def filled(template: str, *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(lambda values: template.format(*values))


def some_of(values: list[str]) -> st.SearchStrategy[str]:
    return st.lists(one_of(*values, "NULL"), min_size=1, max_size=4).map(", ".join)


texts = one_of("path", "`other`", *map(quoted, TEXTS))
columns = one_of("year", "small", "part")
numbers = columns | one_of(*map(str, INTEGERS + FRACTIONS))
computed = st.recursive(
    numbers,
    lambda part: (
        filled("({} {} {})", part, one_of(*"+-*"), part)
        | filled("-({})", part)
        | filled("coalesce({}, {})", part, part)
    ),
    max_leaves=4,
) | st.just("length(path)")
operators = one_of("=", "!=", "<", "<=", ">", ">=")
perhaps = one_of("", "NOT ")
patterns = one_of(*map(quoted, ["a%", "%x%", "_", "c_d", "%", "", "b%c", "A%", "line%"]))
simple = (
    filled("{} {} {}", texts, operators, texts)
    | filled("{} {} {}", computed, operators, computed)
    | filled("{} IS {}NULL", one_of("path", "other"), perhaps)
    | filled("path {}LIKE {}", perhaps, patterns)
    | filled("{} {}BETWEEN {} AND {}", numbers, perhaps, numbers, numbers)
    | filled(
        "{} {}IN ({})", columns, perhaps, some_of([str(number) for number in INTEGERS + FRACTIONS])
    )
    | filled("path {}IN ({})", perhaps, some_of([quoted(text) for text in TEXTS]))
    | one_of("flag", "flag = true", "flag IS TRUE", "flag IS NOT FALSE", "flag IS NULL")
    | st.just("year = NULL")
)
conditions = st.recursive(
    simple,
    lambda part: filled("({} {} {})", part, one_of("AND", "OR"), part) | filled("NOT ({})", part),
    max_leaves=6,
)


def table_of(rows: Rows, chunk: int) -> pa.Table:
    kinds = {
        **{"path": pa.string(), "other": pa.large_string(), "year": pa.int64()},
        **{"small": pa.int16(), "part": pa.float64(), "flag": pa.bool_()},
    }
    table = pa.table([list(column) for column in zip(*rows, strict=True)], names=list(kinds))
    table = table.cast(pa.schema(kinds.items()))
    return pa.concat_tables([table.slice(start, chunk) for start in range(0, len(table), chunk)])


def by_sqlite(rows: Rows, where: str) -> list[int]:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("PRAGMA case_sensitive_like = true")
        database.execute(
            "CREATE TABLE t (path TEXT, other TEXT, year INTEGER, small INTEGER, part REAL, flag)"
        )
        database.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?)", rows)
        return [row - 1 for (row,) in database.execute(f"SELECT rowid FROM t WHERE {where}")]


@settings(max_examples=25, deadline=None)
@given(ROWS, conditions, st.integers(1, 5))
def test_any_condition_is_met_by_the_rows_that_sqlite_names(
    rows: Rows, where: str, chunk: int
) -> None:
    try:
        matches = evaluate(where, table_of(rows, chunk))
    except TaskError as error:  # what is drawn may be nested deeper than is allowed
        assert "in each other" in str(error)
        reject()
    assert matches.positions.tolist() == by_sqlite(rows, where)
    assert matches.count == len(matches.positions)


DAYS = [datetime.date(2020, 1, 1), datetime.date(2021, 1, 1), None]
TIMES = [datetime.datetime(2020, 1, 1, 12), datetime.datetime(2021, 1, 1), None]
SPECIAL = pa.table(
    {
        "day": pa.chunked_array([DAYS]),
        "time": pa.chunked_array([pa.array(TIMES, pa.timestamp("us"))]),
        "zoned": pa.chunked_array([pa.array(TIMES, pa.timestamp("ms", "Asia/Tokyo"))]),
        "part": pa.chunked_array([[-2.5, 1.5, None]]),
        "narrow": pa.chunked_array([pa.array([0.1, 1.5, None], pa.float32())]),
        "tiny": pa.chunked_array([pa.array([100, -3, None], pa.int8())]),
        "unsigned": pa.chunked_array([pa.array([1, 100, None], pa.uint64())]),
        "kind": pa.chunked_array([pa.array(["cat", "Émile", None]).dictionary_encode()]),
        "tags": pa.chunked_array([[["x"], [], None]]),
        "Year": pa.chunked_array([[5, 6, None]]),
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("day = date '2020-01-01'", [0]),
        ("day > '2020-06-01'", [1]),
        ("day = time", [1]),
        ("time >= timestamp '2021-01-01 00:00:00'", [1]),
        ("time < '2020-01-01T12:00:01'", [0]),
        ("zoned > timestamp '2020-06-01 00:00:00'", [1]),
        ("zoned = time", [0, 1]),
        ("cast(time as date) = day", [0, 1]),
        ("cast(day as string) = '2020-01-01'", [0]),
        *(("part > 1e300", []), ("part < 1.5", [0]), ("1e300 > part", [0, 1])),
        # A number is as exact as the column that it is compared with.
        *(("narrow < 1e300", [0, 1]), ("-1e300 > narrow", [])),
        *(("narrow = 0.1", [0]), ("narrow IN (0.1)", [0]), ("cast(narrow as double) = 0.1", [])),
        *(("tiny + 100 > 150", [0]), ("tiny > 200", []), ("unsigned > -1", [0, 1])),
        *(("tiny % 2 = -1", [1]), ("tiny / 2 = -1", [1]), ("part % 2 = -0.5", [0])),
        ("tiny > 99999999999999999999", []),
        *(("cast(narrow as int) = 1", [1]), ("cast(tiny / -2.0 as int) = 1", [1])),
        *(("day IN (day)", [0, 1]), ("tiny IN (300, 100)", [0]), ("tiny IN (unsigned, -3)", [1])),
        *(("(tiny = 100) IS TRUE", [0]), ("(tiny = 100) IS NOT TRUE", [1, 2])),
        *(("tiny * tiny = 10000", [0]), ("- unsigned < 0", [0, 1]), ("unsigned - 2 < 0", [0])),
        *(("kind = 'cat'", [0]), ("kind ILIKE 'é%'", [1]), ("upper(kind) = 'ÉMILE'", [1])),
        *(("kind LIKE '%a\\%'", []), ("kind NOT ILIKE 'é%'", [0]), ("length(kind) = 5", [1])),
        *(("tags IS NULL", [2]), ("year = 5", [0]), ("YEAR = 5", [0]), ('"Year" = 5', [0])),
        *(("1 = 1", [0, 1, 2]), ("NOT NULL", []), ("NULL = 1 OR tiny = 100", [0])),
        *(("coalesce(NULL, tiny) = 100", [0]), ("coalesce(part, 7) = 7", [2])),
        *(("kind LIKE NULL", []), ("cast(tiny as string) = '100'", [0])),
        # NULL among the options may be any value, so that no row is surely another.
        *(("year NOT IN (5, NULL)", []), ("year NOT IN (NULL)", []), ("year NOT IN (7)", [0, 1])),
        *(("year IN (5, NULL)", [0]), ("NOT (year IN (NULL, 5))", [])),
        *(("kind NOT IN ('cat', NULL)", []), ("narrow NOT IN (1.5, NULL)", [])),
        # -1.2 as a whole number is -1, whether an evaluator cuts off or rounds.
        *(("cast(tiny / 2.5 as int) = -1", [1]), ("cast(-1.2 as int) = -1", [0, 1, 2])),
        # A backslash does not end a text's end.
        ("kind LIKE 'a\\' OR kind = ' OR 1=1 '", []),
        ("kind = 'select' OR `Year` = 5 -- why", [0]),
        ("Year = 5 AND Year" + " + 0" * 140 + " = 5", [0]),
    ],
)
def test_conditions_that_sqlite_cannot_check(where: str, rows: list[int]) -> None:
    assert evaluate(where, SPECIAL).positions.tolist() == rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("tiny", "neither yes nor no"),
        ("nosuch = 1", "names 'nosuch'; the columns: day"),
        ("tiny / 0 = 1", "divide by zero"),
        ("day = 'no day'", "not a date"),
        *((f"{pair} = 'x'", "compares") for pair in ("tiny", "tags")),
        ("kind = 3", "compares string with int64"),
        *(("cast(kind as int) = 1", "fails"), ("cast(part * 1e30 as int) = 1", "fails")),
        *((where, "has") for where in ("kind + 1 = 2", "kind LIKE kind", "NOT tiny", "- kind = 1")),
        *((where, "has") for where in ("kind LIKE 'x!%' ESCAPE '!'", "tiny IS TRUE")),
        *(
            (
                f"cast({name} as string) = '1'",
                f"a {kind} to text, which may be written in many ways",
            )
            for name, kind in (
                ("part", "double"),
                ("narrow", "float"),
                ("time", r"timestamp\[us\]"),
            )
        ),
        ("cast(tiny as interval) = 1", "casts to"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused_in_one_line(where: str, message: str) -> None:
    with pytest.raises(TaskError, match=f"where .*{message}") as error:
        evaluate(where, SPECIAL)
    assert error.value.code == INVALID_ARGUMENT and "\n" not in str(error.value)


def test_a_condition_of_too_many_parts_is_refused() -> None:
    with pytest.raises(TaskError, match="at most 300"):
        parse_condition("width>" + "+".join(["1"] * 990))
    parse_condition(f"path IN ({', '.join(['1'] * 600)})")


NOTES = pa.table({"note": ["a" * 1000] * 5000, "year": [1] * 5000})  # 5 MB


def test_a_condition_may_read_so_much_of_an_index_and_says_how_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("radapter_serve.index.conditions.MAX_WORK", 100 << 20)
    long = " OR ".join(["upper(note) LIKE 'B%'"] * 6)
    with pytest.raises(
        TaskError, match="has 23 .* reads 4 MiB for each .* at most 20 are"
    ) as error:
        evaluate(long, NOTES)
    assert error.value.code == INVALID_ARGUMENT
    assert evaluate(long, NOTES.slice(0, 4000)).count == 0
    # A narrow column has room for more, and any index for a short condition.
    assert evaluate(long.replace("upper(note) LIKE 'B%'", "year + 0 = 1"), NOTES).count == 5000
    monkeypatch.setattr("radapter_serve.index.conditions.MAX_WORK", 1)
    assert evaluate("note LIKE 'a%' AND year = 1", NOTES).count == 5000


def test_a_condition_ends_when_its_caller_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radapter_serve.index.conditions._BATCH_WORK", 1 << 20)
    answers = iter([False, False, True])
    with pytest.raises(TaskError) as error:
        evaluate("note = 'b'", NOTES, lambda: next(answers))
    assert error.value.code == CANCELLED
    assert next(answers, None) is None


@pytest.mark.parametrize(
    "pattern", ["note LIKE '%a_________b%'", "note NOT ILIKE ('_%a____%b_____')"]
)
def test_a_pattern_that_matches_in_too_many_ways_is_refused(pattern: str) -> None:
    with pytest.raises(TaskError, match="with 9 signs _ after a %; at most 8 are allowed"):
        parse_condition(pattern)
    parse_condition(pattern.replace("_", "\\_"))
    parse_condition("note LIKE '____________%____-__-__'")


@pytest.mark.parametrize(
    "deep",
    [
        "cast(" * 22 + "width",
        *("(" * depth + "width>1" + ")" * depth for depth in (11, 400)),
        *("NOT " * depth + "width = 1" for depth in (11, 400)),
        "- " * 11 + "1 = width",
        "lower(" * 11 + "path" + ")" * 11 + " = 'x'",
        "[" * 500,
    ],
)
def test_what_is_nested_deeper_than_ten_is_refused_at_once(deep: str) -> None:
    start = time.thread_time()
    with pytest.raises(TaskError, match="in each other; at most 10") as error:
        parse_condition(deep)
    assert error.value.code == INVALID_ARGUMENT
    assert time.thread_time() - start < 1
    parse_condition("(" * 10 + "width>1" + ")" * 10)


@pytest.mark.parametrize(
    "where",
    [
        *("a.b = 1", "path = ?", "x = :p", "[a] = 1", "a ->> 'b' = 1", "a IN b; x", "a @> b"),
        *("a = current_date", "CASE WHEN a THEN b END = 1", "* = 1", "x = ANY(y)", "year >"),
        *("1=1; drop table images", "(select 1) = 1", "path = (SELECT path FROM images)"),
        *("read_csv('/etc/passwd') = 1", "length(repeat('a', 2000000000)) > 0"),
        *("repeat ('a', 9) = 'a'", "`repeat`('a', 9) = 'a'", "path = 'open", "a = '\ud800'"),
        "path = '\x00' \\",
    ],
)
def test_syntax_that_is_not_allowed_is_refused(where: str) -> None:
    with pytest.raises(TaskError, match="^.invalid_argument. where "):
        parse_condition(where)
