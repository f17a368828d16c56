"""The end of a run of several processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from radapter_serve.training.loop import end_processes


@dataclass
class Processes:
    """As accelerate has them; what was called, in order."""

    num_processes: int
    called: list[str] = field(default_factory=list)

    def wait_for_everyone(self) -> None:
        self.called.append("wait")

    def end_training(self) -> None:
        self.called.append("end")


@pytest.mark.parametrize(("count", "called"), [(1, ["wait", "end"]), (2, ["wait", "sleep", "end"])])
def test_gloo_may_free_what_it_holds_before_its_group_is_freed(
    count: int, called: list[str]
) -> None:
    """A worker hung for ever where its group was freed as soon as the last barrier had passed."""
    processes: Any = Processes(count)

    def sleep(seconds: float) -> None:
        assert seconds > 0.1
        processes.called.append("sleep")

    end_processes(processes, sleep)
    assert processes.called == called
