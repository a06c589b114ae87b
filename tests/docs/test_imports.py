"""The package works with torch alone: without Triton and without the native library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import moelora_kernels

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


# Each name may import the names before it. `__init__` is the package itself.
ORDER = (
    "types", "numerics", "build_id", "native", "reference", "kernels", "plans", "ops", "dispatch",
    "presets", "value_checks", "config_rules", "config", "options_page", "autograd", "functional",
    "nn", "checkpoints", "export", "peft", "trainer", "testing", "__init__", "info", "tune",
)  # fmt: skip
# Names that import less than their position allows.
FEW = {
    "reference": {"types", "numerics"},
    "kernels": {"types", "numerics", "reference"},
    "plans": {"kernels", "native"},
    "ops": {"types", "numerics", "native", "reference"},
}


def imports(file: Path) -> list[tuple[str, list[str]]]:
    """Return (name in the package, what is imported from it) for every import that runs."""
    found = []
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    ]
    skipped = {id(node) for block in typing_only for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == "moelora_kernels":
            found += [(name, []) for name in names]
            continue
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        for module in modules:
            package, *rest = module.split(".")
            if package == "moelora_kernels":
                found.append((rest[0] if rest else "__init__", names))
    return found


def test_imports_go_one_way():
    folder = Path(moelora_kernels.__file__).parent
    for file in folder.rglob("*.py"):
        importer = file.relative_to(folder).with_suffix("").parts[0]
        allowed = {importer} | FEW.get(importer, {*ORDER[: ORDER.index(importer)]})
        for name, names in imports(file):
            assert name in allowed, f"{file}: {name}"
            if importer == "kernels" and name == "reference":
                assert names == ["blocks"], file
