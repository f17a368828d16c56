"""For how long it counts that tasks answer, and that they do not."""

from __future__ import annotations

import asyncio

from radapter_serve.gateway.errors import Refused
from radapter_serve.gateway.upstream import FRESH, Health
from radapter_serve.release.release import TASKS
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_upstream import FakeUpstream


def test_answers_and_failures_count_for_some_seconds() -> None:
    async def main() -> None:
        upstream = FakeUpstream()
        clock = FakeClock()
        health = Health(upstream, clock.monotonic)
        assert await health.trouble() is None
        upstream.error = Refused(500, "internal_error", "")
        clock.now += FRESH - 0.01
        health.answered("classify")
        assert await health.trouble() is None
        assert len(upstream.asked) == len(TASKS)
        clock.now += 0.01
        assert "does not answer" in (await health.trouble() or "")
        # All but the one that has answered a caller since.
        asked = upstream.asked[len(TASKS) :]
        assert sorted(one.model for one in asked) == sorted(set(TASKS) - {"classify"})
        upstream.error = Refused(400, "no_patch_encoder", "")
        clock.now += FRESH - 0.01
        assert "does not answer" in (await health.trouble() or "")
        clock.now += 0.01
        assert await health.trouble() is None  # a refusal is an answer

    asyncio.run(main())
