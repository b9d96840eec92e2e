#!/bin/bash
# Installs Slurm and Grid Engine from Debian's packages, for the tests that run real array jobs.
# Does nothing where they are there already, or where it is not root's to do. Starts nothing.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

there() { for command in "$@"; do command -v "$command" >/dev/null || return 1; done; }
wanted=()
there slurmctld slurmd munged sbatch || wanted+=(slurm-wlm munge)
there sge_qmaster sge_execd qsub || wanted+=(gridengine-master gridengine-exec gridengine-client)
accounts=()
there slurmdbd mariadbd || accounts+=(slurmdbd mariadb-server)
((${#wanted[@]} + ${#accounts[@]})) || exit 0
if ((EUID)) || ! command -v apt-get >/dev/null; then
  echo "no schedulers: ${wanted[*]} ${accounts[*]} can only be installed by root, on Debian"
  exit 0
fi

# The packages' own start-up would use the default ports and folders; the tests bring up daemons of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
install() { apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }
((${#wanted[@]} == 0)) || install "${wanted[@]}"
((${#accounts[@]} == 0)) || install "${accounts[@]}" || echo "no accounts of Slurm: the tests that need them are skipped"
