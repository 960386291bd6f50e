"""`python -m slurmkit.report RUN_DIRECTORY`: draw the plots of a run, finished or not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slurmkit.errors import SlurmkitError
from slurmkit.report.plots import draw_plots


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurmkit.report", description="Draw the plots of a run.")
    parser.add_argument("run_directory", type=Path)
    try:
        print(*draw_plots(parser.parse_args().run_directory), sep="\n")
    except SlurmkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
