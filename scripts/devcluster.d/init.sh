#!/bin/bash
# PID 1 of one machine of a development cluster: init.sh STATE MACHINE. scripts/devcluster starts it in new mount,
# UTS, IPC, network and PID namespaces; it gives the machine its own /proc, /sys, /tmp, /dev/shm, name and local disk,
# then reaps orphans until it is killed. What a machine has goes with this process, as with a computer's power.
set -euo pipefail

STATE=$1 MACHINE=$2
# shellcheck source=/dev/null
source "$STATE/settings"
SELF=$STATE/machines/$MACHINE
LOCAL=$STATE/local # one path, a different directory on every machine

# /proc is still the host's here, so this is the process number by which the host can enter and kill this machine.
publish_pid() {
  local stat
  read -r stat </proc/self/stat
  local fields
  read -ra fields <<<"${stat##*) }"
  echo "${stat%% *} ${fields[19]}" >"$SELF/pid.new"
  mv "$SELF/pid.new" "$SELF/pid"
}

mount_own_tmp() {
  local directory
  mkdir "$LOCAL/tmp"
  mount -t tmpfs -o "size=$TMP_SIZE,mode=1777" tmpfs "$LOCAL/tmp"
  for directory in ${SHARED[@]+"${SHARED[@]}"}; do
    mkdir -p "$LOCAL/tmp/${directory#/tmp}"
    mount --rbind "$directory" "$LOCAL/tmp/${directory#/tmp}"
  done
  mount --move "$LOCAL/tmp" /tmp
  mount -t tmpfs -o "size=$SHM_SIZE,mode=1777" tmpfs /dev/shm
}

# A sysfs mounted here lists this machine's network interfaces (NCCL reads them); the cgroups stay the host's.
mount_own_sys() {
  mkdir "$LOCAL/sys"
  mount -t sysfs sysfs "$LOCAL/sys"
  mount --rbind /sys/fs/cgroup "$LOCAL/sys/fs/cgroup"
  mount --move "$LOCAL/sys" /sys
}

# Slurm names a step's cgroup by node, user, job and step: the same in two clusters. So each machine gets a subtree of its
# own, bound to where Slurm looks, or one cluster would kill the processes of another's job.
mount_own_freezer() {
  mkdir -p "$LOCAL/hierarchy" "$LOCAL/cgroup/freezer"
  mount -t cgroup -o freezer cgroup "$LOCAL/hierarchy"
  mkdir -p "$LOCAL/hierarchy/slurmkit-$NAME/$MACHINE"
  mount --bind "$LOCAL/hierarchy/slurmkit-$NAME/$MACHINE" "$LOCAL/cgroup/freezer"
  umount "$LOCAL/hierarchy"
}

# Unanswered DNS queries cost Ray and gloo 6 to 80 s; nothing listens on the machine's own port 53, which is known at once.
mount_own_names() {
  mount --bind "$STATE/etc/hosts" /etc/hosts
  if [[ -e /etc/resolv.conf ]]; then
    mount --bind "$STATE/etc/resolv.conf" "$(readlink -f /etc/resolv.conf)"
  fi
}

boot() {
  publish_pid
  hostname "$MACHINE"
  mount -t proc proc /proc
  mount -t tmpfs -o mode=755 tmpfs "$LOCAL"
  mkdir "$LOCAL/spool"
  mkdir -m 700 "$LOCAL/database" "$LOCAL/slurmctld"
  mount_own_tmp
  mount_own_sys
  if [[ $PROCTRACK == cgroup ]]; then mount_own_freezer; fi
  mount_own_names
  cd /
  : >"$SELF/booted"
}

boot
# bash's wait collects every child that ends, adopted ones too. The machine stays up when its slurmd dies, as a node does.
while :; do
  sleep infinity &
  wait $! || true
done
