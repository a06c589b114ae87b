"""The package works with torch alone: without Triton and without the native library."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys
for name in ("triton", "transformers", "peft", "numpy", "matplotlib", "moelora_kernels._C"):
    sys.modules[name] = None
import torch
import moelora_kernels as mk
layer = mk.MoeLoraLinear(8, 8, config=mk.MoeLoraConfig.preset("ming", rank=2))
torch.nn.init.normal_(layer.lora_B)
x = torch.randn(3, 8, requires_grad=True)
layer(x).sum().backward()
assert layer.lora_A.grad.abs().sum() > 0 and x.grad is not None
print("works")
"""


def run(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_works_without_triton_and_without_the_native_library():
    assert run(PROGRAM).strip() == "works"


def test_the_import_loads_no_large_package_but_torch():
    loaded = run(
        "import sys, torch; before = set(sys.modules); import moelora_kernels;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    ).split()
    assert not {"triton", "transformers", "peft", "matplotlib"} & set(loaded)
