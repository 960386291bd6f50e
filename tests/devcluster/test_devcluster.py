"""scripts/devcluster brings up real Slurm clusters; these tests do too, under names of their own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.requirements import REPOSITORY, need_slurm

pytestmark = pytest.mark.slurm

SCRIPT = REPOSITORY / "scripts" / "devcluster"
QUOTED = shlex.quote(str(SCRIPT))
PREFIX = f"t{os.getpid()}"  # two test runs on one machine do not meet
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SINFO"))}

Result = subprocess.CompletedProcess[str]


def run(*command: str | Path, env: dict[str, str] = CLEAN, seconds: float = 60) -> Result:
    return subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=seconds)


def until(condition: Callable[[], object], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Cluster:
    """One cluster under test: its commands as a developer types them, and its Slurm as a user sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = Path(f"/run/slurmkit-{name}")

    def __call__(self, command: str, *arguments: str | Path) -> Result:
        return run(SCRIPT, "--name", self.name, command, *arguments)

    def up(self, *options: str | Path) -> Cluster:
        result = self("up", *options)
        assert result.returncode == 0, result.stderr
        return self

    def slurm(self, *command: str | Path) -> str:
        """What a Slurm command prints on the host, which must succeed and complain of nothing."""
        exported = run("bash", "-c", f'eval "$({QUOTED} --name {self.name} env)"; echo "$SLURM_CONF"').stdout.strip()
        result = run(*command, env=CLEAN | {"SLURM_CONF": exported})
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def on_nodes(self, script: str, *options: str) -> list[str]:
        """The lines that a bash script prints as one task on each of two nodes, sorted."""
        printed = self.slurm("srun", "--nodes=2", "--ntasks-per-node=1", *options, "bash", "-c", script)
        return sorted(printed.splitlines())

    def submit(self, script: str, *options: str) -> str:
        return self.slurm("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}").strip()

    def node(self, name: str, script: str) -> str:
        return self("exec", name, "bash", "-c", script).stdout.strip()

    def network(self) -> str:
        """The first two numbers of its addresses."""
        return re.search(r"network ([0-9.]+)\.0\.0/16", self("status").stdout)[1]

    def traces(self) -> list[str]:
        """What can be seen of it on the host: all of it must be gone after down."""
        mine = re.compile(rf"(slurmkit|sk)-{self.name}(?![a-z0-9])")
        told = run("ip", "-o", "address").stdout + run("ip", "netns").stdout + Path("/proc/self/mountinfo").read_text()
        for top in ("/run", "/tmp", "/dev", "/sys/fs/cgroup", "/var/tmp", "/var/cache", "/var/lib", "/var/log"):
            told += run("find", top, "-path", "*/pytest-of-*", "-prune", "-o", "-print").stdout
        seen = [line for line in told.splitlines() if mine.search(line)]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                told = " ".join((process / file).read_text("latin-1") for file in ("environ", "cmdline", "cgroup"))
            except OSError:
                continue  # it has ended
            if mine.search(told):
                seen.append(f"process {process.name}: {told!r}")
        return seen


def namespaces(name: str = "*") -> set[tuple[str, int]]:
    """Every namespace that a process of the machine is in."""
    found = set()
    for link in Path("/proc").glob(f"{name}/ns/[a-z]*[a-z]"):
        try:
            found.add((link.name, link.stat().st_ino))
        except OSError:
            continue  # the process has ended
    return found


