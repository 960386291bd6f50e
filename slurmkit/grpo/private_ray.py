"""Before Ray is imported."""

from __future__ import annotations

import os
import secrets


def protect_private_ray() -> None:
    """Give a Ray of our own a token that lives as long as it does. Ray reads this when it is imported.

    Left alone, Ray makes one token for all of the user's runs, in a file in the home directory that everybody may read.
    """
    if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
