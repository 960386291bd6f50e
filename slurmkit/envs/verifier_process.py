"""What runs in a process of its own: it compares answers with math-verify, one after the other.

    python -P verifier_process.py SECONDS BYTES

Reads lines of JSON, {"answer": "1/2", "truth": "0.5"}, and writes `true` or `false` for each, after a first `ready`. It
imports nothing of ours, and ends with its input. Nothing inside can outlive its time: the kernel itself ends the
process by SIGALRM, whatever it computes and whether or not anybody still waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver, which may finish a step first
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    formats = [LatexExtractionConfig(boxed_match_priority=0)]

    def is_right(answer: str, truth: str) -> bool:
        gold, found = (
            parse(rf"\boxed{{{text}}}", formats, parsing_timeout=None, raise_on_error=True) for text in (truth, answer)
        )
        return bool(verify(gold, found, timeout_seconds=None, raise_on_error=True))

    is_right(r"\frac12", "0.5")  # the first one loads the grammar
    print("ready", file=answers, flush=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = is_right(task["answer"], task["truth"])
        except MemoryError:
            raise
        except Exception:  # no expression, or one that it cannot compare
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    main()
