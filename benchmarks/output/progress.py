"""The progress of a run: a bar with the time left on a terminal, else a line per cell."""

import sys
import time


class Progress:
    """Counts cells on stderr; `say` writes to stdout without tearing the bar.

    Without tqdm, or if stderr is not a terminal, every cell is a line.
    """

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit="cell", file=sys.stderr, dynamic_ncols=True)

    def __call__(self, text: str) -> None:
        """Count a cell that is done; text: its name."""
        self.done += 1
        if self.bar is None:
            print(f"[{self.done}/{self.total}] {text}, {self.time_left()} left", file=sys.stderr)
        else:
            self.bar.set_description(text)
            self.bar.update()

    def time_left(self) -> str:
        """Return the time left, if the next cells take as long as the last ones did."""
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
