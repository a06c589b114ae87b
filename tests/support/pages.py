"""The pages of the repository: their texts, anchors and marked commands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())

# Folders of pages that a command writes; they have neither links nor blocks.
GENERATED = ("benchmarks/results/",)
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.rglob("*.md"))
    if not re.match(
        r"(\.venv|\.pytest_cache|build|out|results|shared)", str(path.relative_to(ROOT))
    )
    and not str(path.relative_to(ROOT)).startswith(GENERATED)
}
README = PAGES["README.md"]


def without_code(text: str) -> str:
    """Return `text` without its fenced blocks, whose lines may look like headings or links."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Return the anchors of all headings of a page."""
    return {anchor(h) for h in re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)}


def shell_block(page: str, marker: str) -> str:
    """Return the block after the line `<!-- marker command -->`."""
    return re.search(rf"<!-- {marker} command -->\n```bash\n(.*?)```", page, re.DOTALL).group(1)
