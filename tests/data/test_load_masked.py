"""Masks from label maps and COCO's annotations, against arrays by hand and pycocotools."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as runs
from pycocotools.coco import COCO

from radapter_serve.data.masks import IGNORE, MaskedImage, list_segments, load_masked
from radapter_serve.data.rows import BrokenImage
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError

IDS = np.zeros((6, 8), np.uint8)
IDS[:3, :4] = 1
IDS[3:, 4:] = 2
IDS[0, 7] = 7
IDS[5, 0] = 255
CLASSES = {0: "unlabeled", 2: "dog", 1: "cat, kitty"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """DIR of one image, a.jpg, with a gray label map and the class file beside DIR."""
    for name in ("images", "masks"):
        (tmp_path / "set" / name).mkdir(parents=True)
    Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / "set" / "images" / "a.jpg")
    Image.fromarray(IDS).save(tmp_path / "set" / "masks" / "a.png")
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    return tmp_path / "set"


def only(spec: str, **options: Any) -> MaskedImage:
    (image,) = load_masked(DataSource(spec, **options)).images
    return image


def check(image: MaskedImage) -> None:
    """Check one image for what every kind of data promises."""
    mask = image.mask()
    segments = image.segments()
    assert mask.dtype == np.int32 and all(inside.dtype == bool for _, inside in segments)
    painted = np.zeros(mask.shape, bool)
    for label, inside in segments:
        assert inside.shape == mask.shape and label != IGNORE
        painted |= inside
    np.testing.assert_array_equal(painted, mask != IGNORE)
    assert image.areas() == [(label, inside.sum()) for label, inside in segments]


def test_a_label_map(folder: Path) -> None:
    data = load_masked(DataSource(f"masks:{folder}"))
    assert data.classes == ["dog", "cat, kitty"]
    (image,) = data.images
    assert image.name == "a.jpg" and image.data() == (folder / "images" / "a.jpg").read_bytes()
    expected = np.full((6, 8), IGNORE)  # ids 0, 7 and 255 among it
    expected[:3, :4] = 1
    expected[3:, 4:] = 0
    np.testing.assert_array_equal(image.mask(), expected)
    assert [label for label, _ in image.segments()] == [0, 1]
    check(image)


def test_label_maps_of_other_kinds(folder: Path) -> None:
    expected = only(f"masks:{folder}").mask()
    palette = Image.fromarray(IDS).convert("P")
    palette.putdata(IDS.ravel().tolist())
    palette.putpalette([value for index in range(256) for value in (255 - index, 7, index)])
    palette.save(folder / "masks" / "a.png")
    np.testing.assert_array_equal(only(f"masks:{folder}").mask(), expected)
    ids = np.full((6, 8), 846, np.uint16)
    ids[0] = 255
    Image.fromarray(ids).save(folder / "masks" / "a.png")
    names = folder / "names.txt"
    names.write_text("\n".join(f"class {index}" for index in range(847)))
    mask = only(f"masks:{folder}", classes=names).mask()
    assert (mask[1:] == 846).all() and (mask[0] == 255).all()  # a name is a name


def test_class_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.json").unlink()
    with pytest.raises(RAdapterError, match="no classes.txt, classes.json, classes.yaml in "):
        load_masked(DataSource(f"masks:{folder}"))
    (tmp_path / "classes.yaml").write_text("0: void\n1: cat\n7: cat\n2: dog\n")
    data = load_masked(DataSource(f"masks:{folder}"))  # two ids of one name
    assert data.classes == ["cat", "dog"] and (data.images[0].mask() == 0).sum() == 13
    (folder / "classes.txt").write_text("Ignore\n# no class\nbird\ncat\n")
    data = load_masked(DataSource(f"masks:{folder}"))
    assert data.classes == ["bird", "cat"] and (data.images[0].mask() == 0).sum() == 12
    (tmp_path / "blank.txt").write_text("\ncat\n")  # meant as id 1
    with pytest.raises(RAdapterError, match=r"blank.txt, line 1 is blank: fill it"):
        load_masked(DataSource(f"masks:{folder}", classes=tmp_path / "blank.txt"))
    for content, word in (
        ('["cat"]', "must map class ids to names"),
        ('{"one": "cat"}', "it has 'one': 'cat'"),
        ('{"1": ","}', "it has '1': ','"),
        ('{"1": "void"}', "nothing but what is ignored"),
        ('{"1"', "cannot read the classes"),
        ('{"70000": "cat"}', "70000 is too high"),
    ):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(RAdapterError, match=word):
            load_masked(DataSource(f"masks:{folder}", classes=tmp_path / "wrong.json"))


def test_what_is_wrong_with_label_maps_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match="allowed: masks:DIR, coco:FILE.json"):
        load_masked(DataSource("csv:table.csv"))
    with pytest.raises(RAdapterError, match="cannot read .*none, the folder of the images"):
        load_masked(DataSource(f"masks:{folder}", images=tmp_path / "none"))
    image = only(f"masks:{folder}")
    Image.new("RGB", (8, 6)).save(folder / "images" / "b.png")
    with pytest.raises(RAdapterError, match=r"b.png has no mask .*b.png \(1 of 2"):
        load_masked(DataSource(f"masks:{folder}"))
    (folder / "images" / "b.png").unlink()
    path = folder / "masks" / "a.png"
    Image.new("L", (6, 8)).save(path)
    with pytest.raises(RAdapterError, match="6 x 8 pixels but the image .* 8 x 6"):
        image.mask()
    Image.new("RGB", (8, 6)).save(path)
    with pytest.raises(RAdapterError, match="is a picture in RGB; a label map is"):
        image.segments()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RAdapterError, match="the mask .*a.png can't be read"):
        image.mask()
    Image.fromarray(IDS).save(path)
    image = only(f"masks:{folder}")
    (folder / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(BrokenImage, match="a.jpg can't be read"):
        image.mask()
    (folder / "images" / "a.jpg").unlink()
    with pytest.raises(BrokenImage, match="No such file"):
        image.data()


SEGMENTS = {70000: 17, 300: 1, 5: 1, 66000: 99}  # id to category
IMAGES: list[dict[str, Any]] = [
    {"id": 9, "file_name": "a.jpg", "width": 8, "height": 6},
    {"id": 10, "file_name": "none.jpg"},
]
CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 1, "name": "person"}]


def panoptic(folder: Path) -> tuple[Path, NDArray[np.int64]]:
    ids = np.zeros((6, 8), np.int64)
    ids[:2, :3], ids[2:4], ids[4:, :2], ids[5, 4:] = SEGMENTS
    (folder / "panoptic").mkdir()
    colours = np.dstack([ids % 256, ids // 256 % 256, ids // 65536]).astype(np.uint8)
    Image.fromarray(colours).save(folder / "panoptic" / "a.png")
    info = [
        {"id": i, "category_id": c, "area": int((ids == i).sum()), "iscrowd": 0}
        for i, c in SEGMENTS.items()
    ]
    content = {
        "images": IMAGES,
        "categories": [*CATEGORIES, {"id": 99, "name": "unlabeled"}],
        "annotations": [{"image_id": 9, "file_name": "a.png", "segments_info": info}],
    }
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder / "panoptic.json", ids


def test_panoptic_annotations(folder: Path, tmp_path: Path) -> None:
    file, ids = panoptic(folder)
    data = load_masked(DataSource(f"coco:{file}"))
    assert data.classes == ["cat", "person"]
    (image,) = data.images
    expected = np.full((6, 8), IGNORE)
    expected[ids == 70000] = 0
    expected[(ids == 300) | (ids == 5)] = 1
    np.testing.assert_array_equal(image.mask(), expected)
    labels, masks = zip(*image.segments(), strict=True)
    assert labels == (0, 1, 1)
    for id_, inside in zip(SEGMENTS, masks, strict=False):
        np.testing.assert_array_equal(inside, ids == id_)
    check(image)
    (tmp_path / "names.yaml").write_text("1: somebody, person\n")
    data = load_masked(DataSource(f"coco:{file}", classes=tmp_path / "names.yaml"))
    assert data.classes == ["somebody, person"]
    expected = np.where((ids == 300) | (ids == 5), 0, IGNORE)
    np.testing.assert_array_equal(data.images[0].mask(), expected)


def test_what_is_wrong_with_panoptic_annotations_is_said(folder: Path, tmp_path: Path) -> None:
    file, _ = panoptic(folder)
    with pytest.raises(RAdapterError, match=r"no image .*a.jpg \(1 of 1 are missing in "):
        load_masked(DataSource(f"coco:{file}", images=tmp_path))
    image = only(f"coco:{file}")
    Image.new("L", (8, 6)).save(folder / "panoptic" / "a.png")
    with pytest.raises(RAdapterError, match="a picture in L; a panoptic mask"):
        image.mask()
    Image.new("RGB", (8, 6), (9, 0, 0)).save(folder / "panoptic" / "a.png")
    with pytest.raises(RAdapterError, match="together: the segments 5, 9, 300, 66000, 70000"):
        image.mask()
    # Training lists the segments first, and finds a broken file then.
    whole = (folder / "panoptic" / "a.png").read_bytes()
    for content in (whole[:-20], whole.replace(b"IDAT", b"IDAT\1"), b""):
        (folder / "panoptic" / "a.png").write_bytes(content)
        with pytest.raises(RAdapterError, match="the mask .*a.png can't be read"):
            list_segments(load_masked(DataSource(f"coco:{file}")), 1)
    (folder / "panoptic" / "a.png").unlink()
    with pytest.raises(RAdapterError, match="no mask .*a.png"):
        load_masked(DataSource(f"coco:{file}"))
    content = json.loads(file.read_text())
    for area in (None, "12"):
        content["annotations"][0]["segments_info"][1]["area"] = area
        file.write_text(json.dumps(content))
        with pytest.raises(RAdapterError, match=f"a segment of a.png has the area {area!r}"):
            load_masked(DataSource(f"coco:{file}"))


POLYGONS = [[1.0, 1.0, 6.0, 1.0, 6.0, 5.0, 1.0, 5.0], [6.5, 0.0, 8.0, 0.0, 8.0, 2.0]]


def instances(folder: Path) -> Path:
    small = np.zeros((6, 8), np.uint8)
    small[2:4, 3:7] = 1
    compressed = runs.encode(np.asfortranarray(small))
    objects = [
        (1, 0, POLYGONS),
        (17, 0, {"size": [6, 8], "counts": compressed["counts"].decode()}),
        (1, 1, {"size": [6, 8], "counts": [4, 2, 4, 2, 4, 2, 30]}),
    ]
    annotations = [
        {"id": number, "image_id": 9, "category_id": of, "iscrowd": crowd, "segmentation": inside}
        for number, (of, crowd, inside) in enumerate(objects, 1)
    ]
    content = {"images": IMAGES, "categories": CATEGORIES, "annotations": annotations}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def test_instance_annotations_are_what_pycocotools_reads(folder: Path) -> None:
    file = instances(folder)
    with redirect_stdout(io.StringIO()):
        coco = COCO(file)
    data = load_masked(DataSource(f"coco:{file}"))
    assert data.classes == ["cat", "person"]
    (image,) = data.images  # the one without an object is left out
    segments = image.segments()
    assert [label for label, _ in segments] == [1, 0, 1]
    masks = [coco.annToMask(annotation).astype(bool) for annotation in coco.anns.values()]
    for (_, inside), expected in zip(segments, masks, strict=True):
        np.testing.assert_array_equal(inside, expected)
    check(image)
    assert (image.mask()[2:4, 3:7] == 0).all()  # the smaller on top
    assert image.mask()[1, 2] == 1 and image.mask()[0, 0] == IGNORE


def test_of_an_image_its_masks_need_the_header_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = only(f"coco:{instances(folder)}")
    monkeypatch.setattr(Path, "read_bytes", None)
    opened: list[Path] = []
    plain_open = Path.open

    def counted(path: Path, *options: Any, **more: Any) -> Any:
        opened.append(path)
        return plain_open(path, *options, **more)

    monkeypatch.setattr(Path, "open", counted)
    image.segments()
    assert opened == [folder / "images" / "a.jpg"]  # once, for three objects


def segmentation(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][0].update(segmentation=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (segmentation(value), "a segmentation of the image a.jpg is broken")
            for value in (
                [],
                [[1, 2, 3, 4, 5, 6, 7]],
                [["a", "b", "c", "d", "e", "f"]],
                {"size": [8, 6], "counts": [48]},
                {"size": [6, 8], "counts": [50, -2]},
                {"size": [6, 8], "counts": "PPPPPPPP4"},
            )
        ),
        (lambda c: c.pop("categories"), "not an annotation file of COCO .*'categories'"),
        (lambda c: c["annotations"].clear(), "no segment of a class that is named; its categories"),
        (lambda c: c["annotations"][0].update(category_id=3), r"COCO \(KeyError: 3\)"),
        (lambda c: c["categories"][0].update(name=""), "not an annotation file of COCO"),
        (lambda c: c["images"][0].update(width=9), r"size is \[6, 8\]|9 x 6 pixels but the image"),
        (None, "is not JSON"),
    ],
)
def test_what_is_wrong_with_a_coco_file_is_said(
    folder: Path, change: Callable[[dict[str, Any]], Any] | None, message: str
) -> None:
    file = instances(folder)
    content = json.loads(file.read_text())
    if change is not None:
        change(content)
    file.write_text("{" if change is None else json.dumps(content))
    with pytest.raises(RAdapterError, match=message):
        only(f"coco:{file}").mask()
