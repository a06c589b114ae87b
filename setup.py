"""Pure Python (`pip install .`); with `--no-build-isolation` the native library, for that torch.

MOELORA_NATIVE=0   never build it; 1: fail where it cannot be built, instead of doing without it
MOELORA_CUDA=0|1   the same for its CUDA part, which needs nvcc and a torch with CUDA, but no GPU
TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX", MAX_JOBS=n   its GPUs, and files at a time (read by torch)
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup

PARTS = {"MOELORA_NATIVE": "the native library", "MOELORA_CUDA": "its CUDA part"}
ROOT = Path(__file__).parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*"))
CPP, CU = ([path for path in FILES if path.endswith(kind)] for kind in (".cpp", ".cu"))
# The stable ABI of torch 2.10: a library built against any later torch loads in all of them.
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# No -march: the kernels pick their vector width at run time (csrc/cpu/simd.h).
CXX_FLAGS = [*FLAGS, "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wno-psabi"]
# The CUDA runtime is the one that torch has loaded: none is linked.
NVCC_FLAGS = [*FLAGS, "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]


def without(switch: str, reason: str) -> dict:
    """Say once that the install goes on without a part, or stop where it is required."""
    if os.environ.get(switch) == "1":
        sys.exit(f"moelora_kernels: {switch}=1, but {PARTS[switch]}: {reason}")
    print(f"moelora_kernels: installing without {PARTS[switch]}: {reason}", file=sys.stderr)
    return {}


def cuda_part(version: str | None, home: str | None) -> dict:
    """What the library differs in with csrc/cuda; nothing where that is not to be built."""
    nvcc = Path(home or "", "bin", "nvcc")
    if os.environ.get("MOELORA_CUDA") == "0" or not version or not nvcc.exists():
        reason = "no nvcc in CUDA_HOME or PATH, or MOELORA_CUDA=0"
        return without("MOELORA_CUDA", reason if version else "this torch has no CUDA")
    newest = "10.0" if b"sm_100" in subprocess.check_output([nvcc, "--list-gpu-code"]) else "9.0"
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;8.9;9.0a;{newest}+PTX")
    flags, link = {"cxx": [*CXX_FLAGS, "-DMOELORA_CUDA"], "nvcc": NVCC_FLAGS}, ["-ltorch_cuda"]
    return dict(sources=CPP + CU, extra_compile_args=flags, extra_link_args=link, optional=False)


def native() -> dict:
    """The arguments of `setup` that build the library; none where it is not to be built."""
    if os.environ.get("MOELORA_NATIVE") == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
    except ImportError as error:
        return without("MOELORA_NATIVE", f"torch cannot be imported at build time ({error})")

    flags, optional = {"cxx": CXX_FLAGS}, os.environ.get("MOELORA_NATIVE") != "1"
    options = dict(depends=FILES, include_dirs=[str(ROOT / "csrc")], optional=optional)
    library = CppExtension("moelora_kernels._C", CPP, extra_compile_args=flags, **options)
    plain = dict(vars(library))
    vars(library).update(cuda_part(torch.version.cuda, CUDA_HOME))

    class Build(BuildExtension):
        def run(self) -> None:
            inplace = self.inplace
            try:
                super().run()
            except Exception as error:
                reason = f"{' '.join(str(error).split())[:300]} (pip install -v shows the output)"
                again = library.sources != CPP
                without("MOELORA_CUDA" if again else "MOELORA_NATIVE", reason)
                vars(library).update(plain)
                self.compiler, self.inplace, self.extensions = None, inplace, [library] * again
                self.run()

    return {"ext_modules": [library], "cmdclass": {"build_ext": Build}}


setup(**native())
