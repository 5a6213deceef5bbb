#!/usr/bin/env bash
# Makes .venv with seismodel in it: `scripts/setup.sh` for use, `scripts/setup.sh dev` with notebooks and tests.
# TORCH="torch==2.11.0" (or a wheel) chooses another build of PyTorch; one that is already in .venv stays.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:+[$1]}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "seismodel needs Python 3.11 or later; set PYTHON to one." >&2; exit 2; }
[ -x .venv/bin/pip ] || "$python" -m venv .venv
.venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/pip install -q "${TORCH:-torch==2.13.0}"
.venv/bin/pip install -q -e ".$extra"
