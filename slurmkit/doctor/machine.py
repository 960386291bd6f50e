"""What every machine that runs a job is asked, in the order of the job's life. Standard library only: runs on nodes."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import tempfile
import time
from itertools import chain
from pathlib import Path

from slurmkit.doctor.finding import GIB, Checks, Finding, Subject, ask, file_system, is_shared, last_line

check = CHECKS = Checks()
_SKEW = 1.0, 2.0  # seconds: a warning, a failure
_SLOW_LOOKUP = 1.0, 5.0
_OPEN_FILES = 65535  # what Ray asks for


def judge_skew(seconds: float, against: str) -> Finding:
    """A clock's distance from another's."""
    found = f"{abs(seconds):.2f} s {'behind' if seconds < 0 else 'ahead of'} {against}"
    if abs(seconds) <= _SKEW[0]:
        return Finding("ok", f"within {_SKEW[0]:g} s of {against}")
    advice = "have the administrator see to NTP (chronyc tracking): munge, make and Ray's timeouts compare clocks"
    return Finding("fail" if abs(seconds) > _SKEW[1] else "warn", found, advice)


@check("container runtime")
def container(subject: Subject) -> Finding | None:
    """The container runtime that jobs name is here."""
    found = [program for program in ("apptainer", "singularity", "podman") if shutil.which(program)]
    if shutil.which("srun") and "--container-image" in ask("srun", "--help", seconds=5).stdout:
        found.insert(0, "pyxis")
    runtime = subject.runtime
    told = f"{', '.join(found) or 'no runtime'} found; jobs use {runtime}"
    if runtime == "none" or runtime in found or (runtime == "apptainer" and "singularity" in found):
        return Finding("ok", told)
    if runtime == "pyxis" and subject.on_node:
        return None  # a part of srun, which need not be on nodes
    return Finding("fail", told, f"install {runtime}, or name another container.runtime")


@check("results directory")
def results(subject: Subject) -> Finding:
    """Run directories can be written: files made, replaced by renaming, and there is space."""
    directory = Path(subject.results)
    try:
        with tempfile.TemporaryDirectory(prefix=".slurmkit-doctor-", dir=directory) as folder:
            old, new = Path(folder, "old"), Path(folder, "new")
            old.write_text("old")
            new.write_text("new")
            os.replace(new, old)
            replaced = old.read_text() == "new"
    except OSError as error:
        return Finding("fail", f"{directory}: {error.strerror}", "make it writable, or give another --results-dir")
    kind, space = file_system(directory), shutil.disk_usage(directory)
    found = f"{directory}: {kind}, {space.free / GIB:.1f} of {space.total / GIB:.1f} GiB free"
    if not replaced:
        return Finding("fail", f"{found}; a renamed file does not take the old one's place", "use another file system")
    if space.free < GIB:
        return Finding("fail", found, "free space, or give another --results-dir")
    if space.free < 20 * GIB:
        return Finding("warn", found, "a checkpoint takes 2 bytes per weight, and 12 more with its optimiser")
    if not subject.on_node and not is_shared(kind) and shutil.which("sbatch"):
        return Finding("warn", f"{found}; looks local", "slurmkit doctor --nodes 2 tells whether nodes see it")
    return Finding("ok", found)


@check("clock")
def clock(subject: Subject) -> Finding | None:
    """The clock agrees with the file system's, by which files are found to be new or old."""
    try:
        with tempfile.TemporaryFile(dir=subject.results) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            return judge_skew(time.time() - os.fstat(file.fileno()).st_mtime, "the results directory's file system")
    except OSError:
        return None  # told by the check before


@check("host name")
def host_name(subject: Subject) -> Finding:
    """This machine's names are looked up quickly, and lead to an address that other machines can use."""
    name, slowest, seen = socket.gethostname(), ("", 0.0), {}
    for wanted in ("localhost", name):
        start = time.monotonic()
        done = ask("getent", "ahosts", wanted, seconds=30)
        seen[wanted] = sorted({line.split()[0] for line in done.stdout.splitlines() if line})
        slowest = max(slowest, (wanted, time.monotonic() - start), key=lambda pair: pair[1])
    advice = f"put {name} into /etc/hosts, or mend /etc/resolv.conf"
    if shutil.which("getent") is None:
        return Finding("warn", f"{name}; no getent here to look it up", "install glibc's getent")
    for wanted, addresses in seen.items():
        if not addresses:
            return Finding("fail", f"{wanted} has no address (after {slowest[1]:.2f} s)", advice)
    found = f"{name} is {', '.join(seen[name])}; looked up in {slowest[1]:.2f} s"
    if slowest[1] > _SLOW_LOOKUP[0]:
        return Finding("fail" if slowest[1] > _SLOW_LOOKUP[1] else "warn", found, advice)
    if subject.on_node and all(address.startswith(("127.", "::1")) for address in seen[name]):
        return Finding("warn", found, "gloo and NCCL may tell others the loopback: set GLOO_SOCKET_IFNAME in env:")
    return Finding("ok", found)