def packages_directories() -> dict[str, float]:
    """When the directories of the system's own Slurm, munge and MariaDB were last changed."""
    own = ("/etc/slurm", "/etc/munge", "/run/munge", "/run/mysqld", "/var/lib/mysql", "/var/lib/slurm", "/var/spool")
    return {path: Path(path).stat().st_mtime for path in own if Path(path).exists()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def cluster(shared: Path) -> Iterator[Cluster]:
    need_slurm()
    cluster = Cluster(f"{PREFIX}ab")
    try:
        yield cluster.up("--nodes", "2", "--shared", shared)
    finally:
        cluster("down")


@pytest.fixture
def other() -> Iterator[Cluster]:
    """A name for a second cluster, the beginning of the first one's; it is ended in any case."""
    need_slurm()
    cluster = Cluster(f"{PREFIX}a")
    try:
        yield cluster
    finally:
        if (cluster.state / "settings").exists():
            cluster("down")


def test_every_node_is_idle_with_eight_typed_gpus_in_both_partitions(cluster: Cluster) -> None:
    lines = cluster.slurm("sinfo", "-h", "-N", "-o", "%N %P %T %G %c").splitlines()
    assert sorted(lines) == [
        f"{node} {partition} idle gpu:h100:8 16" for node in ("node1", "node2") for partition in ("batch*", "high")
    ]
    limits = cluster.slurm("sinfo", "-h", "-o", "%P %L %l").splitlines()
    assert sorted(limits) == ["batch* 1:00:00 1-00:00:00", "high 30:00 4:00:00"]


def test_nodes_differ_in_name_address_tmp_and_shm_and_share_a_directory(cluster: Cluster, shared: Path) -> None:
    script = f"""
        me=$(hostname)
        touch /tmp/{PREFIX}-$me /dev/shm/{PREFIX}-$me {shared}/{PREFIX}-$me
        until [[ -e {shared}/{PREFIX}-node1 && -e {shared}/{PREFIX}-node2 ]]; do sleep 0.1; done
        echo $me $(ip -4 -o address show eth0 | awk '{{print $4}}') {{/tmp,/dev/shm,{shared}}}/{PREFIX}-*
    """
    both = f"{shared}/{PREFIX}-node1 {shared}/{PREFIX}-node2"
    network = cluster.network()
    assert cluster.on_nodes(script) == [
        f"node{i} {network}.1.{i}/16 /tmp/{PREFIX}-node{i} /dev/shm/{PREFIX}-node{i} {both}" for i in (1, 2)
    ]
    assert sorted(path.name for path in shared.iterdir()) == [f"{PREFIX}-node1", f"{PREFIX}-node2"]
    assert not [*Path("/tmp").glob(f"{PREFIX}-node*"), *Path("/dev/shm").glob(f"{PREFIX}-node*")]


def test_nodes_resolve_each_other_and_outside_addresses_fail_at_once(cluster: Cluster) -> None:
    network = cluster.network()
    assert cluster.node("node1", "getent hosts node2 controller") == (
        f"{network}.1.2      node2\n{network}.0.2      controller"
    )
    slurm_ports = "echo >/dev/tcp/node2/6818 && echo >/dev/tcp/controller/6817 && echo reached"
    assert cluster.node("node1", slurm_ports) == "reached"
    udp = "from socket import *; s = socket(type=SOCK_DGRAM); s.connect(('8.8.8.8', 80)); print(s.getsockname()[0])"
    assert cluster.node("node2", f'python3 -c "{udp}"') == f"{network}.1.2"
    started = time.monotonic()
    assert cluster("exec", "node1", "getent", "hosts", "example.org").returncode != 0
    assert cluster("exec", "node1", "bash", "-c", "echo >/dev/tcp/8.8.8.8/80").returncode != 0
    assert time.monotonic() - started < 3
    assert "node1" not in Path("/etc/hosts").read_text()


def test_a_job_sees_the_gpus_it_asked_for(cluster: Cluster) -> None:
    printed = cluster.on_nodes("echo $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES", "--gres=gpu:h100:3")
    assert printed == ["3 0,1,2", "3 0,1,2"]


def test_accounting_keeps_the_exit_code_and_the_script_of_a_job(cluster: Cluster) -> None:
    job = cluster.submit("echo a line of the script; exit 7")
    recorded = ("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode,Partition")
    assert until(lambda: cluster.slurm(*recorded).strip() == "FAILED|7:0|batch"), cluster.slurm(*recorded)
    assert "echo a line of the script" in cluster.slurm("sacct", "-B", "-j", job)


def test_scancel_ends_the_daemons_of_a_job_on_every_node(cluster: Cluster) -> None:
    # Twice forked, in a session of its own and with an empty environment: nothing but its cgroup tells whose it is.
    daemon = "(setsid env -i /bin/sleep 7771 >/dev/null 2>&1 </dev/null &)"
    job = cluster.submit(f"srun bash -c '{daemon}; sleep 7772'", "--nodes=2", "--ntasks-per-node=1")

    def alive() -> list[str]:
        return [cluster.node(node, "pgrep -cx -f '/bin/sleep 7771|sleep 7772'") for node in ("node1", "node2")]

    assert until(lambda: alive() == ["2", "2"]), alive()
    cluster.slurm("scancel", job)
    assert until(lambda: alive() == ["0", "0"]), alive()


def test_a_high_partition_job_preempts_and_requeues_the_running_job(cluster: Cluster) -> None:
    low = cluster.submit("sleep 600", "--nodes=2", "--exclusive")
    assert until(lambda: cluster.slurm("squeue", "-h", "-j", low, "-o", "%T") == "RUNNING\n")
    high = cluster.submit("exit 0", "--nodes=2", "--exclusive", "--partition=high")
    assert until(lambda: "COMPLETED" in cluster.slurm("scontrol", "show", "job", high))
    shown = cluster.slurm("scontrol", "show", "job", low)
    assert ("JobState=PENDING" in shown, "Restarts=1" in shown) == (True, True), shown
    cluster.slurm("scancel", low)


def test_exec_returns_the_status_and_ends_the_command_when_it_is_killed(cluster: Cluster) -> None:
    result = run(SCRIPT, "--name", cluster.name, "exec", "node2", "sh", "-c", "hostname; pwd; exit 7")
    assert (result.returncode, result.stdout) == (7, f"node2\n{Path.cwd()}\n")
    process = subprocess.Popen([str(SCRIPT), "--name", cluster.name, "exec", "node2", "sleep", "7773"], env=CLEAN)
    assert until(lambda: cluster.node("node2", "pgrep -cx -f 'sleep 7773'") == "1")
    process.terminate()
    process.wait(timeout=10)
    assert until(lambda: cluster.node("node2", "pgrep -cx -f 'sleep 7773'") == "0")


def test_a_killed_node_loses_all_it_had_and_comes_back_to_run_jobs(cluster: Cluster, shared: Path) -> None:
    cluster.node("node2", "touch /tmp/before; setsid sleep 7774 >/dev/null 2>&1 </dev/null & sleep 0.2")
    assert cluster("kill-node", "node2").returncode == 0
    assert run("pgrep", "-x", "-f", "sleep 7774").stdout == ""
    assert "node2 is not running" in cluster("status").stdout
    dead = cluster("exec", "node2", "true")
    assert (dead.returncode, "start-node node2" in dead.stderr) == (1, True), dead
    assert cluster.node("node1", "hostname") == "node1"
    back = cluster("start-node", "node2")
    assert back.returncode == 0, back.stderr
    assert cluster.node("node2", "ls -A /tmp") == shared.relative_to("/tmp").parts[0]
    assert cluster.on_nodes("hostname") == ["node1", "node2"]


def test_up_again_is_done_with_the_same_options_and_refused_with_others(cluster: Cluster, shared: Path) -> None:
    same = cluster("up", "--nodes", "2", "--shared", shared)
    assert (same.returncode, "already up" in same.stdout) == (0, True), same
    different = cluster("up", "--nodes", "1")
    assert (different.returncode, "already up with other options" in different.stderr) == (2, True), different
    assert cluster.on_nodes("hostname") == ["node1", "node2"]


def test_two_clusters_are_up_side_by_side_and_down_of_one_leaves_the_other(
    cluster: Cluster, other: Cluster, tmp_path: Path
) -> None:
    site = tmp_path / "site.conf"
    site.write_text("EnforcePartLimits=ALL\nSlurmdTimeout=77\nPartitionName=high Nodes=ALL MaxTime=00:10:00")
    sizes = ("--tmp-size", "64m", "--shm-size", "32m")
    other.up("--nodes", "1", "--no-accounting", "--gpus", "2", "--gpu-type", "2080ti", "--conf", site, *sizes)
    assert other.network() != cluster.network()
    assert other.slurm("sinfo", "-h", "-o", "%P %l %D %T %G").splitlines() == [
        "high 10:00 1 idle gpu:2080ti:2",
        "batch* 1-00:00:00 1 idle gpu:2080ti:2",
    ]
    assert "SlurmdTimeout           = 77 sec" in other.slurm("scontrol", "show", "config")
    assert other.node("node1", "df --output=size -m /tmp /dev/shm | tail -n +2").split() == ["64", "32"]
    assert other.slurm("srun", "hostname") == "node1\n"
    assert other("down").returncode == 0
    assert other.traces() == []
    assert cluster.on_nodes("hostname") == ["node1", "node2"]
    assert cluster("status").returncode == 0


def test_a_site_tries_its_filters_with_conf_and_etc(other: Cluster, tmp_path: Path) -> None:
    site, client, server = (tmp_path / name for name in ("site.conf", "cli_filter.lua", "job_submit.lua"))
    site.write_text("JobSubmitPlugins=lua\nCliFilterPlugins=lua\n")
    nothing = "function slurm_cli_setup_defaults() return 0 end function slurm_cli_post_submit() return 0 end "
    client.write_text(nothing + "function slurm_cli_pre_submit() slurm.log_error('from the filter') return 0 end")
    nothing = "function slurm_job_modify() return 0 end "
    server.write_text(nothing + "function slurm_job_submit(job) slurm.log_user('from the site') return 2051 end")
    other.up("--nodes", "1", "--no-accounting", "--conf", site, "--etc", client, "--etc", server)
    env = CLEAN | {"SLURM_CONF": str(other.state / "etc" / "slurm.conf")}
    refused = run("sbatch", "--wrap=true", env=env)
    assert refused.returncode == 1
    assert "from the filter" in refused.stderr
    assert "from the site" in refused.stderr


def test_the_shell_of_a_cluster_talks_to_it(cluster: Cluster) -> None:
    command = [str(SCRIPT), "--name", cluster.name, "shell"]
    env = CLEAN | {"SHELL": "/bin/sh"}
    result = subprocess.run(command, input="sinfo -h -p high -o %D", env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "2\n")


def test_a_user_who_is_not_root_runs_jobs(cluster: Cluster) -> None:
    submit = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "srun", "--chdir=/", "id", "-u")
    assert cluster.slurm(*submit) == "65534\n"


