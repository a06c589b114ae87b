"""Every Python block of every page runs, and its result is checked."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from moelora_kernels import export
from support.compare import assert_same
from support.models import language_model
from support.pages import PAGES, anchor, shell_block


class Section(NamedTuple):
    """The Python blocks under one heading of a page, which share their names."""

    page: str
    heading: str
    blocks: list[str]

    @property
    def key(self) -> str:
        """The page and the anchor of the heading, like in a link."""
        return f"{self.page}#{anchor(self.heading)}"


def sections(page: str) -> list[Section]:
    """Return the sections of a page that have Python blocks, in order."""
    blocks_of: dict[str, list[str]] = {}
    heading = ""
    parts = r"^#+ (?P<heading>[^\n]*)$|^```(?P<kind>\w*)\n(?P<code>.*?)^```$"
    for line in re.finditer(parts, PAGES[page], re.MULTILINE | re.DOTALL):
        if line["heading"] is not None:
            heading = line["heading"]
        elif line["kind"] == "python":
            blocks_of.setdefault(heading, []).append(line["code"])
    return [Section(page, heading, blocks) for heading, blocks in blocks_of.items()]


SECTIONS = [section for page in PAGES for section in sections(page)]


def frozen_model(family: str = "Qwen2") -> nn.Module:
    """Return a frozen language model of 2 layers with random weights, in training."""
    return language_model(family).requires_grad_(False).train()


def tokenizer():
    """Return a tokenizer of 40 tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {chr(94 + i): i for i in range(3, 40)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def batch() -> dict[str, torch.Tensor]:
    """Return two samples for a language model; the second one is padded."""
    ids = torch.randint(3, 40, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


# Names that a block may use without assigning them. A comment of the block says what they are.
DEFAULTS: dict[str, Callable[[], Any]] = {
    "model": frozen_model,
    "tokenizer": tokenizer,
    "batch": batch,
    "ids": lambda: torch.arange(3, 11).view(2, 4),
    "dataset": lambda: [
        {"input_ids": [n, 5, 6], "labels": [n, 5, 6], "task_ids": n} for n in range(1, 17)
    ],
}
# Text of a block -> a shorter run on a CPU.
SHORTER = {"max_steps=100": "max_steps=2, use_cpu=True, report_to=[]"}


def free_names(code: str) -> set[str]:
    """Return the names of DEFAULTS that a block reads before it assigns them."""
    is_read_first: dict[str, bool] = {}
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        is_read_first.setdefault(node.id, isinstance(node.ctx, ast.Load))
    return {name for name, read in is_read_first.items() if read and name in DEFAULTS}


def imported(code: str) -> set[str]:
    """Return the packages that a block imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def run(section: Section, **names: Any) -> dict[str, Any]:
    """Run the blocks of a section one after the other. Return the names that they assign."""
    for block in section.blocks:
        for package in imported(block):
            pytest.importorskip(package)
        for name in free_names(block) - names.keys():
            names[name] = DEFAULTS[name]()
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        exec(compile(block, section.key, "exec"), names)
    return names


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# Key of a section -> a check that runs after its blocks.
AFTER: dict[str, Callable[[dict[str, Any]], None]] = {}
# Key of a section -> a function that returns its values for names of DEFAULTS.
BEFORE: dict[str, Callable[[], dict[str, Any]]] = {}


def after(key: str):
    """Register a check for the names that the blocks of a section assign."""
    return lambda function: AFTER.setdefault(key, function)


def before(key: str):
    """Register a function that returns names for the blocks of a section."""
    return lambda function: BEFORE.setdefault(key, function)


@after("README.md#a-model")
def the_adapter_is_written(names) -> None:
    assert Path("adapter.safetensors").stat().st_size > 0
    assert names["loss"].isfinite()


@before("moelora_kernels/nn/README.md#a-language-model")
def in_bfloat16() -> dict[str, Any]:
    return {"model": frozen_model().to(torch.bfloat16)}


@after("moelora_kernels/nn/README.md#a-language-model")
def adapters_have_float32_gradients(names) -> None:
    names["loss"].backward()
    parameters = trained(names["model"])
    assert len(parameters) == 2 * 3 * 4
    assert all(p.grad.dtype == torch.float32 for p in parameters)


@after("README.md#peft")
def peft_has_loaded_the_preset(names) -> None:
    assert names["peft_model"].peft_config["default"].num_experts == 8


@before("moelora_kernels/peft/README.md#load-it-in-a-new-process")
def an_adapter_of_peft() -> dict[str, Any]:
    get_peft_model = pytest.importorskip("peft").get_peft_model
    from moelora_kernels.peft import MoeLoraPeftConfig

    config = MoeLoraPeftConfig(preset="moelora", target_modules=["q_proj", "v_proj"])
    get_peft_model(frozen_model(), config).save_pretrained("adapter")
    return {}


@before("moelora_kernels/nn/README.md#whole-ffn-experts")
def a_llama() -> dict[str, Any]:
    return {"model": frozen_model("Llama")}


@after("moelora_kernels/nn/README.md#whole-ffn-experts")
def every_expert_trains(names) -> None:
    ids = torch.randint(3, 40, (2, 6))
    names["model"](ids, labels=ids).loss.backward()
    parameters = trained(names["model"])
    assert len(parameters) == 2 * (7 + 4 * 2)
    assert all(p.grad is not None for p in parameters)


@after("moelora_kernels/nn/README.md#siblings")
def siblings_are_linked(names) -> None:
    assert len(names["linked"]) == 2 * 2


@after("moelora_kernels/nn/README.md#quantised-and-wrapped-bases")
def the_quantised_model_trains(names) -> None:
    names["model"](torch.randn(3, 64)).sum().backward()


@after("moelora_kernels/checkpoints/README.md#export-one-task-as-a-plain-lora")
def the_command_writes_the_same(names) -> None:
    page = PAGES["moelora_kernels/checkpoints/README.md"]
    *arguments, out = shell_block(page, "export").split()[3:]
    export.main([*arguments, "from_the_command"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path("from_the_command", name).read_bytes() == Path(out, name).read_bytes()


@before("moelora_kernels/checkpoints/README.md#moelora-peft")
def a_checkpoint_of_moelora_peft() -> dict[str, Any]:
    from moelora_kernels import MoeLoraConfig, replace_linears
    from moelora_kernels.checkpoints import export_moelora_peft

    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    models = [nn.ModuleDict({name: nn.Linear(8, 8) for name in names}) for _ in range(2)]
    replace_linears(models[0], MoeLoraConfig.preset("moelora"), names)
    Path("moelora").mkdir()
    torch.save(export_moelora_peft(models[0]), "moelora/adapter_model.bin")
    return {"model": models[1]}


@after("moelora_kernels/checkpoints/README.md#moelora-peft")
def moelora_peft_is_exported_with_the_loaded_bits(names) -> None:
    original = torch.load("moelora/adapter_model.bin", weights_only=True)
    assert_same(names["state"], original)


@before("moelora_kernels/checkpoints/README.md#ming-moe")
def a_checkpoint_of_ming() -> dict[str, Any]:
    pytest.importorskip("transformers")
    from moelora_kernels import MoeLoraConfig, replace_linears
    from moelora_kernels.checkpoints import export_ming

    model = frozen_model()
    replace_linears(model, MoeLoraConfig.preset("ming"), ["gate_proj", "up_proj", "down_proj"])
    replace_linears(model, MoeLoraConfig.preset("lora"), ["q_proj", "k_proj", "v_proj", "o_proj"])
    torch.save(export_ming(model), "non_lora_trainables.bin")
    return {"model": frozen_model(), "folder": Path.cwd()}


@after("moelora_kernels/checkpoints/README.md#ming-moe")
def ming_is_exported_with_the_loaded_bits(names) -> None:
    assert_same(names["state"], torch.load("non_lora_trainables.bin", weights_only=True))


@after("moelora_kernels/peft/README.md#train-with-the-hugging-face-trainer")
@after("examples/README.md#with-the-hugging-face-trainer")
def the_trainer_did_two_steps(names) -> None:
    assert names["trainer"].state.global_step == 2


@pytest.mark.parametrize("section", SECTIONS, ids=[section.key for section in SECTIONS])
def test_python_blocks_run(section: Section, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(section, **BEFORE.get(section.key, dict)())
    AFTER.get(section.key, lambda names: None)(names)


def test_every_registered_check_has_a_section() -> None:
    assert {*AFTER, *BEFORE} <= {section.key for section in SECTIONS}
