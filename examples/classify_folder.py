"""Sort photos into a folder for each label, and those that the model doubts into `unsure`.

python examples/classify_folder.py PHOTOS SORTED [LABEL ...]

The model is the release in ./model_repository. Without labels they are its own classes.
"""

import shutil
import sys
from pathlib import Path

from radapter_client import list_images
from radapter_serve import Model

SURE = 0.8  # the least score, from 0 to 1, of a photo's best label


def main(photos: Path, folder: Path, *labels: str) -> None:
    paths = list_images(photos)
    with Model("model_repository") as model:
        if labels:
            answers = model.classify(paths, labels)
        else:
            answers = model.classify(paths, label_set="classes")
    for path, answer in zip(paths, answers, strict=True):
        label = answer.top if answer.scores[0] >= SURE else "unsure"
        target = folder / label
        target.mkdir(parents=True, exist_ok=True)
        name = "-".join(Path(path).relative_to(photos).parts)  # photos in two folders may share one
        shutil.copy(path, target / name)
        print(f"{path}: {label} ({answer.top} {answer.scores[0]:.0%})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
