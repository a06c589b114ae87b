"""Qualify the tiles of the GPU at hand.

Runs tests/kernels/test_gpu_tiles.py, all of which must pass:

    python tests/tools/qualify.py --commit SHA

Prints the text for `TileConfig.qualified` in moelora_kernels/kernels/common/configs.py, or nothing
and exits with 1. It says what was run, not that the tree was clean: SHA is yours to give.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch


class Outcomes:
    """Counts what became of the tests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report) -> None:
        # A skip and an error may happen before the test is called.
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def main() -> int:
    """Run the tests, print the text if every one of them passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", required=True, help="the commit that is tested")
    commit = parser.parse_args().commit
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    outcomes = Outcomes()
    tests = Path(__file__).resolve().parents[1] / "kernels" / "test_gpu_tiles.py"
    code = pytest.main([str(tests), "-q", "-p", "no:cacheprovider"], plugins=[outcomes])
    if code != 0 or set(outcomes.counts) != {"passed"}:
        print(f"not qualified: {dict(outcomes.counts)}", file=sys.stderr)
        return 1

    import triton

    from moelora_kernels.kernels.common import configs

    architecture, _ = configs.processors(torch.device("cuda"))
    print(f"{architecture}, {outcomes.counts['passed']} tests passed:")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"{commit}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
