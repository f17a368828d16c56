"""Find the best photo for each text with OpenAI's own client.

python examples/openai_embeddings.py http://localhost:8000/v1 PHOTOS TEXT [TEXT ...]

The server is `radapter-serve --engine process` or `radapter-gateway`. OPENAI_API_KEY is the key.
"""

import base64
import os
import sys
from pathlib import Path

import numpy as np
import openai

KINDS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}


def main(url: str, folder: Path, *texts: str) -> None:
    photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)
    inputs = list(texts)
    for photo in photos:
        image = base64.b64encode(photo.read_bytes()).decode()
        inputs.append(f"data:image/{KINDS[photo.suffix.lower()]};base64,{image}")

    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    embeddings = []
    for start in range(0, len(inputs), 32):
        answer = client.embeddings.create(model="radapter", input=inputs[start : start + 32])
        embeddings += [row.embedding for row in answer.data]

    # Embeddings have unit length, so their products are cosines.
    vectors = np.array(embeddings)
    cosines = vectors[: len(texts)] @ vectors[len(texts) :].T
    for text, row in zip(texts, cosines, strict=True):
        print(f"{text}: {photos[row.argmax()]} ({row.max():.3f})")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
