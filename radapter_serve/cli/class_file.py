"""`python -m radapter_serve.cli.class_file`: the class file of masks from the official list of
their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged

PROG = "python -m radapter_serve.cli.class_file"


def class_file(official: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> None:
    """Write the class file of A-847 or PC-459, id to name in YAML, from the official list of its
    classes.

    Args:
        official: MaskFormer's prepare_ade20k_full_sem_seg.py, or Pascal Context's labels.txt.
        out: YAML file to write, such as ade847/classes.yaml.
    """
    import yaml

    from radapter_serve.data.official_classes import official_classes

    if out.suffix not in (".yaml", ".yml"):
        raise RAdapterError(f"{out} is no YAML file; name one such as ade847/classes.yaml")
    names = official_classes(official)
    if not out.absolute().parent.is_dir():
        raise RAdapterError(
            f"no folder {out.absolute().parent} for {out.name}; make it, or name another place"
        )
    with staged(out) as part:
        part.write_text(yaml.safe_dump(names, allow_unicode=True, width=1000), encoding="utf-8")
    print(f"wrote {len(names)} classes to {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `class_file`."""
    return run(class_file, argv, prog=PROG)


if __name__ == "__main__":
    raise SystemExit(main())
