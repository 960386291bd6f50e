"""A controller that is away is waited for: it may be restarting, which takes seconds to minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from slurmkit.errors import Failure
from slurmkit.slurm.client import NoAnswer

Answer = TypeVar("Answer")

# Seconds between two tries.
_PAUSE = 2.0


class Patience:
    """Asks Slurm again where it gives no answer, for at most `seconds` over all that is asked with it.

    `say` hears once that it waits.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._seconds, self._left, self._say = seconds, seconds, say

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer to a question that changes nothing. Failure where there is none for too long."""
        while True:
            began = time.monotonic()
            try:
                return question()
            except NoAnswer as error:
                self.wait(error, time.monotonic() - began)

    def wait(self, error: NoAnswer, spent: float) -> None:
        """Wait a little after `error`, which took `spent` seconds to come. Failure where time is up."""
        words = " ".join(str(error).split())
        if self._left == self._seconds > 0:
            self._say(
                f"Slurm's controller is away ({words}): trying again for {self._seconds:g} s (--retry-for SECONDS)"
            )
        pause = min(_PAUSE, self._left)
        time.sleep(pause)
        self._left -= spent + pause
        if self._left <= 0:
            raise Failure(f"Slurm's controller gave no answer for {self._seconds:g} s (--retry-for): {words}")
