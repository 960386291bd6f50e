"""The doctor's part on a node: one task of one job step, `python -m slurmkit.doctor.node SUBJECT FOLDER`.

It says hello with an address, reads from its input who the others are (srun sends one input to all tasks), tries them,
checks this machine, and stays until its input ends, so that others can try it. What it says goes to its output, so
that it is heard where nothing is shared. Standard library only.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slurmkit.doctor.finding import Finding, Subject
from slurmkit.doctor.machine import CHECKS

# Seconds: what a whole node may take; how long a file may stay unseen, for which NFS's caches allow; a connection.
_DEADLINE, _VISIBLE, _CONNECT = 300, 15.0, 5.0
# slurmstepd hands on whole lines up to 1,024 bytes; longer ones are cut and mixed with those of other nodes.
_LONGEST = 1000


def main(subject: Subject, folder: Path) -> None:
    """Say hello, hear of the others, report."""
    signal.alarm(_DEADLINE)
    name = os.environ["SLURMD_NODENAME"]
    with socket.create_server(("", 0), backlog=1024) as server:
        threading.Thread(target=_greet, args=(server, name), daemon=True).start()
        written = _write(folder / name)
        hello = [_own_address(), server.getsockname()[1], written is None]
        _say(name, hello=hello, nodes=os.environ["SLURM_JOB_NODELIST"])
        select.select([sys.stdin], [], [])
        _say(name, clock=time.time())
        others: dict[str, tuple[str, int, bool]] = json.loads(sys.stdin.readline() or "{}")
        files = [other for other, (_, _, wrote) in others.items() if wrote]
        for finding in (written or _look_for(folder, files), _reach(others), *CHECKS.run(subject)):
            _say(name, finding=asdict(finding))
        _say(name, done=True)
        sys.stdin.read()


def _say(name: str, **said: Any) -> None:
    line = json.dumps({"node": name, **said}, ensure_ascii=False)
    while len(line.encode()) > _LONGEST:
        longest = max(said["finding"], key=lambda key: len(said["finding"][key]))
        said["finding"][longest] = said["finding"][longest][:-50]
        line = json.dumps({"node": name, **said}, ensure_ascii=False)
    print(line, flush=True)


def _own_address() -> str:
    """The address from which this node reaches the one that called it; a host name may lead to the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["SLURM_LAUNCH_NODE_IPADDR"], 9))
        return str(probe.getsockname()[0])


def _greet(server: socket.socket, name: str) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(name.encode())


def _write(file: Path) -> Finding | None:
    try:
        file.write_text(file.name)
    except OSError as error:
        found = f"{file.parent.parent}: a folder that was just made there cannot be written: {error.strerror}"
        return _shared("fail", found)
    return None


def _look_for(folder: Path, names: Sequence[str]) -> Finding:
    start = time.monotonic()
    while missing := [name for name in names if not (folder / name).exists()]:
        if time.monotonic() > start + _VISIBLE:
            return _shared("fail", f"no file of {', '.join(missing)} in {folder.parent} after {_VISIBLE:g} s")
        time.sleep(0.1)
    return _shared("ok", f"{folder.parent} shows the files of all nodes")


def _shared(result: Any, found: str) -> Finding:
    advice = "" if result == "ok" else "give a --results-dir on a file system that all nodes share"
    return Finding(result, found, advice, what="shared directory")


def _reach(others: dict[str, tuple[str, int, bool]]) -> Finding:
    with ThreadPoolExecutor(min(64, len(others) + 1)) as pool:
        answers = list(pool.map(_call, others, others.values()))
    wrong = [answer for answer in answers if answer]
    finding = Finding("ok", "each node is reached by the others", what="network")
    if wrong:
        advice = "look for a firewall between the nodes, or for an address that several of them have"
        finding = replace(finding, result="fail", found="; ".join(wrong), advice=advice)
    return finding


def _call(name: str, place: tuple[str, int, bool]) -> str:
    address, port, _ = place
    try:
        with socket.create_connection((address, port), timeout=_CONNECT) as connection:
            answer = connection.recv(256).decode(errors="replace")
    except OSError as error:
        return f"{name} ({address}) not reached: {error.strerror or error}"
    return "" if answer == name else f"{address} is not {name} but {answer!r}"


if __name__ == "__main__":
    main(Subject(**json.loads(sys.argv[1])), Path(sys.argv[2]))
