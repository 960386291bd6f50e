"""Tables: drawn on a terminal, plain aligned lines in a pipe, and one that is drawn anew until somebody leaves."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# The colour of a cell that is one of these words.
_STYLES = {"running": "green", "starting": "cyan", "queued": "yellow", "going on": "yellow", "done": "bold green"}
_STYLES |= dict.fromkeys(("failed", "lost", "never started"), "bold red")


class Table(NamedTuple):
    """Text in rows; empty columns are left out. Example: Table(("run", "state"), (("grpo", "done"),))."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """Aligned columns, two spaces apart."""
        table = self._filled()
        every = [[name.upper() for name in table.header], *table.rows]
        widths = [max(map(len, column)) for column in zip(*every, strict=True)]
        return [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in every
        ]

    def show(self) -> None:
        """To standard output."""
        if not sys.stdout.isatty():
            print("\n".join(self.lines()))
            return
        from rich.console import Console

        Console(highlight=False).print(self.drawn())

    def drawn(self) -> RichTable:
        """For a terminal, as wide as that is."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = self._filled()
        drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in table.header:
            drawn.add_column(name, no_wrap=name != table.header[-1], overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        return drawn

    def _filled(self) -> Table:
        kept = [index for index in range(len(self.header)) if index == 0 or any(row[index] for row in self.rows)]
        return Table([self.header[index] for index in kept], [[row[index] for index in kept] for row in self.rows])


def watch(look: Callable[[], tuple[Table, str]], every: float) -> None:
    """Draw what `look` gives, a table and a line below it, each `every` seconds, until q or Ctrl-C.

    Where standard output is no terminal the lines are printed each time.
    """
    if not sys.stdout.isatty():
        while True:
            table, below = look()
            print("\n".join([*table.lines(), below]), flush=True)
            time.sleep(every)
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    def drawn() -> Group:
        table, below = look()
        return Group(table.drawn(), Text(below, style="dim"))

    with keys() as pressed, Live(drawn(), console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        while not pressed(every):
            live.update(drawn(), refresh=True)


@contextmanager
def keys() -> Iterator[Callable[[float], bool]]:
    """Whether q is pressed within that many seconds, as a function."""
    if not sys.stdin.isatty():

        def never(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield never
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def pressed(seconds: float) -> bool:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return bool(ready) and sys.stdin.read(1) in ("q", "Q", "")

    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
