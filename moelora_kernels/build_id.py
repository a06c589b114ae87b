"""The build id: a hash of the sources in csrc/ from which a native library was built.

`setup.py` passes it to the linker, which writes it into the library. In a checkout, `native` loads
a library only if it contains the build id of csrc/. This file imports only the standard library,
because `setup.py` runs it before the package can be imported.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

# This folder exists only in a checkout.
CSRC = Path(__file__).resolve().parents[1] / "csrc"
_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def build_id() -> bytes:
    """Return 20 bytes that depend on the name and the content of every source file in csrc/."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in _SUFFIXES:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(CSRC).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.digest()[:20]


def link_flags() -> list[str]:
    """Return the linker flags that write the build id into a library; [] except on Linux."""
    return [f"-Wl,--build-id=0x{build_id().hex()}"] if sys.platform == "linux" else []


def is_current(library: Path) -> bool:
    """Return whether a library contains the build id of csrc/; True if there is no build id."""
    if not CSRC.is_dir() or sys.platform != "linux":
        return True
    return build_id() in library.read_bytes()
