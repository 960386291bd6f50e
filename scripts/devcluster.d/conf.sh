# shellcheck shell=bash
# shellcheck disable=SC2154  # NAME, STATE, NETWORK, … are scripts/devcluster's, which sources this file
# The configuration files of a development cluster, written to $STATE/etc.

write_configuration() {
  mkdir "$STATE/etc"
  write_names
  write_munge_key
  write_fake_gpus
  write_slurm_conf
  write_slurmdbd_conf
  if ((${#SITE_FILES[@]})); then cp -- "${SITE_FILES[@]}" "$STATE/etc/"; fi
}

write_names() {
  local i
  {
    echo "127.0.0.1 localhost"
    echo "$NETWORK.0.1 $(hostname -s)" # where the machines find a service of the host, and Slurm an srun on it
    echo "$NETWORK.0.2 controller"
    for ((i = 1; i <= NODES; i++)); do echo "$NETWORK.1.$i node$i"; done
  } >"$STATE/etc/hosts"
  printf 'nameserver 127.0.0.1\noptions timeout:1 attempts:1\n' >"$STATE/etc/resolv.conf"
}

write_munge_key() {
  (umask 077 && head -c 1024 /dev/urandom >"$STATE/etc/munge.key")
}

# Slurm counts only GPUs whose File is a device. These are /dev/null by another name, so opening one does no harm.
write_fake_gpus() {
  local i
  mkdir "$STATE/dev"
  for ((i = 0; i < GPUS; i++)); do mknod -m 666 "$STATE/dev/nvidia$i" c 1 3; done
  if ((GPUS > 0)); then
    echo "NodeName=$(node_range) Name=gpu Type=$GPU_TYPE File=$STATE/dev/nvidia$(range 0 $((GPUS - 1)))"
  fi >"$STATE/etc/gres.conf"
}

range() { # range FIRST LAST, in Slurm's notation
  if (($1 == $2)); then echo "$1"; else echo "[$1-$2]"; fi
}

node_range() { echo "node$(range 1 "$NODES")"; }

write_slurm_conf() {
  printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\n' "$STATE/local/cgroup" >"$STATE/etc/cgroup.conf"
  {
    echo "# Written by scripts/devcluster; edit it and run 'scontrol reconfigure' to try a setting."
    slurm_settings | without_site_settings
    printf '%s\n' "$SITE_CONF"
    slurm_nodes | without_site_settings
  } >"$STATE/etc/slurm.conf"
}

# Every Slurm command would warn about a setting given twice, so the site's file takes the place of our lines.
without_site_settings() {
  awk '
    function key(line) {
      if (tolower(line) ~ /^[ \t]*(nodename|partitionname)[ \t]*=/) sub(/=[ \t]*/, ":", line)
      sub(/[ \t]*[= ].*/, "", line); sub(/^[ \t]*/, "", line)
      return tolower(line)
    }
    NR == FNR { if ($0 !~ /^[ \t]*(#|$)/) site[key($0)]; if (key($0) ~ /^nodename:node/) nodes = 1; next }
    !(key($0) in site) && !(nodes && key($0) ~ /^nodename:/)
  ' <(printf '%s\n' "$SITE_CONF") -
}

slurm_settings() {
  # cred_expire is also how long a requeued job waits before it may start again: 120 s by default.
  cat <<SETTINGS
ClusterName=$NAME
SlurmctldHost=controller($NETWORK.0.2)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$STATE/munge.socket,cred_expire=15
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/$PROCTRACK
TaskPlugin=task/none
SwitchType=switch/none
SlurmctldPidFile=$STATE/local/slurmctld.pid
SlurmdPidFile=$STATE/local/slurmd.pid
SlurmdSpoolDir=$STATE/local/spool
StateSaveLocation=$STATE/local/slurmctld
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/%n-slurmd.log
SlurmctldDebug=info
SlurmdDebug=info
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=10
BatchStartTimeout=60
MessageTimeout=10
TCPTimeout=2
InactiveLimit=0
KillWait=5
WaitTime=0
MinJobAge=300
JobRequeue=1
MaxJobCount=50000
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((MEMORY / CPUS))
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=30
JobCompType=jobcomp/none
SETTINGS
  if [[ $ACCOUNTING == yes ]]; then
    cat <<SETTINGS
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$NETWORK.0.2
AccountingStoragePass=$STATE/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment,job_env,job_script
SETTINGS
  else
    echo "AccountingStorageType=accounting_storage/none"
  fi
}

slurm_nodes() {
  local gres=""
  if ((GPUS > 0)); then gres="Gres=gpu:$GPU_TYPE:$GPUS "; fi
  cat <<NODES
NodeName=$(node_range) NodeAddr=$NETWORK.1.$(range 1 "$NODES") CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEMORY ${gres}State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES DefaultTime=01:00:00 MaxTime=1-00:00:00 PriorityTier=10 State=UP
PartitionName=high Nodes=ALL DefaultTime=00:30:00 MaxTime=04:00:00 PriorityTier=100 PreemptMode=OFF State=UP
NODES
}

# No password: the database listens on a socket in a directory of the controller's own, which only root can enter.
write_slurmdbd_conf() {
  (
    umask 077
    cat >"$STATE/etc/slurmdbd.conf" <<SETTINGS
AuthType=auth/munge
AuthInfo=$STATE/munge.socket
DbdHost=controller
SlurmUser=root
PidFile=$STATE/local/slurmdbd.pid
LogFile=$STATE/log/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
SETTINGS
  )
}
