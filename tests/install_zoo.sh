#!/bin/bash
# Installs timm, torchvision and transformers into a folder of their own in .venv, for the tests of networks of other
# people: without most of what they depend on, since torchvision asks for the build of PyTorch with GPUs. Does nothing
# where they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -d .venv/zoo/timm && -d .venv/zoo/transformers ]] && exit 0
rm -rf .venv/zoo
.venv/bin/pip install --quiet --no-deps --no-compile --target .venv/zoo timm==1.0.31 torchvision==0.28.0 \
  transformers==5.24.0 huggingface-hub==2.4.0 tokenizers==0.23.3 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 \
  tqdm==4.70.1
