"""Ten shops, one model: each shop's photos train an adapter, and each request names its shop.

python examples/ten_tenants.py SHOPS PHOTO [BASE]

SHOPS has a folder for each shop, with a sub-folder of photos for each of its classes. The base is
ViT-B-32, or another model of open_clip, such as local-dir:FOLDER.
"""

import sys
from pathlib import Path

from radapter_serve import Model, export, train


def main(shops: Path, photo: Path, *base: str) -> None:
    # A run takes seconds: photos are embedded once, and the adapter is trained with embeddings.
    options = {"base": base[0]} if base else {}
    runs = {}
    for shop in sorted(path for path in shops.iterdir() if path.is_dir()):
        runs[shop.name] = train("quick", data=str(shop), out=Path("runs", shop.name), **options)

    # One release of the base, and the adapters beside it; radapter-serve serves the same folder.
    export(adapters={name: run.folder for name, run in runs.items()})
    model = Model("model_repository")
    for name in runs:
        answer = model.classify(photo, label_set="classes", adapter=name)
        print(f"{name}: {answer.top} (release {answer.receipt.release}, {answer.receipt.adapter})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
