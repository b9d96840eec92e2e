#!/bin/bash
# Brings up a Slurm of one node on loopback, from nothing: slurm_up.sh FOLDER
#
# All state is in FOLDER; use it through SLURM_CONF=FOLDER/slurm.conf. Needs root, but no systemd and no default port or
# folder, so that several can be up at once. SLURMCTLD_PORT and SLURMD_PORT choose the ports, SLURM_EXTRA adds lines to
# the configuration.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
base=${1:?name a folder}
mkdir -p "$base"/{state,spool,log,munge}
base=$(cd "$base" && pwd)
chmod 755 "$base"
chmod 755 "$base/munge"
host=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)

cat >"$base/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURMCTLD_PORT:-16817}
SlurmdPort=${SLURMD_PORT:-16818}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/socket
CredType=cred/munge
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
MinJobAge=300
JobRequeue=1
KillWait=2
${SLURM_EXTRA:-}
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE DefMemPerCPU=512 State=UP
CONF

exec </dev/null >>"$base/log/daemons.log" 2>&1
key=$base/munge/key
[ -s "$key" ] || (umask 077 && head -c 1024 /dev/urandom >"$key")
munged --force --key-file="$key" --socket="$base/munge/socket" --pid-file="$base/munged.pid" \
  --log-file="$base/log/munged.log" --seed-file="$base/munge/seed"
slurmctld -f "$base/slurm.conf"
slurmd -f "$base/slurm.conf"
export SLURM_CONF=$base/slurm.conf
for _ in $(seq 600); do
  timeout 2 sinfo -h -o %T | grep -qE '^(idle|mix|alloc)' && exit 0
  sleep 0.1
done
exit 1
