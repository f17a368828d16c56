"""Compare a photo with texts, using only the encoders, in your own Triton, without this package.

python examples/triton_encoders.py HOST:GRPC_PORT model_repository/classify/1 PHOTO TEXT [TEXT ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from PIL import Image, ImageOps
from tokenizers import Tokenizer

address, folder, photo, *texts = sys.argv[1:]
client = triton.InferenceServerClient(address)
facts = json.loads(Path(folder, "release.json").read_text())


def embed(kind: str, name: str, datatype: str, array: np.ndarray) -> np.ndarray:
    tensor = triton.InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array)
    return client.infer(f"{kind}_encoder", [tensor]).as_numpy(f"{kind}_embeds")


# Resize the shorter side and crop the middle, as open_clip's ViT do; the graph normalises.
side = facts["preprocess"]["size"]
image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
image = image.resize([side * length // min(image.size) for length in image.size], 3)  # bicubic
left, top = (round((length - side) / 2) for length in image.size)
pixels = np.asarray(image.crop((left, top, left + side, top + side)))[None]

# A row of token ids for each text, from CLIP's tokenizer, with zeros up to the longest.
tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
tokenizer.enable_truncation(facts["tokenizer"]["context_length"])
tokenizer.enable_padding(pad_id=facts["tokenizer"]["pad"])
tokens = np.array([row.ids for row in tokenizer.encode_batch(texts)], np.int32)

cosines = embed("text", "tokens", "INT32", tokens) @ embed("image", "image", "UINT8", pixels)[0]
print(*(f"{text}: {cosine:.4f}" for text, cosine in zip(texts, cosines, strict=True)), sep="\n")
