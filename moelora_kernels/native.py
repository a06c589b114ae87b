"""Load the native library `moelora_kernels._C`: C++ implementations of the ops for CPU tensors.

If it was built with CUDA, it contains some ops in CUDA C++ too. Loading the library does not need a
GPU.

Importing this module loads the library, and the library registers its ops with torch's dispatcher.
If it is missing, the reference computes the same ops. The library is searched in this order:

    1. Beside this file. It is there in an installed package and in an editable install.
    2. In each folder of sys.path, if this file is in a checkout (csrc/ is beside the package).
       `pip install .` puts the library into site-packages.

In a checkout, a library is not loaded if it was built from sources that differ from csrc/. A
warning and `reason()` then name it. (Only the linker of Linux writes the build id that this check
needs; other systems load the library without the check.)

Environment variables:
    MOELORA_NATIVE=0                              do not load the library, to run the reference
    MOELORA_SIMD=portable|avx2|avx512|avx512bf16  limit the vector instructions that it uses
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (the native library links to torch's libraries)

from moelora_kernels.build_id import CSRC, is_current

_NAME = "moelora_kernels._C"
_PACKAGE = Path(__file__).resolve().parent
_BUILD = "`MOELORA_NATIVE=1 pip install --no-build-isolation .` builds it"


def _built_libraries() -> list[Path]:
    """Return the library files for this Python: the one beside this file comes first."""
    folders = [_PACKAGE]
    if CSRC.is_dir():
        folders += [Path(entry, _PACKAGE.name).resolve() for entry in sys.path]
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    files = [folder / f"_C{suffix}" for folder in dict.fromkeys(folders) for suffix in suffixes]
    return [file for file in files if file.is_file()]


def _load() -> tuple[ModuleType | None, str]:
    """Load the library. Return it and "", or None and the reason why it is not loaded."""
    if os.environ.get("MOELORA_NATIVE") == "0":
        return None, "ignored: MOELORA_NATIVE=0"
    libraries = _built_libraries()
    if not libraries:
        return None, f"not built: {_BUILD}"
    library = next(filter(is_current, libraries), None)
    if library is None:
        files = ", ".join(map(str, libraries))
        reason = f"not loaded: built from other sources than {CSRC}: {files}; {_BUILD} again"
    else:
        try:
            return _import_file(library), ""
        except (ImportError, OSError) as error:
            reason = f"built, but it does not load: {error}"
    warnings.warn(f"{_NAME}: {reason}; the reference is used", RuntimeWarning, stacklevel=2)
    return None, reason


def _import_file(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[_NAME] = module
    return module


_library, _reason = _load()


def available() -> bool:
    """Return whether the native library is loaded."""
    return _library is not None


def reason() -> str:
    """Return why the library is not loaded, or "" if it is loaded."""
    return _reason


def path() -> str:
    """Return the file of the loaded library, or "" if no library is loaded."""
    return "" if _library is None else str(_library.__file__)


def build_info() -> dict[str, Any]:
    """Return the facts of the build: torch, compiler, vector widths, ops, GPUs ("cuda").

    The dictionary is empty if the library is not loaded.
    """
    return {} if _library is None else _library.build_info()


def plan_library() -> ModuleType | None:
    """Return the library if it replays plans of layer ops, see `plans`; else None."""
    return _library if build_info().get("planned_ops") else None


def replay_failures() -> tuple[int, str]:
    """Return how many replays of plans failed in the library, and why the last of them failed.

    The reason is "" if none failed. Python replays these plans. A failed allocation does not count.
    """
    library = plan_library()
    return (0, "") if library is None else library.replay_failures()
