#!/bin/bash
# Brings up a Grid Engine of one node, from nothing: sge_up.sh FOLDER
#
# All state is in FOLDER; use it with SGE_ROOT=FOLDER SGE_CELL=default and the ports' variables. Needs root, but no
# systemd and no default port or folder, so that several can be up at once. SGE_QMASTER_PORT and SGE_EXECD_PORT choose
# the ports, SGE_AJ_TASKS the largest array.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
base=${1:?name a folder}
mkdir -p "$base"/{default/common,spool/qmaster/job_scripts,spool/execd,spool/db,log,made}
base=$(cd "$base" && pwd)
chmod 755 "$base"
host=$(hostname -s)
export SGE_ROOT=$base SGE_CELL=default
export SGE_QMASTER_PORT=${SGE_QMASTER_PORT:-16444} SGE_EXECD_PORT=${SGE_EXECD_PORT:-16445}
exec </dev/null >>"$base/log/daemons.log" 2>&1

share=/usr/share/gridengine
ln -sfn $share/util "$base/util"
echo "$host" >"$base/default/common/act_qmaster"
# 127.0.0.1 has other names too: they are the same machine.
names=$(awk '$1 == "127.0.0.1" {for (i = 2; i <= NF; i++) print $i}' /etc/hosts | sort -u | grep -vx "$host" | tr '\n' ' ')
echo "$host $names" >"$base/default/common/host_aliases"
cat >"$base/default/common/bootstrap" <<CONF
admin_user              root
default_domain          none
ignore_fqdn             false
spooling_method         berkeleydb
spooling_lib            libspoolb
spooling_params         $base/spool/db
binary_path             /usr/sbin
qmaster_spool_dir       $base/spool/qmaster
security_mode           none
listener_threads        2
worker_threads          2
scheduler_threads       1
CONF

# Root may run jobs, arrays are small, accounting is written at once.
sed -e "s|^execd_spool_dir .*|execd_spool_dir $base/spool/execd|" -e 's/^min_[ug]id .*//' \
  -e 's/^gid_range .*/gid_range 20000-20100/' -e 's/^loglevel .*/loglevel log_info/' \
  -e "s/^max_aj_tasks .*/max_aj_tasks ${SGE_AJ_TASKS:-75000}/" \
  -e 's/^login_shells .*/login_shells none/' \
  -e 's/flush_time=00:00:15/flush_time=00:00:01/' -e 's/^load_report_time .*/load_report_time 00:00:05/' \
  $share/default-configuration >"$base/made/configuration"
printf 'min_uid 0\nmin_gid 0\n' >>"$base/made/configuration"
LD_LIBRARY_PATH=/usr/lib/gridengine /usr/lib/gridengine/spoolinit berkeleydb libspoolb "$base/spool/db" init
defaults=/usr/lib/gridengine/spooldefaults
$defaults configuration "$base/made/configuration"
$defaults complexes $share/util/resources/centry
$defaults usersets $share/util/resources/usersets
$defaults managers root

sge_qmaster
for _ in $(seq 600); do
  qconf -sh && break
  sleep 0.1
done
qconf -ah "$host" || true
qconf -as "$host"
cat >"$base/made/host" <<CONF
hostname              $host
load_scaling          NONE
complex_values        NONE
user_lists            NONE
xuser_lists           NONE
projects              NONE
xprojects             NONE
usage_scaling         NONE
report_variables      NONE
CONF
qconf -se "$host" || qconf -Ae "$base/made/host"
printf 'group_name @allhosts\nhostlist %s\n' "$host" >"$base/made/group"
qconf -Ahgrp "$base/made/group"
cat >"$base/made/smp" <<CONF
pe_name            smp
slots              999
user_lists         NONE
xuser_lists        NONE
start_proc_args    NONE
stop_proc_args     NONE
allocation_rule    \$pe_slots
control_slaves     FALSE
job_is_first_task  TRUE
urgency_slots      min
accounting_summary FALSE
qsort_args         NONE
CONF
qconf -Ap "$base/made/smp"
qconf -sq | sed -e 's/^qname .*/qname all.q/' -e 's/^hostlist .*/hostlist @allhosts/' -e "s/^slots .*/slots $(getconf _NPROCESSORS_ONLN)/" \
  -e 's#^shell .*#shell /bin/bash#' -e 's/^load_thresholds .*/load_thresholds NONE/' -e 's/^rerun .*/rerun TRUE/' \
  -e 's/^pe_list .*/pe_list smp/' >"$base/made/queue"
qconf -Aq "$base/made/queue"
qconf -ssconf | sed -e 's/^schedule_interval .*/schedule_interval 0:0:1/' -e 's/^flush_submit_sec .*/flush_submit_sec 1/' \
  -e 's/^flush_finish_sec .*/flush_finish_sec 1/' >"$base/made/scheduler"
qconf -Msconf "$base/made/scheduler"
sge_execd
for _ in $(seq 600); do
  qstat -f | grep 'all.q@' | grep -qvE 'au|-NA-' && exit 0
  sleep 0.1
done
exit 1
