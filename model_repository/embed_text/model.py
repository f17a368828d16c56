"""Triton model `embed_text`: texts to embeddings."""

from __future__ import annotations

from typing import Any

from radapter_serve.tasks.classify import EmbedTexts
from radapter_serve.tasks.triton import Version, answer, read


class TritonPythonModel:
    """Tokenizes the texts of all waiting requests together; each text is encoded once, with others of its length."""

    def initialize(self, args: dict[str, str]) -> None:
        version = Version(args)
        self._task = EmbedTexts(version.release, version.tokenizer(), version.encode_tokens)

    def execute(self, requests: list[Any]) -> list[Any]:
        texts = [read(request, "text").ravel() for request in requests]
        alphas = [read(request, "alpha") for request in requests]
        return answer(requests, lambda: self._task(texts, alphas), lambda embeds: {"text_embeds": embeds})
