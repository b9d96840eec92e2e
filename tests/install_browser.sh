#!/bin/bash
# Installs Chromium from Debian's packages, for the tests that look at MLflow's pages.
# Does nothing where it is there already, or where it is not root's to do. Starts nothing.
set -euo pipefail
command -v chromium >/dev/null && exit 0
if ((EUID)) || ! command -v apt-get >/dev/null; then
  echo "no browser: chromium can only be installed by root, on Debian"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
