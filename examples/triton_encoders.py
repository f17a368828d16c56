"""Compare a photo with texts, using only the encoders, in your own Triton, without this package.

python examples/triton_encoders.py HOST:GRPC_PORT model_repository/classify/1 PHOTO TEXT [TEXT ...]
"""

import json
import string
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


# CLIP gets the middle of the image, SigLIP the whole image as a square. The graph normalises.
rules = facts["preprocess"]
side = rules["size"]
image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
whole = image.size if rules["resize_mode"] == "squash" else [min(image.size)] * 2
size = [side * length // of for length, of in zip(image.size, whole, strict=True)]
image = image.resize(size, Image.Resampling[rules["interpolation"].upper()])
left, top = (round((length - side) / 2) for length in image.size)
pixels = np.asarray(image.crop((left, top, left + side, top + side)))[None]

# A row of token ids for each text, padded to the context length: SigLIP needs all of it, and reads
# neither capitals nor punctuation.
rules = facts["tokenizer"]
tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
tokenizer.enable_truncation(rules["context_length"])
tokenizer.enable_padding(pad_id=rules["pad"], length=rules["context_length"])
cleaned = texts
if rules["clean"] == "canonicalize":
    signs = str.maketrans(dict.fromkeys(string.punctuation, "") | {"_": " "})
    cleaned = [" ".join(text.translate(signs).lower().split()) for text in texts]
tokens = np.array([row.ids for row in tokenizer.encode_batch(cleaned)], np.int32)

cosines = embed("text", "tokens", "INT32", tokens) @ embed("image", "image", "UINT8", pixels)[0]
print(*(f"{text}: {cosine:.4f}" for text, cosine in zip(texts, cosines, strict=True)), sep="\n")
