"""Print from which R / K on the grouped formulation is faster than the wide one.

    python benchmarks/crossover.py results/grouped.json

Reads result files of the suite `grouped`. The thresholds in `moelora_kernels/dispatch.py` are set
from this output.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.output import tables, thresholds


def main(arguments: list[str] | None = None) -> None:
    """Print the crossover tables of result files of the suite `grouped`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="result files of the suite grouped")
    for file in parser.parse_args(arguments).files:
        result = json.loads(file.read_text())
        print(f"{file}: {tables.provenance(result)}")
        crossovers = thresholds.crossover_tables(result)
        for table in crossovers:
            print(tables.text(table))
        if not crossovers:
            print("no cell has times of both moelora_wide and moelora_grouped")


if __name__ == "__main__":
    main()