def test_down_removes_everything_under_a_running_job_and_is_repeatable(other: Cluster, tmp_path: Path) -> None:
    packages = packages_directories()
    other.up("--nodes", "2", "--shared", tmp_path)
    assert other.traces() != []
    pids = [(path / "pid").read_text().split()[0] for path in (other.state / "machines").iterdir()]
    inside = {space for pid in pids for space in namespaces(pid)} - namespaces("self")
    assert len([kind for kind, _ in inside if kind == "net"]) == 3
    job = other.submit("srun bash -c '(setsid sleep 7775 &); sleep 7775'", "--nodes=2", "--ntasks-per-node=1")
    assert until(lambda: other.slurm("squeue", "-h", "-j", job, "-o", "%T") == "RUNNING\n")
    # As Slurm does for a moment while it kills a step; a frozen process does not die.
    other.node("node1", f"echo FROZEN >{other.state}/local/cgroup/freezer/freezer.state || true")

    started = time.monotonic()
    assert other("down").returncode == 0
    assert time.monotonic() - started < 5
    assert other.traces() == []
    assert until(lambda: not inside & namespaces(), 2)
    assert packages_directories() == packages
    assert not {path.name for path in Path("/sys/class/net").iterdir()} & {"cluster", "host", "port1", "port2"}
    again = other("down")
    assert (again.returncode, again.stdout) == (0, f"cluster '{other.name}' is not up\n")


