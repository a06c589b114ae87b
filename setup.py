"""`pip install .` installs pure Python; `--no-build-isolation` adds the native library.

MOELORA_NATIVE=0|1   0: do not build the library; 1: fail if it cannot be built
MOELORA_CUDA=0|1     the same for its CUDA part. It needs nvcc and a torch with CUDA, but no GPU.
torch reads TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX" (the GPUs) and MAX_JOBS=n (files at a time).
"""

import os
import runpy
import subprocess
from pathlib import Path

from setuptools import setup

PARTS = {"MOELORA_NATIVE": "the native library", "MOELORA_CUDA": "its CUDA part"}
FILES = sorted(map(str, Path("csrc").rglob("*.*")))
CPP, CU = ([path for path in FILES if path.endswith(kind)] for kind in (".cpp", ".cu"))
# The stable ABI of torch 2.10: a library built against any later torch loads in all of them.
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Without -march, because the kernels choose their vector width at run time (csrc/cpu/simd.h).
CXX_FLAGS = [*FLAGS, "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wno-psabi"]
# Do not link a CUDA runtime, because torch has loaded one.
NVCC_FLAGS = [*FLAGS, "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]
LINK_FLAGS = runpy.run_path("moelora_kernels/build_id.py")["link_flags"]()


def without(switch: str, reason: str) -> dict:
    """Print why a part is not built, and return {}. Exit if the switch requires the part."""
    if os.environ.get(switch) == "1":
        raise SystemExit(f"moelora_kernels: {switch}=1, but {PARTS[switch]} is not built: {reason}")
    print(f"moelora_kernels: installing without {PARTS[switch]}: {reason}")
    return {}


def cuda_part(version: str | None, home: str | None) -> dict:
    """Return the attributes of an extension with csrc/cuda; {} if csrc/cuda is not built."""
    nvcc = Path(home or "", "bin", "nvcc")
    if os.environ.get("MOELORA_CUDA") == "0" or not version or not nvcc.exists():
        return without("MOELORA_CUDA", f"MOELORA_CUDA=0, no {nvcc} or torch.version.cuda={version}")
    newest = "10.0" if b"sm_100" in subprocess.check_output([nvcc, "--list-gpu-code"]) else "9.0"
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;8.9;9.0a;{newest}+PTX")
    # Some kernels have code for sm_90a alone.
    defines = ["-DMOELORA_SM_90A"] if "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"] else []
    cxx_flags = [*CXX_FLAGS, "-DMOELORA_CUDA", *defines]
    flags = {"cxx": cxx_flags, "nvcc": [*NVCC_FLAGS, *defines]}
    link_flags = [*LINK_FLAGS, "-ltorch_cuda"]
    return dict(sources=CPP + CU, extra_compile_args=flags, extra_link_args=link_flags)


def native() -> dict:
    """Return the arguments of `setup` that build the library; {} if it is not built."""
    if os.environ.get("MOELORA_NATIVE") == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
    except ImportError as error:
        return without("MOELORA_NATIVE", f"torch cannot be imported at build time ({error})")

    common = dict(depends=FILES, include_dirs=[os.path.abspath("csrc")], extra_link_args=LINK_FLAGS)
    library = CppExtension("moelora_kernels._C", CPP, extra_compile_args=CXX_FLAGS, **common)
    plain = dict(vars(library))
    vars(library).update(cuda_part(torch.version.cuda, CUDA_HOME))

    class Build(BuildExtension):
        def run(self) -> None:
            # Link again even if no source is newer: the build id must be that of these sources.
            self.force, inplace = True, self.inplace
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
