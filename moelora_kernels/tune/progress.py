"""The progress of a run: a bar with the time left on a terminal, else a line per unit."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Counts units of work on stderr; `say` writes to stdout without tearing the bar.

    Without tqdm, or if stderr is not a terminal, every unit is a line.
    """

    def __init__(self, total: int, unit: str = "cell") -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit=unit, file=sys.stderr, dynamic_ncols=True)

    def __call__(self, text: str) -> None:
        """Count a unit; text: its name."""
        self.done += 1
        if self.bar is None:
            print(f"[{self.done}/{self.total}] {text}, {self.time_left()} left", file=sys.stderr)
        else:
            self.bar.set_description(text)
            self.bar.update()

    def time_left(self) -> str:
        """Return the time left, if the next units take as long as the last ones did."""
        elapsed = time.monotonic() - self.start
        seconds = round(elapsed / self.done * (self.total - self.done))
        return f"{seconds // 60}:{seconds % 60:02}"

    def say(self, text: str) -> None:
        """Print a text on stdout."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
