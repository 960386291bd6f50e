"""On the second node: what is left to do where the first is gone, and with it the batch script and its keeper."""

import os

from slurmkit.keeper.chain import Limits
from slurmkit.keeper.meeting import BEAT, Meeting, ask
from slurmkit.keeper.watch import STARTING, TRAINING, Watch


class StandIn:
    """Ends the job in the place of the first node's keeper. Slurm would wait until it takes the node for down."""

    def __init__(self, meeting: Meeting, limits: Limits, excluded: str) -> None:
        self._meeting = meeting
        self._watch = Watch(meeting, limits, None, excluded, stands_in=True)
        self._beats, self._missed = ("", ""), 0

    def look(self) -> None:
        """Once every beat. The first node is gone where neither its shell nor the batch script gives a sign of life."""
        beats = self._meeting.text("alive.0"), self._meeting.text("watching")
        self._missed = self._missed + 1 if beats == self._beats else 0
        self._beats = beats
        looks = TRAINING if self._meeting.has("started") else STARTING
        if self._missed < looks or not all(beats) or any(map(self._meeting.has, ("left.0", "over", "code"))):
            return
        self._watch.lose("0", beats[0].partition(" ")[0], f"no sign of life for {looks * BEAT:g} s")
        self._watch.conclude()
        ask("scancel", os.environ["SLURM_JOB_ID"])  # a container may lack it: then Slurm does it, when it knows
