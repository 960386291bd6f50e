"""`python -m slurmkit.grpo --config=PATH [key=value ...]`: train on the Ray that RAY_ADDRESS names, or a private one.

Exit codes: 0 trained; 1 failure; 2 the user's mistake; 75 a node, Ray or one of its processes is gone; 85 interrupted
by USR2, TERM or INT with everything saved; 128+n ended at once by a second signal n. Overrides follow Hydra's grammar.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from slurmkit.config.load import load_config
from slurmkit.errors import SlurmkitError
from slurmkit.grpo.interrupt import Interrupted, Interrupts
from slurmkit.grpo.private_ray import protect_private_ray


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the configuration, then train. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurmkit.grpo", description="Train a model with GRPO.")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file; see examples/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in Hydra's grammar")
    options = parser.parse_intermixed_args(arguments)
    try:
        interrupts = Interrupts()
        config = load_config(options.config, options.overrides)
        protect_private_ray()
        print("importing torch and Ray", flush=True)
        # After the configuration, as torch and ray take seconds to import and a typo should not.
        from slurmkit.grpo.trainer import train

        asyncio.run(train(config, interrupts))
    except SlurmkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupted:
        print(interrupted)
        return interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
