"""README says what is true: its example runs, its tables name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import report
from moelora_kernels import export, ops

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.search(rf"^## {title}$(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL).group(1)


def first_cells(text: str) -> list[str]:
    cells = re.findall(r"^\| ([^|:]*)", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)]


def qwen():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).requires_grad_(False)


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "adapter.safetensors").stat().st_size > 0


def test_the_example_of_a_language_model_runs():
    model = qwen().to(torch.bfloat16)
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


def examples(title: str) -> list[str]:
    part = re.search(rf"^### {title}$(.*?)(?=^##|\Z)", README, re.MULTILINE | re.DOTALL).group(1)
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


def run(example: str, **names) -> dict:
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_example_of_peft_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (example,) = examples("PEFT")
    names = run(example, model=qwen(), ids=torch.arange(8).view(2, 4))
    assert names["peft_model"].peft_config["default"].num_experts == 8


def test_the_example_of_the_trainer_runs(tmp_path, monkeypatch):
    for name in ("transformers", "accelerate", "tokenizers"):
        pytest.importorskip(name)
    from support.trainers import make_tokenizer

    monkeypatch.chdir(tmp_path)
    (example,) = examples("Trainer and generate")
    example = example.replace("max_steps=100", "max_steps=2, use_cpu=True, report_to=[]")
    samples = [{"input_ids": [n, 5, 6], "labels": [n, 5, 6], "task_ids": n} for n in range(1, 17)]
    names = run(example, model=qwen(), tokenizer=make_tokenizer(), dataset=samples)
    assert names["trainer"].state.global_step == 2


def test_the_examples_of_checkpoints_run(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from moelora_kernels import MoeLoraConfig, replace_linears
    from moelora_kernels.checkpoints import export_ming, export_moelora_peft

    monkeypatch.chdir(tmp_path)
    moelora, ming = examples("Checkpoints of MOELoRA-peft and MING-MOE")
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

    def linears():
        return torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in names})

    model = linears()
    replace_linears(model, MoeLoraConfig.preset("moelora"), names)
    (tmp_path / "moelora").mkdir()
    torch.save(export_moelora_peft(model), tmp_path / "moelora" / "adapter_model.bin")
    found = run(moelora, model=linears())["state"]
    assert found.keys() == export_moelora_peft(model).keys()

    model = qwen()
    replace_linears(model, MoeLoraConfig.preset("ming"), ["gate_proj", "up_proj", "down_proj"])
    replace_linears(model, MoeLoraConfig.preset("lora"), ["q_proj", "k_proj", "v_proj", "o_proj"])
    torch.save(export_ming(model), tmp_path / "non_lora_trainables.bin")
    assert run(ming, model=qwen(), folder=tmp_path)["state"].keys() == export_ming(model).keys()


def test_the_example_of_serving_and_its_command_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = examples("Serving one task")
    run(example)
    command = re.search(r"^python -m moelora_kernels.export (.*)$", README, re.MULTILINE).group(1)
    *arguments, out = command.split()
    export.main([*arguments, "from_the_file"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "from_the_file" / name).read_bytes() == (
            tmp_path / out / name
        ).read_bytes()


def test_the_example_of_a_quantised_base_runs():
    (example,) = examples("Quantised and wrapped bases")
    model = run(example)["model"]
    model(torch.randn(3, 64)).sum().backward()


def test_the_table_names_every_op():
    assert sorted(first_cells(section("What runs where"))) == sorted(ops.__all__)


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
