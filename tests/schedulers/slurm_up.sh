#!/bin/bash
# Brings up a Slurm on loopback, from nothing: slurm_up.sh FOLDER
#
# All state is in FOLDER; use it through SLURM_CONF=FOLDER/slurm.conf. Needs root, but no systemd and no default port or
# folder, so that several can be up at once. SLURMCTLD_PORT and SLURMD_PORT choose the ports, SLURM_EXTRA adds lines to
# the configuration. It has one node, or one for each port in SLURMD_PORT, all on this machine and of
# the size SLURM_NODE. With SLURMDBD_PORT it keeps accounts, in a MariaDB that listens on a socket in FOLDER alone.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
base=${1:?name a folder}
mkdir -p "$base"/{state,spool,log,munge}
base=$(cd "$base" && pwd)
chmod 755 "$base"
chmod 755 "$base/munge"
host=$(hostname -s)
accounts=AccountingStorageType=accounting_storage/none
if [ -n "${SLURMDBD_PORT:-}" ]; then
  accounts="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass=$base/munge/socket
AccountingStoragePort=$SLURMDBD_PORT"
fi
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
size=${SLURM_NODE:-CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$memory}
nodes=() names=()
for port in ${SLURMD_PORT:-16818}; do
  names+=("$host${names:+-$((${#names[@]} + 1))}")
  nodes+=("NodeName=${names[-1]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$port $size State=UNKNOWN")
done

cat >"$base/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURMCTLD_PORT:-16817}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/socket
CredType=cred/munge
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd-%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
$accounts
JobCompType=jobcomp/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
MinJobAge=300
JobRequeue=1
KillWait=2
${SLURM_EXTRA:-}
$(printf '%s\n' "${nodes[@]}")
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=512 State=UP
CONF

exec </dev/null >>"$base/log/daemons.log" 2>&1
key=$base/munge/key
[ -s "$key" ] || (umask 077 && head -c 1024 /dev/urandom >"$key")
munged --force --key-file="$key" --socket="$base/munge/socket" --pid-file="$base/munged.pid" \
  --log-file="$base/log/munged.log" --seed-file="$base/munge/seed"
if [ -n "${SLURMDBD_PORT:-}" ]; then
  cat >"$base/slurmdbd.conf" <<CONF
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$SLURMDBD_PORT
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/socket
PidFile=$base/slurmdbd.pid
LogFile=$base/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounts
CommunicationParameters=NoInAddrAny
CONF
  chmod 600 "$base/slurmdbd.conf"
  small=(--no-defaults --user=root "--datadir=$base/db" --innodb-log-file-size=4M --innodb-flush-method=nosync)
  mariadb-install-db "${small[@]}" --auth-root-authentication-method=socket --skip-test-db
  export MYSQL_UNIX_PORT=$base/db.socket # where slurmdbd looks for it
  mariadbd "${small[@]}" --skip-networking --pid-file="$base/mariadb.pid" &
  for _ in $(seq 600); do
    mariadb-admin --no-defaults ping && break
    sleep 0.1
  done
  SLURM_CONF=$base/slurm.conf slurmdbd
  for _ in $(seq 600); do
    SLURM_CONF=$base/slurm.conf sacctmgr -n show cluster && break
    sleep 0.1
  done
fi
slurmctld -f "$base/slurm.conf"
for name in "${names[@]}"; do slurmd -f "$base/slurm.conf" -N "$name"; done
export SLURM_CONF=$base/slurm.conf
for _ in $(seq 600); do
  [ "$(timeout 2 sinfo -h -N -p main -t idle | wc -l)" = "${#names[@]}" ] && exit 0
  sleep 0.1
done
exit 1
