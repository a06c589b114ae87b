"""Pure Python by default; with an importable torch, the native library `moelora_kernels._C` too.

pip install .                        isolated build, no torch in it: pure Python (and Triton)
pip install --no-build-isolation .   builds the native library against the installed torch

MOELORA_NATIVE=0   never build it
MOELORA_NATIVE=1   fail where it cannot be built, instead of installing without it
MAX_JOBS=n         compile n files at a time (read by torch)
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

NATIVE = os.environ.get("MOELORA_NATIVE", "")

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
# The stable ABI of torch 2.10: a library built against any later torch loads in all of them.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# No -march: the kernels pick their vector width at run time (csrc/cpu/simd.h).
FLAGS = ["-O3", "-g0", "-std=c++20", "-fopenmp-simd", "-fvisibility=hidden", "-Wno-psabi"]


class Sdist(sdist):
    """Carries csrc/ also where torch is missing and no extension is declared."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, sorted({*files, *SOURCES, *HEADERS}))


def without_library(reason: object) -> None:
    """Say once that the install goes on in pure Python, or stop where the library is required."""
    if NATIVE == "1":
        sys.exit(f"moelora_kernels: MOELORA_NATIVE=1, but the native library: {reason}")
    print(f"moelora_kernels: installing without the native library: {reason}", file=sys.stderr)


def native() -> dict:
    """The arguments of `setup` that build the library; no extension where it is not to be built."""
    commands = {"sdist": Sdist}
    if NATIVE == "0":
        return {"cmdclass": commands}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        without_library(f"torch cannot be imported at build time ({error})")
        return {"cmdclass": commands}

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                without_library(f"{reason} (pip install -v shows the compiler's output)")
                self.extensions = []

    library = CppExtension(
        "moelora_kernels._C",
        SOURCES,
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*FLAGS, STABLE_ABI]},
        optional=NATIVE != "1",
    )
    return {"ext_modules": [library], "cmdclass": {**commands, "build_ext": Build}}


setup(**native())
