"""The commit of a checkout, for files that record which code they come from."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def git_commit(checkout: Path, code: Sequence[str]) -> str:
    """Return HEAD of a checkout; "" if it is unknown.

    code: the paths, relative to the checkout, that matter. If one of them differs from HEAD, the
    result ends with "-dirty".
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
