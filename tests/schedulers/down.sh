#!/bin/bash
# Ends the daemons that slurm_up.sh FOLDER or sge_up.sh FOLDER started, by the process ids they left there.
set -uo pipefail
base=${1:?name a folder}
pids=$(find "$base" -name '*.pid' -exec cat {} + 2>/dev/null)
for signal in TERM KILL; do # nothing is kept: two seconds to end by themselves will do
  for pid in $pids; do kill -s $signal "$pid" 2>/dev/null; done
  for _ in $(seq 20); do
    kill -0 $pids 2>/dev/null || exit 0
    sleep 0.1
  done
done
exit 0
