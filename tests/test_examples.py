"""The examples run."""

import runpy
from pathlib import Path

from tests.helpers.graphs import quick_exports
from tests.helpers.small_release import png

SHOPS = 3  # ten take a minute
EXAMPLES = Path(__file__).parents[1] / "examples"


def test_ten_tenants(tiny_clip_dir, common, tmp_path, monkeypatch, capsys):
    for shop in range(SHOPS):
        for label in ("cat", "dog"):
            folder = tmp_path / "shops" / f"shop-{shop}" / f"{label} of shop {shop}"
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{number}.png").write_bytes(png(100 * shop + number + len(label)))
    (tmp_path / "photo.png").write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(EXAMPLES / "ten_tenants.py"))["main"]
    with quick_exports(common):
        main(Path("shops"), Path("photo.png"), tiny_clip_dir)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == SHOPS
    for shop, line in enumerate(lines):
        assert line.startswith(f"shop-{shop}: ")
        assert line.endswith(f"of shop {shop} (release 1, shop-{shop})")
