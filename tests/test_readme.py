"""README says what is true: its example runs, its tables name what exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import report
from moelora_kernels import ops
from moelora_kernels.presets import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.search(rf"^## {title}$(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL).group(1)


def first_cells(text: str) -> list[str]:
    cells = re.findall(r"^\| ([^|:]*)", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)]


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "adapter.safetensors").stat().st_size > 0


def test_the_example_of_a_language_model_runs():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    ids = torch.randint(0, 40, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    names = {"model": model, "batch": {"input_ids": ids, "attention_mask": mask, "labels": ids}}
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(compile(example, "README.md", "exec"), names)
    names["loss"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 4
    assert all(p.grad.dtype == torch.float32 for p in trained)


def test_the_example_of_whole_ffns_runs():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    ids = torch.randint(0, 40, (2, 6))
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[2]
    exec(compile(example, "README.md", "exec"), {"model": model})
    model(ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * (7 + 4 * 2)
    assert all(p.grad is not None for p in trained)


def test_tables_name_every_op_and_every_preset():
    assert sorted(first_cells(section("What runs where"))) == sorted(ops.__all__)
    assert first_cells(section("Presets")) == list(PRESETS)


@pytest.mark.parametrize("command", ("benchmark", "test"))
def test_commands_are_one_line(command):
    block = re.search(rf"<!-- {command} command -->\n```bash\n(.*?)```", README, re.DOTALL).group(1)
    assert block.count("\n") == 1
    assert block.startswith("python3 -m venv .venv && ")


def test_tables_are_what_their_result_files_say():
    assert "<!-- table: " in README
    assert report.fill_tables(README, ROOT) == README


def test_every_path_that_readme_names_exists():
    for path in re.findall(r"`((?:benchmarks|examples|tests|\.ci)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / link).exists(), link
