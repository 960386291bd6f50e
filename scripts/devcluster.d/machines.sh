# shellcheck shell=bash
# shellcheck disable=SC2154  # NAME, STATE, NETWORK, … are scripts/devcluster's, which sources this file
# The machines of a development cluster: starting, connecting, entering and killing them, and the daemons on them.

# ---------------------------------------------------------------------------------------------------- processes

start_time() { # of a process, in clock ticks since boot; with its number it names a process for ever
  local stat fields
  read -r stat 2>/dev/null <"/proc/$1/stat" || return 1
  read -ra fields <<<"${stat##*) }"
  [[ ${fields[0]} != Z ]] && echo "${fields[19]}"
}

live_pid() { # the number in a file "PID START-TIME", where that process still runs
  local pid start
  read -r pid start 2>/dev/null <"$1" && [[ $(start_time "$pid") == "$start" ]] && echo "$pid"
}

machine_pid() { live_pid "$STATE/machines/$1/pid"; }

in_machine() { # in_machine MACHINE CMD...
  local pid
  pid=$(machine_pid "$1") || die "$1 is not running"
  nsenter --target "$pid" --mount --uts --ipc --net --pid -- "${@:2}"
}

start_daemon() { # start_daemon MACHINE DAEMON CMD...: leaves MACHINE/DAEMON.ended behind when the daemon ends
  local machine=$1 daemon=$2
  # The inner shell does not wait: the daemon is left to the machine's PID 1 and has nothing of our terminal or pipes.
  # shellcheck disable=SC2016
  setsid --wait env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 SLURM_CONF="$STATE/etc/slurm.conf" \
    nsenter --target "$(machine_pid "$machine")" --mount --uts --ipc --net --pid -- bash -c '
      ended=$1; ulimit -c 0 -n "$(ulimit -Hn)"; ulimit -l unlimited 2>/dev/null || true
      { "${@:2}"; echo "$?" >"$ended"; } &' "$daemon" \
    "$STATE/machines/$machine/$daemon.ended" "${@:3}" \
    </dev/null >>"$STATE/log/$machine-$daemon.out" 2>&1
}

slurm() { # a client command, without the caller's SLURM_* and SINFO_* variables
  env -i PATH="$PATH" SLURM_CONF="$STATE/etc/slurm.conf" "$MARK=$STATE" timeout 20 "$@"
}

# await MACHINE DAEMON WHAT CMD...: until CMD succeeds, or the daemon has ended, or the deadline has passed
await() {
  local machine=$1 daemon=$2 what=$3 until=$((SECONDS + DEADLINE)) last
  until "${@:4}" >"$STATE/log/probe.out" 2>&1; do
    if [[ -e $STATE/machines/$machine/$daemon.ended ]]; then
      report "$daemon on $machine ended with status $(<"$STATE/machines/$machine/$daemon.ended")" "$machine-$daemon"
    elif ((SECONDS >= until)); then
      last=$(grep -v '^\*' "$STATE/log/probe.out" | tail -n 1)
      report "$daemon on $machine: $what within $DEADLINE s${last:+ ($last)}" "$machine-$daemon"
    fi
    sleep 0.05
  done
}

report() { # report MESSAGE LOG: fail with the end of a daemon's output
  {
    echo "devcluster: $1; the end of its output:"
    tail -n 15 "$STATE/log/$2.out" | sed 's/^/    /'
  } >&2
  exit 1
}

# ---------------------------------------------------------------------------------------------------- machines

start_machine() {
  local self=$STATE/machines/$1
  rm -rf "$self" && mkdir "$self"
  env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 setsid \
    unshare --mount --propagation slave --uts --ipc --net --pid --fork --kill-child \
    env "$MARK=$STATE" bash "$HERE/init.sh" "$STATE" "$1" </dev/null >"$STATE/log/$1-init.out" 2>&1 &
  echo "$!" >"$self/parent"
}

await_machine() { # a machine's PID 1 leaves nothing behind when it fails, so look at its parent
  local until=$((SECONDS + DEADLINE))
  until [[ -e $STATE/machines/$1/booted ]]; do
    if ! kill -0 "$(<"$STATE/machines/$1/parent")" 2>/dev/null; then report "$1 did not boot" "$1-init"; fi
    if ((SECONDS >= until)); then report "$1 did not boot within $DEADLINE s" "$1-init"; fi
    sleep 0.02
  done
}

ip_in() { # ip_in MACHINE: commands for ip on standard input
  nsenter --target "$(machine_pid "$1")" --net ip -batch -
}

# The controller is also the switch and the gateway. With a default route the nodes see their own address on a UDP
# connect (how Ray finds its own); the gateway has no route onwards and forwards, so it answers "unreachable" at once and
# what tries to reach the Internet fails in microseconds, not in minutes.
connect_controller() {
  ip -batch - <<IP
link add $INTERFACE type veth peer name host netns $(machine_pid controller)
addr add $NETWORK.0.1/16 dev $INTERFACE
link set $INTERFACE up
IP
  ip_in controller <<IP
link set lo up
link add cluster type bridge
link set host master cluster up
addr add $NETWORK.0.2/16 dev cluster
link set cluster up
IP
  # shellcheck disable=SC2016
  in_machine controller bash -c 'cd /proc/sys/net/ipv4 && echo 1 >ip_forward && echo 0 >icmp_ratelimit'
}