@check("ports")
def ports(_: Subject) -> Finding:
    """Any process can bind a free port, and there are enough of them."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    try:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
    except OSError as error:
        return Finding("fail", f"no port can be bound: {error.strerror}", "ss -s tells what holds them")
    found = f"bound {port}; {high - low + 1} ports from {low} to {high}"
    if high - low < 8000:
        return Finding("warn", found, "Ray takes some per worker: widen net.ipv4.ip_local_port_range")
    return Finding("ok", found)


@check("memory")
def memory(_: Subject) -> Finding:
    """Enough memory for Ray, within what the cgroup of this process allows."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    total, available = (int(line.split()[1]) * 1024 for line in lines if line.startswith(("MemTotal", "MemAvailable")))
    limit = min(chain(_memory_limits(), [total]))
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    found += f", {limit / GIB:.1f} GiB allowed by the cgroup" if limit < total else ""
    if min(available, limit) < 4 * GIB:
        return Finding("warn", found, "Ray alone takes 1 GiB on the first node: ask Slurm for more with --mem")
    return Finding("ok", found)


def _memory_limits() -> list[int]:
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top, file = ("", "memory.max") if controllers == "" else ("memory", "memory.limit_in_bytes")
            for up in (Path(path), *Path(path).parents):
                text = Path("/sys/fs/cgroup", top, str(up).lstrip("/"), file)
                if text.is_file() and (value := text.read_text().strip()).isdigit():
                    limits.append(int(value))
    return limits


@check("/dev/shm")
def shared_memory(_: Subject) -> Finding:
    """Ray's object store fits into shared memory."""
    if not os.access("/dev/shm", os.W_OK):
        return Finding("fail", "cannot be written", "mount a tmpfs there: Ray and NCCL cannot do without")
    space = shutil.disk_usage("/dev/shm")
    found = f"{space.free / GIB:.2f} of {space.total / GIB:.2f} GiB free"
    if space.free < GIB:
        return Finding("warn", found, "under 1 GiB Ray moves its object store to /tmp: remount larger (--shm-size)")
    return Finding("ok", found)


@check("/tmp")
def tmp(_: Subject) -> Finding:
    """Ray's session fits into /tmp/sk-JOB."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix="sk-doctor-", dir="/tmp"))
    except OSError as error:
        return Finding("fail", f"cannot be written: {error.strerror}", "every job makes /tmp/sk-JOB there")
    space = shutil.disk_usage("/tmp")
    found = f"{space.free / GIB:.2f} of {space.total / GIB:.2f} GiB free ({file_system(Path('/tmp'))})"
    if space.free < GIB or space.free < space.total / 20:
        return Finding("warn", found, "Ray stops spilling when it is 95 % full: remove what is not needed")
    return Finding("ok", found)


@check("open files")
def open_files(_: Subject) -> Finding:
    """The limit that jobs raise theirs to: the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"limit {_limit(soft)}, which a job raises to {_limit(hard)}"
    if hard == resource.RLIM_INFINITY or hard >= _OPEN_FILES:
        return Finding("ok", found)
    advice = (
        f"Ray asks for {_OPEN_FILES}: LimitNOFILE of slurmd, nofile in limits.conf (Slurm hands on the submitter's)"
    )
    return Finding("fail" if hard < 4096 else "warn", found, advice)