def start_up(cluster: Cluster, phase: str, env: dict[str, str] = CLEAN) -> subprocess.Popen[str]:
    """An up of two nodes that has just printed the line of a phase and works on the next."""
    command = [str(SCRIPT), "--name", cluster.name, "up", "--nodes", "2"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while phase and phase not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    time.sleep(0.15)
    return process


@pytest.mark.parametrize("phase", ["", "network", "munged", "MariaDB", "slurmdbd", "slurmctld"])
def test_down_ends_what_a_killed_up_had_started(other: Cluster, phase: str) -> None:
    process = start_up(other, phase)
    process.kill()
    process.wait()
    assert other("down").returncode == 0
    assert other.traces() == []


def test_down_ends_a_client_command_that_a_killed_up_had_waited_for(other: Cluster, tmp_path: Path) -> None:
    hanging = tmp_path / "sacctmgr"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    process = start_up(other, "MariaDB", CLEAN | {"PATH": f"{tmp_path}:{CLEAN['PATH']}"})
    process.kill()
    process.wait()
    assert until(lambda: any(r"sleep\x00600" in line for line in other.traces()), 2)
    assert other("down").returncode == 0
    assert other.traces() == []


def test_down_ends_an_up_that_is_under_way(other: Cluster) -> None:
    process = start_up(other, "MariaDB")
    assert other("down").returncode == 0
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert other.traces() == []


def test_an_interrupted_up_ends_what_it_started(other: Cluster) -> None:
    process = start_up(other, "network")
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=30)
    assert (process.returncode, complaint) == (143, "devcluster: ending what was started\n")
    assert other.traces() == []


