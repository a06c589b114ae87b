"""METHODS.md: its tables and names are those of the code, and its examples run."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from moelora_kernels import MoeLoraConfig, MoeLoraLinear, config_rules
from moelora_kernels.nn.merge import task_gate_problem
from moelora_kernels.options_page import PAGE, START, fill_page
from moelora_kernels.presets import FFN_PRESETS, PRESETS

METHODS = PAGE.read_text(encoding="utf-8")


def rows(title: str) -> list[list[str]]:
    """Return the cells of the first table of a section, without its head."""
    part = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", METHODS, re.MULTILINE | re.DOTALL).group(1)
    lines = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE).group(0).splitlines()
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]


def test_the_table_of_presets_names_every_preset():
    assert [row[0].strip(" `") for row in rows("Presets")] == list(PRESETS)


def test_the_table_of_presets_says_what_can_be_merged():
    for name, _, _, merge, _ in rows("Presets"):
        config = MoeLoraConfig.preset(name.strip(" `"))
        is_linear = name.strip(" `") not in FFN_PRESETS and config.rank_activation is None
        expected = {None: "yes", "task": "one task", "external": "one gate"}.get(
            config.router, "no"
        )
        assert merge.strip() == (expected if is_linear else "no"), name
        if is_linear:
            problem = task_gate_problem(MoeLoraLinear(64, 64, config=config))
            assert (problem is None) == (expected != "no"), name


def test_every_preset_belongs_to_a_published_method():
    named = {name for row in rows("Published methods") for name in re.findall(r"`([^`]+)`", row[1])}
    assert named >= set(PRESETS)


def test_the_table_of_methods_is_sorted():
    names = [row[0].strip().lower() for row in rows("Published methods")]
    assert names == sorted(names)


def test_extra_calls_name_presets():
    names = {name for row in rows("Presets that need an extra call") for name in row[0].split(",")}
    assert {name.strip(" `") for name in names} <= set(PRESETS)


def test_the_tables_of_options_are_those_of_the_rules():
    assert START in METHODS
    assert fill_page(METHODS) == METHODS, "run: python -m moelora_kernels.options_page --write"


def test_every_rule_names_options():
    options = {field.name for field in dataclasses.fields(MoeLoraConfig)}
    named = {*config_rules.VALUES, *config_rules.NUMBERS, *config_rules.WORKS_ONLY_WITH}
    named |= {other for other, _ in config_rules.WORKS_ONLY_WITH.values()}
    named |= {option for option, _ in config_rules.NEEDS} | set(config_rules.NEEDS.values())
    named |= {option for when, _ in config_rules.CONFLICTS for option in when}
    assert named <= options


@pytest.mark.parametrize("number", range(METHODS.count("```python\n")))
def test_the_examples_run(number):
    """Every block runs, and the y that it computes is finite."""
    example = re.findall(r"```python\n(.*?)```", METHODS, re.DOTALL)[number]
    names = {}
    exec(compile(example, "METHODS.md", "exec"), names)
    assert torch.as_tensor(names.get("y", 0)).isfinite().all()


def test_options_in_the_table_of_methods_are_accepted():
    """A row such as `mola` with `num_experts=4, ...` is a valid config."""
    for method, use, *_ in rows("Published methods"):
        preset = re.search(r"`([\w-]+)`", use)
        for options in re.findall(r"`(\w+=[^`]+)`", use):
            if preset and preset.group(1) in PRESETS:
                MoeLoraConfig.preset(preset.group(1), **eval(f"dict({options})"))
            else:
                MoeLoraConfig(**eval(f"dict({options})"))
            assert method
