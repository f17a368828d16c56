"""Triton model `embed_text`: texts to embeddings."""

from __future__ import annotations

from typing import Any

from radapter_serve.tasks.classify import EmbedTexts
from radapter_serve.triton.responses import answer, need, read
from radapter_serve.triton.version import Version


class TritonPythonModel:
    """Tokenizes the texts of all waiting requests together; each text is encoded once, with others
    of its length.
    """

    def initialize(self, args: dict[str, str]) -> None:
        version = Version(args)
        self._task = EmbedTexts(version.release, version.tokenizer(), version.encode_tokens)

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(
            requests,
            _request,
            lambda some: self._task(*zip(*some, strict=True)),
            lambda e: {"text_embeds": e},
        )


def _request(request: Any) -> tuple[Any, Any]:
    return need(request, "text").ravel(), read(request, "alpha")
