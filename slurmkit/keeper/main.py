"""The parts of the keeper as one command."""

import argparse
import os
import signal
import sys

from slurmkit.keeper.chain import Limits, begin
from slurmkit.keeper.meeting import Meeting
from slurmkit.keeper.node import Node
from slurmkit.keeper.stand_in import StandIn
from slurmkit.keeper.watch import Watch


def main() -> int:
    """Run one part. The flags are the job's own, and stand in job.sbatch."""
    parser = argparse.ArgumentParser(description="Watch over a job from inside.")
    parser.add_argument("--until-done", action="store_true", help="a follow-up goes on where the job ends")
    parser.add_argument("--max-attempts", type=int, metavar="N", help="attempts in all")
    parser.add_argument("--max-hours", type=float, metavar="H", help="hours after which no attempt begins")
    parser.add_argument("--trains", action="store_true", help="stop after 3 failures without a newer checkpoint")
    parser.add_argument("--watchdog", type=float, metavar="MINUTES", help="without progress, after which it ends")
    parser.add_argument("--exclude", default="", metavar="NODES", help="that the job does without anyway")
    parser.add_argument("--container", action="store_true", help="the nodes' part runs in a container")
    parser.add_argument("part", choices=["begin", "watch", "node"], help="before the job; beside its script; on a node")
    options = parser.parse_args()
    # Slurm may signal every process; the batch script passes on its own as files.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    meeting = Meeting()
    limits = Limits(options.until_done, options.max_attempts, options.max_hours, options.trains)
    if options.part == "begin":
        begin(meeting, limits)
    elif options.part == "watch":
        watch = Watch(meeting, limits, options.watchdog, options.exclude, container=options.container)
        return watch.until_over()
    else:
        is_second = os.environ["SLURM_NODEID"] == "1"
        Node(meeting, StandIn(meeting, limits, options.exclude) if is_second else None).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
