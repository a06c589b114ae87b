"""Write the tables of result files into the pages that show them, or print them.

    python benchmarks/report.py                             rewrite README.md, benchmarks/README.md
    python benchmarks/report.py --check                     exit 1 if one of them is out of date
    python benchmarks/report.py --pages docs/gpu.md         rewrite other pages
    python benchmarks/report.py results/linear.json         print the tables in Markdown
    python benchmarks/report.py results/linear.json --cases 4096x4096 --modes fwd

A page has its tables between two marker lines. The path is relative to the page; all options may
be left out. `tables` is for the suite `grouped`.

    <!-- table: results/<machine>/grouped.json modes=fwd_bwd tables=mixtures,crossover -->
    <!-- end of table -->

The options in their order: cases, modes, providers, tables.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.output.pages import GROUPED_TABLES, Selection, fill_tables, markdown
from benchmarks.output.plots import plot

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


def names(text: str) -> list[str]:
    """Split a comma-separated list."""
    return text.split(",")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="result files to print as Markdown")
    parser.add_argument("--check", action="store_true", help="compare the pages, write nothing")
    parser.add_argument("--pages", nargs="+", type=Path, help="default: both READMEs")
    parser.add_argument("--cases", type=names, metavar="NAME,...")
    parser.add_argument("--modes", type=names, metavar="NAME,...")
    parser.add_argument("--providers", type=names, metavar="NAME,...")
    parser.add_argument("--tables", type=names, metavar="NAME,...", help=", ".join(GROUPED_TABLES))
    parser.add_argument("--plots", action="store_true", help="write FILE.png beside each FILE.json")
    return parser


def update(pages: list[Path], check: bool) -> int:
    """Make the tables of the pages anew; return how many pages were out of date.

    check: write nothing.
    """
    outdated = 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        filled = fill_tables(text, page.resolve().parent)
        if filled == text:
            continue
        outdated += 1
        print(f"{page}: {'the tables are out of date' if check else 'tables rewritten'}")
        if not check:
            page.write_text(filled, encoding="utf-8")
    return outdated


def main(arguments: list[str] | None = None) -> int:
    """Print the tables of the files, or update the pages; 1 if --check finds an outdated page."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if unknown := sorted({*(options.tables or ())} - {*GROUPED_TABLES}):
        known = ", ".join(GROUPED_TABLES)
        parser.error(f"argument --tables: expected some of {known}, got {', '.join(unknown)}")
    selection = Selection(options.cases, options.modes, options.providers, options.tables)
    for file in options.files:
        result = json.loads(file.read_text())
        sys.stdout.write(markdown(result, selection) + "\n")
        if options.plots:
            plot(result, file.with_suffix(".png"))
    if options.files and not options.pages:
        return 0
    outdated = update(options.pages or PAGES, options.check)
    if options.check and outdated:
        print("run: python benchmarks/report.py")
    return 1 if options.check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