@check("processes")
def processes(_: Subject) -> Finding:
    """Threads count, too: Ray and torch start hundreds for each GPU."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    found = f"limit {_limit(soft)} (hard {_limit(hard)})"
    if soft != resource.RLIM_INFINITY and soft < 4096:
        return Finding("warn", found, "threads count as processes: ulimit -u in setup:, nproc in limits.conf")
    return Finding("ok", found)


@check("core files")
def core_files(_: Subject) -> Finding:
    """A crash does not fill the disk with an image of the process."""
    soft = resource.getrlimit(resource.RLIMIT_CORE)[0]
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    found = f"limit {_limit(soft)}, written to {pattern}"
    if soft == resource.RLIM_INFINITY and not pattern.startswith("|"):
        return Finding("warn", found, "a crashed worker writes all its memory: ulimit -c 0 in setup:")
    return Finding("ok", found)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


@check("GPUs")
def gpus(subject: Subject) -> Finding:
    """As many GPUs answer as Slurm allocated here."""
    # A login node's shell has the variable, too, inside salloc.
    allocated = int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) if subject.on_node else 0
    done = ask("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", seconds=30)
    seen = [line.split(", ") for line in done.stdout.splitlines() if ", " in line] if done.returncode == 0 else []
    if done.returncode == 127:
        seen = [["NVIDIA device", "unknown"] for device in Path("/dev").glob("nvidia[0-9]*")]
        version = Path("/proc/driver/nvidia/version")
        if seen and version.is_file() and (match := re.search(r" (\d+\.[\d.]+) ", version.read_text())):
            seen = [[name, match[1]] for name, _ in seen]
    elif done.returncode != 0 and "No devices" not in done.stdout + done.stderr:
        return Finding("fail", f"nvidia-smi: {last_line(done)}", "dmesg | grep -i xid; drain the node")
    if len(seen) < allocated:
        found = f"{allocated} allocated, {len(seen)} seen" + (f" ({last_line(done)})" if not seen else "")
        return Finding("fail", found, "is the driver loaded? does gres.conf tell the truth?")
    if seen:
        of_them = f", {allocated} of them allocated here" if allocated else ""
        return Finding("ok", f"{len(seen)} × {seen[0][0]}, driver {seen[0][1]}{of_them}")
    if subject.on_node:
        return Finding("ok", "none, and none were asked for")
    return Finding("warn", "none here", "nothing to do on a login node; slurmkit run uses the CPU")


_DESCRIBE = "import sys; print(*sys.version_info[:3], sep='.'); print(sys.prefix)"


@check("job's Python")
def python(subject: Subject) -> Finding:
    """The interpreter that jobs will use is here, new enough, and where nodes see it."""
    if subject.runtime != "none":
        return Finding("ok", f"{subject.python} of the image; not checked from outside")
    done = ask(subject.python, "-c", _DESCRIBE)
    if done.returncode != 0:
        advice = "install it where all nodes see it, or name another with python: in slurmkit.yaml"
        return Finding("fail", f"{subject.python}: {last_line(done)}", advice)
    version, prefix = done.stdout.splitlines()
    kind = file_system(Path(prefix))
    found = f"{version} at {subject.python} ({kind})"
    if tuple(map(int, version.split("."))) < (3, 11):
        return Finding(
            "fail", found, "slurmkit's trainer needs 3.11; name another with python: in slurmkit.yaml", version
        )
    if not subject.on_node and not is_shared(kind) and shutil.which("sbatch"):
        return Finding("warn", f"{found}; looks local", "slurmkit doctor --nodes 2 tells whether nodes see it", version)
    return Finding("ok", found, same=version)


@check("ray")
def ray(subject: Subject) -> Finding | None:
    """Ray can be imported by that interpreter, and its command lies beside it."""
    if subject.runtime != "none":
        return None
    start = time.monotonic()
    done = ask(subject.python, "-P", "-c", "import ray; print(ray.__version__)", seconds=120)
    seconds = time.monotonic() - start
    if done.returncode != 0:
        advice = f"{subject.python} -m pip install 'slurmkit[train]', or name another with python: in slurmkit.yaml"
        return Finding("fail", last_line(done), advice)
    version = done.stdout.strip().splitlines()[-1]
    found = f"{version}, imported in {seconds:.1f} s"
    if shutil.which("ray", path=os.path.dirname(subject.python) or None) is None:
        return Finding("fail", f"{found}, but no ray command beside {subject.python}", "reinstall ray there", version)
    if seconds > 30:
        return Finding(
            "warn", found, "a slow file system; put the environment on a faster one, or in an image", version
        )
    return Finding("ok", found, same=version)


@check("leftovers")
def leftovers(_: Subject) -> Finding:
    """Nothing of our own dead jobs takes up /tmp or /dev/shm."""
    alive, in_use = set(ask("squeue", "--me", "--noheader", "--format=%A", seconds=5).stdout.split()), set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            in_use |= set(re.findall(r"/dev/shm/.*", (process / "maps").read_text(errors="replace")))
            in_use |= {os.readlink(open_file) for open_file in (process / "fd").iterdir()}
        except OSError:
            continue  # it has ended, or is somebody else's
        alive |= {word[8:].partition(b".")[0].decode() for word in environment if word.startswith(b"SK_MARK=")}
    mine = [path for path in chain(Path("/tmp").glob("sk-*"), Path("/dev/shm").iterdir()) if _is_mine(path)]
    # Small files there are other programs' locks, which outlive processes on purpose.
    large = (path for path in mine if path.parent.name == "shm" and path.is_file() and _held(path) >= 2**20)
    dead = [path for path in large if str(path) not in in_use]
    names = ((path, re.fullmatch(r"sk-(\d+)\.\d+", path.name)) for path in mine)
    dead += [path for path, match in names if match is not None and match[1] not in alive]
    if not dead:
        return Finding("ok", "none")
    size = sum(_held(path) for path in dead if not path.is_dir())
    told = ", ".join(sorted(map(str, dead))[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
    found = f"{told}: used by no job or process; {size / GIB:.2f} GiB of shared memory"
    return Finding("warn", found, "remove what you do not need")


def _held(path: Path) -> int:
    return path.lstat().st_blocks * 512


def _is_mine(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False  # gone meanwhile
