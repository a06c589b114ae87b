"""Print the options and their rules as Markdown, from the tables in `config_rules`.

python -m moelora_kernels.options_page            # print
python -m moelora_kernels.options_page --write    # and write into METHODS.md
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moelora_kernels import config_rules as rules
from moelora_kernels import dispatch
from moelora_kernels.config import MoeLoraConfig

PAGE = Path(__file__).with_name("METHODS.md")
START, END = "<!-- options -->", "<!-- end of options -->"

# The values of options that are not in the tables VALUES and NUMBERS.
OTHER_VALUES = {
    "scaling": '`"alpha/r"`, `"alpha/R"`, `"alpha/sqrt(r)"`, `"sqrt(3*alpha*I/r)"`, a finite '
    "number, or one per expert",
    "frozen_experts": "numbers of experts from 0 to num_experts - 1, and num_experts for a shared "
    "expert",
    "router_bias": "`True`, `False`",
    "aux": "names, or weights by name: " + ", ".join(f'`"{n}"`' for n in rules.AUX_WEIGHTS),
    "impl": ", ".join(f'`"{impl}"`' for impl in dispatch.CHOICES),
}
# Allowed values of an option besides the values in VALUES and NUMBERS.
EXTRA_VALUES = {
    "router": ", or an `nn.Module`",
    "rank": ", or a list of num_experts ranks",
    "dropout": ", applied in steps of 2^-16",
}


def options_markdown() -> str:
    """Return the tables: values of all options, needed options, conflicts, constant gates."""
    values = [
        (f"`{field.name}`", _values(field.name), f"`{_code(field.default)}`")
        for field in dataclasses.fields(MoeLoraConfig)
    ]
    works_only_with = [
        (f"`{option}`", _setting(other, allowed), _needed_for(option))
        for option, (other, allowed) in rules.WORKS_ONLY_WITH.items()
    ]
    works_only_with += [
        (f"`{option}`", "", _needed_for(option))
        for option in dict.fromkeys(rules.NEEDS.values())
        if option not in rules.WORKS_ONLY_WITH
    ]
    conflicts = []
    for conditions, reason in rules.CONFLICTS:
        first, *others = (_setting(option, expected) for option, expected in conditions.items())
        conflicts.append((first, " and ".join(others), reason))
    constant_gates = []
    for conditions, reason in rules.CONSTANT_GATES:
        options = (_setting(option, expected) for option, expected in conditions.items())
        constant_gates.append((" and ".join(options), reason))
    return "\n".join(
        [
            "### Values",
            "",
            *_table(("option", "values", "default"), values),
            "",
            "### Options that need another option",
            "",
            *_table(("option", "can be set only with", "must be set with"), works_only_with),
            "",
            "### Options that cannot be combined",
            "",
            *_table(("option", "cannot be combined with", "because"), conflicts),
            "",
            "### Options with which the gate does not train the router",
            "",
            "A layer with these options warns, unless `aux` or `balance_rate` is set, or its "
            "router has no parameters to train.",
            "",
            *_table(("options", "because"), constant_gates),
        ]
    )


def fill_page(page: str) -> str:
    """Return the page with the text between the two markers replaced by the tables."""
    pattern = rf"(?<={START}\n).*?(?={END})"
    return re.sub(pattern, lambda _: options_markdown() + "\n", page, flags=re.DOTALL)


def _values(option: str) -> str:
    if option in OTHER_VALUES:
        return OTHER_VALUES[option]
    if option in rules.VALUES:
        text = ", ".join(f"`{_code(value)}`" for value in rules.VALUES[option])
    else:
        text = rules.NUMBERS[option].text
        if option in rules.AT_MOST_NUM_EXPERTS:
            text += " to num_experts"
    return text + EXTRA_VALUES.get(option, "")


def _needed_for(option: str) -> str:
    settings = [setting for setting, needed in rules.NEEDS.items() if needed == option]
    if not settings:
        return ""
    return _setting(settings[0][0], tuple(value for _, value in settings))


def _setting(option: str, expected: Any) -> str:
    """Return the Markdown of an option and the values that a rule expects."""
    if isinstance(expected, rules.Test):
        return f"`{option}` {expected.text}"
    if isinstance(expected, rules.AnyExcept):
        if expected.value in (None, ()) and option != "router":
            return f"any `{option}`"
        return f"`{option}` other than `{_code(expected.value)}`"
    first, *others = expected if isinstance(expected, tuple) else (expected,)
    return " or ".join([f"`{option}={_code(first)}`", *(f"`{_code(other)}`" for other in others)])


def _code(value: Any) -> str:
    """Return a value as Python code, with double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [list(head), *(list(row) for row in rows)]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return [text[0], "|" + "---|" * len(lines[0]), *text[1:]]


if __name__ == "__main__":
    print(options_markdown())
    if "--write" in sys.argv[1:]:
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
