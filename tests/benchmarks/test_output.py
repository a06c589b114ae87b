"""Pages, remarks below tables, and the progress of a run."""

import re
from pathlib import Path

from benchmarks import report
from benchmarks.output import tables
from moelora_kernels.tune.progress import Progress

ROOT = Path(__file__).resolve().parents[2]


def test_progress_without_a_terminal(capsys):
    bar = Progress(3)
    bar("first")
    bar.say("a table")
    bar("second")
    shown = capsys.readouterr()
    assert shown.out == "a table\n"
    assert re.fullmatch(r"\[1/3\] first, \d+:\d\d left\n\[2/3\] second, .* left\n", shown.err)
    bar.close()


def test_pages_are_checked_and_rewritten(tmp_path, capsys):
    result = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "linear.json"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "linear.json").write_text(result.read_text())
    open_line = "<!-- table: results/linear.json modes=fwd providers=frozen,moelora -->"
    page, other = tmp_path / "README.md", tmp_path / "other.md"
    for path in (page, other):
        path.write_text(f"before\n{open_line}\n<!-- end of table -->\nafter\n")
    pages = ["--pages", str(page), str(other)]
    assert report.main(["--check", *pages]) == 1
    assert page.read_text().count("|") == 0
    assert capsys.readouterr().out.count("out of date") == 2
    assert report.main(pages) == 0
    assert report.main(["--check", *pages]) == 0
    for path in (page, other):
        text = path.read_text()
        assert "| moelora |" in text
        assert "| masked |" not in text
        assert "forward + backward" not in text
        assert text.endswith("after\n")


def test_the_pages_of_the_repository_are_up_to_date():
    assert report.main(["--check"]) == 0


def test_a_remark_does_not_list_every_cell():
    row = {"provider": "stacked", "status": "left out", "reason": "needs 9 GiB"}
    timed = {"provider": "frozen", "status": "ok"}
    left_out = [row | {"cell": f"T={T}"} for T in range(8)]
    cells = [timed | {"cell": f"T={T}"} for T in range(8)]
    remarks = lambda rows: tables.not_timed(rows, lambda row: row["cell"])  # noqa: E731
    assert remarks(cells + left_out) == ["stacked: not measured in this table (needs 9 GiB)."]
    (remark,) = remarks(cells + left_out[:5])
    assert remark == "stacked: not measured at T=0, T=1, T=2 and 2 more cells (needs 9 GiB)."
    assert remarks(cells[:1] + left_out[:1]) == ["stacked: not measured at T=0 (needs 9 GiB)."]
    assert remarks(cells) == []
