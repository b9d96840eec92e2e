#!/bin/bash
# Ends the daemons that sge_up.sh FOLDER started, by the process ids they left there.
set -uo pipefail
base=${1:?name a folder}
for file in "$base"/spool/execd/*/execd.pid "$base/spool/qmaster/qmaster.pid"; do
  pid=$(cat "$file" 2>/dev/null) || continue
  kill "$pid" 2>/dev/null || continue
  for _ in $(seq 20); do
    [ -d "/proc/$pid" ] || continue 2
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null # nothing is kept: no need to wait for it to tell the others
done
exit 0
