"""Whom to credit: every set of drawings that was used, with its author and its licence."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.drawings.iconify import Source


def attribution(title: str, used: Mapping[str, int], credited: Mapping[str, Source]) -> str:
    """A Markdown table of the sets.

    Args:
        title: of what was made of them.
        used: drawings of each set.
        credited: the sets' facts.
    """
    lines = [
        f"# {title}",
        "",
        "| set | drawings | title | author | licence |",
        "|---|---|---|---|---|",
    ]
    for name, count in sorted(used.items()):
        source = credited[name]
        author = f"[{source.author}]({source.url})" if source.url else source.author
        lines.append(f"| `{name}` | {count:,} | {source.title} | {author} | {source.licence} |")
    return "\n".join(lines).replace("|  |", "| |") + "\n"
