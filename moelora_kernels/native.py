"""The native library `moelora_kernels._C`: C++ implementations of the ops for CPU tensors.

Some have one in CUDA C++ too, where torch and the build had CUDA; importing needs no GPU for it.

Importing this module loads the library, which registers its ops with the dispatcher; where it is
missing, the reference serves the same ops. MOELORA_NATIVE=0 in the environment ignores a built
library (to compare the two), MOELORA_SIMD=portable|avx2|avx512|avx512bf16 limits its vectors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (its libraries must be loaded before the one that links to them)

_NAME = "moelora_kernels._C"


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("MOELORA_NATIVE") == "0":
        return None, "ignored: MOELORA_NATIVE=0"
    if importlib.util.find_spec(_NAME) is None:
        return None, "not built: pip install --no-build-isolation . builds it"
    try:
        return importlib.import_module(_NAME), ""
    except (ImportError, OSError) as error:
        reason = f"built, but it does not load: {error}"
        warnings.warn(f"{_NAME}: {reason}; the reference is used", RuntimeWarning, stacklevel=2)
        return None, reason


_library, _reason = _load()


def available() -> bool:
    """Whether the native library is loaded."""
    return _library is not None


def reason() -> str:
    """Why the library is not loaded; empty where it is."""
    return _reason


def build_info() -> dict[str, Any]:
    """What the library was built with: torch, compiler, vector widths, ops, GPUs ("cuda").

    Empty where it is missing.
    """
    return {} if _library is None else _library.build_info()
