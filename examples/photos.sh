#!/usr/bin/env bash
# Fine-tune ViT-B-32 on 20 satellite photos of each class of EuroSAT, and print what the base and the
# fine-tuned model make of 100 other photos of each class. No figure here was measured: they are yours.
#
#   bash examples/photos.sh                        downloads EuroSAT (90 MB) and the base (605 MB)
#   bash examples/photos.sh FOLDER                 photos of yours: a sub-folder for each class
#   bash examples/photos.sh FOLDER --recipe quick  more flags of radapter-train
#
# It writes into the new folder ./photos-run.
set -euo pipefail

source=${1:-}
[ $# = 0 ] || shift
[ -z "$source" ] || source=$(cd -- "$source" && pwd)
mkdir photos-run
cd photos-run

# 1. Download, and divide: 20 photos of each class to learn from, and up to 100 others to test.
python3 - "$source" <<'PYTHON'
import random
import shutil
import sys
from pathlib import Path

NAMES = {"AnnualCrop": "annual crop land", "HerbaceousVegetation": "brushland or shrubland",
         "Highway": "highway or road", "Industrial": "industrial buildings", "Pasture": "pasture land",
         "PermanentCrop": "permanent crop land", "Residential": "residential buildings",
         "SeaLake": "sea or lake"}  # the classes of EuroSAT whose names are no words
if not sys.argv[1]:
    from torchvision.datasets import EuroSAT

    EuroSAT("download", download=True)
for folder in sorted(Path(sys.argv[1] or "download/eurosat/2750").iterdir()):
    photos = sorted(folder.iterdir()) if folder.is_dir() else []
    random.Random(0).shuffle(photos)
    for part, chosen in {"train": photos[:20], "test": photos[20:120]}.items():
        for photo in chosen:
            copy = Path(part, NAMES.get(folder.name, folder.name), photo.name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, copy)
PYTHON

# 2. Train, and choose α with the held-out fifth.
radapter-train --data train --out runs/photos "$@"
radapter-eval --adapter runs/photos --alpha auto

# 3. The table: the base (α = 0), half of the change, all of it, on photos that no choice used.
radapter-eval --adapter runs/photos --alpha 0 0.5 1 --data test

# 4. Export, and search the test photos.
radapter-export --adapter runs/photos --alpha auto
radapter-index build test --out indexes/photos
echo "serve it:   cd photos-run && radapter-serve"