def test_a_daemon_that_does_not_start_is_named_with_the_end_of_its_log(other: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "site.conf"
    site.write_text("SelectType=select/nonsense\n")
    result = other("up", "--nodes", "1", "--no-accounting", "--conf", site)
    assert result.returncode == 1
    assert "slurmctld on controller ended with status 1" in result.stderr
    assert "Can't find plugin for select/nonsense" in result.stderr
    assert other.traces() == []


def test_a_daemon_that_never_answers_is_named_when_the_deadline_passes(other: Cluster, tmp_path: Path) -> None:
    deaf = tmp_path / "munged"
    deaf.write_text("#!/bin/sh\necho deaf >&2\nsleep 600\n")
    deaf.chmod(0o755)
    env = CLEAN | {"PATH": f"{tmp_path}:{CLEAN['PATH']}", "SLURMKIT_DEVCLUSTER_DEADLINE": "4"}
    shared = ("--shared", tmp_path)
    result = run(SCRIPT, "--name", other.name, "up", "--nodes", "1", "--no-accounting", *shared, env=env)
    assert result.returncode == 1
    assert "munged on controller: no answer within 4 s" in result.stderr
    assert "    deaf\n" in result.stderr
    assert other.traces() == []


BAD = {
    "no command": ([], "usage: devcluster"),
    "unknown command": (["frobnicate"], "unknown command 'frobnicate'"),
    "unknown option": (["up", "--nodes", "1", "--frobnicate"], "unknown option '--frobnicate'"),
    "option of nothing": (["down", "extra"], "unexpected argument 'extra'"),
    "no number of nodes": (["up"], "up needs --nodes N"),
    "no value": (["up", "--nodes"], "--nodes needs a value"),
    "no nodes": (["up", "--nodes", "0"], "--nodes must be a number from 1 to 32, not '0'"),
    "too many nodes": (["up", "--nodes=33"], "--nodes must be a number from 1 to 32, not '33'"),
    "not a number": (["up", "--nodes", "two"], "--nodes must be a number from 1 to 32, not 'two'"),
    "octal": (["up", "--nodes", "08"], "--nodes must be a number from 1 to 32, not '08'"),
    "arithmetic": (["up", "--nodes", "a[$(id)]"], "--nodes must be a number"),
    "GPU type": (["up", "--nodes", "1", "--gpu-type", "h 100"], "--gpu-type must be"),
    "proctrack": (["up", "--nodes", "1", "--proctrack", "pgid"], "--proctrack is cgroup or linuxproc, not 'pgid'"),
    "no such directory": (["up", "--nodes", "1", "--shared", "/tmp/no/such"], "no directory '/tmp/no/such'"),
    "no such file": (["up", "--nodes", "1", "--conf", "/no/such"], "cannot read '/no/such'"),
    "no Slurm settings": (["up", "--nodes", "1", "--conf", "/etc/hosts"], "Slurm cannot read the slurm.conf"),
    "our own file": (["up", "--nodes", "1", "--etc", "/etc/hosts"], "hosts is written here"),
    "size": (["up", "--nodes", "1", "--tmp-size", "many"], "--tmp-size is a size like 8g"),
    "name": (["up", "--nodes", "1", "--name", "../x"], "a cluster's name is"),
}


@pytest.mark.parametrize(("arguments", "complaint"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_changes_nothing(other: Cluster, arguments: list[str], complaint: str) -> None:
    result = run(SCRIPT, "--name", other.name, *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert complaint in result.stderr
    assert other.traces() == []


def test_commands_for_a_node_refuse_one_that_does_not_exist(cluster: Cluster) -> None:
    for command in ("exec", "kill-node", "start-node"):
        for node in ("node3", "controler", ""):
            result = cluster(command, node)
            assert result.returncode == 2, result
            assert "node1 to node2" in result.stderr


def test_commands_for_a_cluster_that_is_not_up_say_how_to_start_it(other: Cluster) -> None:
    for command in (["env"], ["status"], ["shell"], ["exec", "node1", "true"], ["kill-node", "node1"]):
        result = other(*command)
        assert (result.returncode, result.stdout) == (1, ""), result
        assert f"cluster '{other.name}' is not up" in result.stderr


def test_a_state_directory_of_somebody_else_is_left_alone(other: Cluster) -> None:
    other.state.mkdir()
    precious = other.state / "precious"
    precious.write_text("data")
    try:
        for command in (["up", "--nodes", "1"], ["down"], ["status"]):
            result = other(*command)
            assert (result.returncode, "is not a devcluster's state directory" in result.stderr) == (2, True), result
        assert [path.name for path in other.state.iterdir()] == ["precious"]
    finally:
        precious.unlink()
        other.state.rmdir()


def test_who_is_not_root_is_refused(other: Cluster) -> None:
    result = run("unshare", "--user", SCRIPT, "--name", other.name, "up", "--nodes", "1")
    assert (result.returncode, "needs root" in result.stderr) == (2, True), result


def test_missing_packages_are_named(other: Cluster) -> None:
    hide = "for program in slurmctld slurmdbd ip; do mount --bind /dev/null $(readlink -f $(type -P $program)); done"
    up = f"{QUOTED} --name {other.name} up --nodes 1"
    result = run("unshare", "--mount", "bash", "-c", f"{hide}; {up}")
    assert (result.returncode, result.stdout) == (2, ""), result
    assert "apt-get install slurmctld iproute2 slurmdbd" in result.stderr


def test_the_secrets_are_readable_by_root_alone(cluster: Cluster) -> None:
    for name in ("munge.key", "slurmdbd.conf"):
        assert stat.S_IMODE((cluster.state / "etc" / name).stat().st_mode) == 0o600