connect_node() {
  local i=${1#node} card
  card=$(printf '02:00:00:00:01:%02x' "$i") # the same after a restart: other machines remember it for half a minute
  ip_in controller <<IP
link add port$i type veth peer name eth0 address $card netns $(machine_pid "$1")
link set port$i master cluster up
IP
  ip_in "$1" <<IP
link set lo up
link set eth0 addrgenmode none
addr add $NETWORK.1.$i/16 dev eth0
link set eth0 up
route add default via $NETWORK.0.2
IP
}

start_slurmd() { start_daemon "$1" slurmd slurmd -D; }

node_state() { slurm sinfo -h -p batch -n "$1" -o %T 2>/dev/null; }

node_is_idle() { [[ $(node_state "$1") == idle ]]; }

node_answers() { # node_answers NODE SINCE: its slurmd has registered since then, and may run jobs
  local shown
  shown=$(slurm scontrol -o show node "$1") &&
    [[ $shown =~ SlurmdStartTime=([^ ]+) ]] && (($(date -d "${BASH_REMATCH[1]}" +%s) >= $2)) &&
    [[ ! $shown =~ State=(DOWN|UNKNOWN|[A-Z+]*NOT_RESPONDING|[A-Z]+\*) ]]
}

# ---------------------------------------------------------------------------------------------------- the controller

start_munge() {
  start_daemon controller munged munged --foreground --force --num-threads=4 --key-file="$STATE/etc/munge.key" \
    --socket="$STATE/munge.socket" --pid-file="$STATE/local/munged.pid" --log-file="$STATE/log/munged.log" \
    --seed-file="$STATE/local/munge.seed"
  await controller munged "no answer" munge --no-input --socket="$STATE/munge.socket"
}

# A new database takes 0.3 s when only the system tables are made and the directory is the controller's tmpfs, so there
# is no prepared copy to keep. Without grant tables, who may enter the socket's directory (root) may do everything.
start_database() {
  # shellcheck disable=SC2016
  start_daemon controller mariadbd bash -euo pipefail -c '
    cd "$1"; tables=$2; shift 2; mkdir mysql
    { echo "use mysql;"; cat "$tables"; } | mariadbd "$@" --bootstrap
    exec mariadbd "$@" --socket="$PWD/socket" --pid-file="$PWD/pid"' mariadbd "$STATE/local/database" "$(system_tables)" \
    --no-defaults --user=root --datadir="$STATE/local/database" --skip-grant-tables --skip-networking --skip-log-bin \
    --performance-schema=off --innodb-buffer-pool-size=64M --innodb-log-file-size=32M --innodb-lock-wait-timeout=900
  await controller mariadbd "no answer" grep -q "ready for connections" "$STATE/log/controller-mariadbd.out"
}

start_slurmdbd() {
  start_daemon controller slurmdbd env MYSQL_UNIX_PORT="$STATE/local/database/socket" slurmdbd -D
  await controller slurmdbd "no answer" slurm sacctmgr -n show cluster
}

start_slurmctld() {
  start_daemon controller slurmctld slurmctld -D
  await controller slurmctld "no answer" slurm scontrol ping
}

# ---------------------------------------------------------------------------------------------------- the end

marked_processes() { # PID 1 of every machine of this cluster, and the client commands of an up that was killed
  grep -lzsxF "$MARK=$STATE" /proc/[0-9]*/environ | cut -d/ -f3 || true
}

# Frozen processes do not die, and Slurm freezes a step while it kills it; a thawed group goes when it is empty.
sweep_freezer() { # sweep_freezer GROUP: succeeds when it is gone
  # shellcheck disable=SC2016
  unshare --mount --propagation private bash -c '
    mount -t cgroup -o freezer cgroup "$1" 2>/dev/null || exit 0
    [[ -d $1/$2 ]] || exit 0
    find "$1/$2" -name freezer.state -exec sh -c "echo THAWED >\$1" sh {} \; 2>/dev/null
    find "$1/$2" -depth -type d -exec rmdir {} \; 2>/dev/null
    [[ ! -d $1/$2 ]]' bash "$STATE" "$1"
}

# The kernel ends every process of a PID namespace with its PID 1, which disappears only after the last of them.
kill_machines() { # kill_machines GROUP PID...
  local pid alive until=$((SECONDS + 10))
  local -A started=()
  for pid in "${@:2}"; do started[$pid]=$(start_time "$pid" || true); done
  while :; do
    alive=()
    for pid in "${!started[@]}"; do
      if [[ -n ${started[$pid]} && $(start_time "$pid") == "${started[$pid]}" ]]; then alive+=("$pid"); fi
    done
    ((${#alive[@]})) || return 0
    kill -KILL "${alive[@]}" 2>/dev/null || true
    if ((SECONDS >= until)); then die "processes ${alive[*]} cannot be ended"; fi
    sweep_freezer "$1" || true
    sleep 0.02
  done
}

tear_down() {
  local pids until=$((SECONDS + 10))
  while mapfile -t pids < <(marked_processes) && ((${#pids[@]})); do kill_machines "slurmkit-$NAME" "${pids[@]}"; done
  until sweep_freezer "slurmkit-$NAME"; do
    if ((SECONDS >= until)); then die "the cgroups slurmkit-$NAME cannot be removed"; fi
    sleep 0.02
  done
  ip link del "$INTERFACE" 2>/dev/null || true
  # Away at once: a down that is killed while it removes leaves nothing that looks like somebody else's directory.
  rm -rf --one-file-system "$STATE.new"
  mv -T "$STATE" "$STATE.new"
  rm -rf --one-file-system "$STATE.new"
}
