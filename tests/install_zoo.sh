#!/bin/bash
# Installs timm and torchvision into a folder of their own in .venv, for the tests of networks of other people: without
# what they depend on, since torchvision asks for the build of PyTorch with GPUs. Does nothing where they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -d .venv/zoo/timm ]] && exit 0
.venv/bin/pip install --quiet --no-deps --no-compile --target .venv/zoo timm==1.0.31 torchvision==0.28.0
