"""What becomes of a request: an answer or an error, one for each, so that no request touches its
neighbours.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from radapter_serve.contract.errors import INTERNAL_ERROR, TaskError

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The outcome of one request.

    Args:
        answer: what its caller gets; None where there is an error.
        error: why there is no answer, or None.
    """

    answer: T | None = None
    error: TaskError | None = None

    @classmethod
    def of(cls, compute: Callable[[], T]) -> Outcome[T]:
        """The outcome of a computation. A fault of the program goes to the log, and the caller
        learns no more of it. The error lets go of where it came from, which may hold an image.
        """
        try:
            return cls(compute())
        except TaskError as error:
            error.__cause__ = error.__context__ = None
            return cls(error=error.with_traceback(None))
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return cls(
                error=TaskError(
                    INTERNAL_ERROR, "the server failed on this request; its log says why"
                )
            )

    def then(self, compute: Callable[[T], U]) -> Outcome[U]:
        """The outcome of what comes next, where there is an answer to compute it from."""
        if self.error is not None:
            return Outcome(error=self.error)
        return Outcome.of(lambda: compute(self.unwrap()))

    def unwrap(self) -> T:
        """The answer.

        Raises:
            TaskError: the error, where there is one.
        """
        if self.error is not None:
            raise self.error
        return self.answer  # type: ignore[return-value]


def run_good(
    inputs: Sequence[Outcome[T]], run: Callable[[list[T]], Sequence[Outcome[U]]]
) -> list[Outcome[U]]:
    """Run together what could be read, and keep the errors of the rest in their places.

    Args:
        inputs: of each request.
        run: gives an outcome for each of some inputs; it is not called for none.
    """
    good = [one.unwrap() for one in inputs if one.error is None]
    found = iter(run(good) if good else ())
    results: list[Outcome[U]] = []
    for one in inputs:
        results.append(next(found) if one.error is None else Outcome(error=one.error))
    return results


def isolated(
    run: Callable[[Sequence[T]], Sequence[Outcome[U]]], requests: Sequence[T]
) -> Sequence[Outcome[U]]:
    """Run requests together, or one by one where they fail together: the failure then stays with
    its request.

    Args:
        run: gives an outcome for each of some requests; may raise.
        requests: what it is given; it is not called for none.
    """
    if not requests:
        return []
    together = Outcome.of(lambda: run(requests))
    if together.error is None:
        return together.unwrap()
    if len(requests) == 1:
        return [Outcome(error=together.error)]
    return [outcome for request in requests for outcome in isolated(run, [request])]
