"""Every link, path, name and number on the pages (README.md and the other *.md files) is right."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess

import pytest
import torch

import moelora_kernels
from benchmarks.output.pages import fill_tables
from moelora_kernels import dispatch, ops
from moelora_kernels.presets import PRESETS
from support.pages import GENERATED, PAGES, README, ROOT, anchors, shell_block, without_code

LONGEST_README = 220


@pytest.mark.parametrize("command", ("benchmark", "test"))
def test_commands_are_one_line(command: str) -> None:
    block = shell_block(README, command)
    assert block.count("\n") == 1
    assert block.startswith("python3 -m venv .venv && ")


def test_commands_name_what_exists() -> None:
    for page in PAGES.values():
        for script in re.findall(r"python ([\w./-]+\.py)", page):
            assert (ROOT / script).exists(), script
        for module in re.findall(r"python -m (moelora_kernels[\w.]*)", page):
            assert importlib.util.find_spec(module), module


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES)
def test_links_have_a_target(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", without_code(PAGES[page])):
        path, _, fragment = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert target.is_relative_to(ROOT), f"{page}: {link}"
        if fragment:
            name = str(target.relative_to(ROOT))
            assert fragment in anchors(PAGES[name]), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    """A path in backticks starts at the root, at the page or at the package."""
    starts = (ROOT, (ROOT / page).parent, ROOT / "moelora_kernels")
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w./-]+\.(?:py|cpp|h|cu|cuh|toml))`", PAGES[page])
    paths = [path for path in named if re.search(r"\.(py|cpp|h|cu|cuh|toml|json|md)$|/$", path)]
    for path in paths:
        exists = any((start / path).exists() for start in starts)
        # A file name without a folder may be in any folder below the page.
        exists = exists or ("/" not in path and any((ROOT / page).parent.rglob(path)))
        assert exists, f"{page}: {path}"


@pytest.mark.parametrize("folder", ("moelora_kernels/nn", "moelora_kernels/kernels/common"))
def test_every_file_of_a_folder_is_on_its_page(folder: str) -> None:
    page = PAGES[f"{folder.removesuffix('/common')}/README.md"]
    files = [path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    assert [file for file in files if f"{file}`" not in page] == []


@pytest.mark.parametrize("page", PAGES)
def test_names_are_defined_in_the_files_that_a_page_names(page: str) -> None:
    """`file.py`, `name` in a table and `name` in `file.py` in a sentence."""
    text = PAGES[page]
    pairs = re.findall(r"`([\w./]+\.py)`, `([\w.]+)`", text)
    pairs += [(file, name) for name, file in re.findall(r"`(\w+)` in `([\w./]+\.py)`", text)]
    pairs += [(file, name) for name, file in re.findall(r"`([\w.]+)` of `([\w./]+\.py)`", text)]
    starts = (ROOT / page).parent, ROOT, ROOT / "moelora_kernels"
    for file, name in pairs:
        if name.endswith(".py"):
            continue
        path = next(start / file for start in starts if (start / file).exists())
        definition = rf"^\s*(def|class) {name.split('.')[-1]}\b|^{name}\b.*="
        assert re.search(definition, path.read_text(), re.MULTILINE), f"{page}: {name}, {file}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_exist(page: str) -> None:
    """`path/to/test_file.py::test_name`, from the root."""
    for path, name in re.findall(r"`([\w./-]+\.py)::(\w+)`", PAGES[page]):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{page}: {path}"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_their_result_files(page: str) -> None:
    assert fill_tables(PAGES[page], (ROOT / page).parent) == PAGES[page]


def test_readme_has_a_generated_table() -> None:
    assert README.count("<!-- table: ") == 1


def test_every_public_name_is_on_a_page() -> None:
    text = "\n".join(PAGES.values())
    assert [name for name in moelora_kernels.__all__ if name not in text] == []


def part(page: str, title: str) -> str:
    """Return the text under a heading of level 2, up to the next one."""
    return re.search(
        rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGES[page], re.MULTILINE | re.DOTALL
    ).group(1)


def test_the_table_of_ops_names_every_op() -> None:
    table = part("moelora_kernels/kernels/README.md", "What runs where")
    cells = re.findall(r"^\| ([^|:]*)", table, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)]
    assert {*ops.__all__} <= {*named}
    assert [name for name in named if not hasattr(torch.ops.moelora, name)] == []


def test_the_table_of_thresholds_is_that_of_the_code() -> None:

    page = part("moelora_kernels/kernels/README.md", "Wide and grouped")
    rows = re.findall(r"^\| (CPU|sm_\d+) \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    table = {name.lower(): (float(columns), int(tokens)) for name, columns, tokens in rows}
    expected = {name: limit[:2] for name, limit in dispatch.THRESHOLDS.items() if name != "cuda"}
    assert table == expected


def test_readme_names_every_preset() -> None:
    lines = re.findall(r"^- .*$", part("README.md", "Methods"), re.MULTILINE)
    named = re.findall(r"`([\w-]+)`", "\n".join(lines))
    assert sorted(named) == sorted(PRESETS)


def test_the_factors_of_the_readme_were_measured() -> None:
    """The factors in the first lines of the README are those of its table and of a result file."""
    table = re.search(r"<!-- table: .*?<!-- end of table -->", README, re.DOTALL).group(0)
    last = {
        row[0]: row[-1] for row in re.findall(r"^\| (\w+) \|.*?([\d.]+)x \| [^|]*\|$", table, re.M)
    }
    claim = README[: README.index("\n## ")]
    factors = re.findall(r"([\d.]+) times[^(]*?\(`(\w+)`\)", claim)
    assert factors
    assert {name: factor for factor, name in factors} == {name: last[name] for _, name in factors}

    assert re.search(r"less than (\d+) %", claim)[1] == re.search(r"to p90: (\d+) %", table)[1]
    factors = measured("linear", case="2048x2048", mode="fwd_bwd", tokens=1024)
    (factor,) = re.findall(r"([\d.]+) times at 2048 x 2048", claim)
    assert factor == factors["moelora"]


def measured(file: str, **cell: str | int) -> dict[str, str]:
    """Provider -> its time over that of the frozen layer, in one cell of a result file."""
    path = ROOT / f"benchmarks/results/amd-epyc-2-cores/{file}.json"
    rows = [row for row in json.loads(path.read_text())["rows"] if cell.items() <= row.items()]
    time = {row["provider"]: row["median_us"] for row in rows}
    return {name: f"{time[name] / time['frozen']:.2f}" for name in time if time[name]}


def test_readme_names_the_worst_results() -> None:
    """The factors under "Limits" are those of the result files."""
    limits = part("README.md", "Limits")
    one_token = measured("small/linear", case="2048x2048", mode="fwd_bwd", tokens=1)
    large = measured("grouped", mode="fwd_bwd", cell="E=64 r=64 K=4 uniform T=1024")
    shown = re.findall(r"(\d\.\d\d)", limits)
    assert shown == [one_token["moelora"], one_token["masked"], large["moelora"]]


def test_every_page_of_the_repository_is_read() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    files = {name for name in listed.stdout.split() if not name.startswith(GENERATED)}
    assert files <= PAGES.keys()
