"""`Rechecks`: while a gateway serves, it asks the encoders again for samples of which torch's
embeddings are stored, in the same queues as callers, so in their batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.upstream import LOG, SHORT_TIMEOUT, Entry, Inference, Refused, Upstream
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.release import TASKS, Release
from radapter_serve.release.repository import ENCODERS

ROWS = 2  # of each encoder, which take turns
TRIES = 3  # an encoder that deviates is asked again at once, and fails if it does so each time


class Rechecks:
    """Asks one encoder of a served release every `interval` seconds, in turn, within the bounds of
    the release as it is computed; `count` gets each encoder and ok, deviates or no_answer.
    """

    def __init__(
        self,
        upstream: Upstream,
        repository: Path,
        interval: float,
        count: Callable[[str, str], object] = lambda encoder, outcome: None,
    ) -> None:
        self._upstream = upstream
        self._repository = repository
        self._interval = interval
        self._count = count
        self._turn = 0
        self._wrong: dict[tuple[int, str], str] = {}  # why, by release and encoder

    @property
    def trouble(self) -> str | None:
        """The reason why an encoder answers wrongly, or None."""
        return next(iter(self._wrong.values()), None)

    async def run(self) -> None:
        """Ask until this task is cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.step()
            except Exception as error:  # the next one may be asked
                LOG.warning("the stored samples can't be asked: %s", error)

    async def step(self) -> None:
        """Ask the next encoder for one row."""
        facts = (await self._upstream.config(TASKS[-1])).facts()
        places = [
            (version, encoder)
            for version in facts
            for encoder in ENCODERS
            if (self._repository / encoder / str(version)).is_dir()
        ]
        for gone in self._wrong.keys() - set(places):  # it is no longer served
            del self._wrong[gone]
        if not places:
            return
        version, encoder = place = places[self._turn % len(places)]
        release = Release.from_dict(facts[version])
        folder = self._repository / encoder / str(version)
        rows = _few(await asyncio.to_thread(Samples.load, folder), release)
        samples = rows[self._turn // len(places) % len(rows)]
        self._turn += 1

        # A deviation counts if it stays; an encoder without an answer is the concern of others.
        why = None
        for _ in range(TRIES):
            try:
                embeds = await self._ask(encoder, version, samples)
            except Refused:
                self._count(encoder, "no_answer")
                return
            try:
                name = f"{encoder} of release {version}"
                compare(name, lambda *_, embeds=embeds: embeds, samples, release.bounds)
            except RAdapterError as error:
                why = str(error).partition("; ")[0]
                self._count(encoder, "deviates")
                LOG.warning("%s", why)
            else:
                why = None
                self._count(encoder, "ok")
                break
        if why is not None:
            self._wrong[place] = f"{why}; start the server again"
        elif place in self._wrong:
            del self._wrong[place]
            LOG.warning("%s of release %s is right again", encoder, version)

    async def _ask(self, encoder: str, version: int, samples: Samples) -> NDArray[Any]:
        name = "tokens" if encoder == "text_encoder" else "image"
        inputs: dict[str, NDArray[Any]] = {name: samples.inputs[0]}
        if samples.alphas:
            inputs["alpha"] = samples.alphas[0]
        asked = Inference(encoder, str(version), inputs, is_probe=True)
        reply = await self._upstream.infer(asked, SHORT_TIMEOUT, Entry("recheck"))
        [embeds] = reply.outputs.values()
        return np.asarray(embeds, np.float32)


def _few(samples: Samples, release: Release) -> list[Samples]:
    """Some rows of samples, each alone; of texts the shortest, without their padding."""
    rows = []
    for number, (inputs, references) in enumerate(
        zip(samples.inputs, samples.references, strict=True)
    ):
        for row in range(len(inputs)):
            values = inputs[row : row + 1]
            if values.ndim == 2 and release.tokenizer.dynamic_length:
                # The end may have the number of the padding, so one of these stays.
                used = np.flatnonzero(values[0] != release.tokenizer.pad)
                values = values[:, : used[-1] + 2 if len(used) else 1]
            alphas = [batch[row : row + 1] for batch in samples.alphas[number : number + 1]]
            rows.append(Samples([values], [references[row : row + 1]], alphas))
    return sorted(rows, key=lambda row: row.inputs[0].size)[:ROWS]
