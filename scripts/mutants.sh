#!/usr/bin/env bash
# Break the package on purpose, one small change at a time, and see whether the tests of the changed module
# notice: 300 changes, the same ones every time, two at a time, in one to two hours. It can be stopped and
# started again. Further arguments go to scripts/mutants.py, which explains them. Cosmic Ray is not among the
# packages for development, since nothing else needs it: it comes here.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
.venv/bin/python -c 'import cosmic_ray' 2> /dev/null || .venv/bin/pip install -q 'cosmic-ray>=8.4.6,<9'
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=agg OMP_NUM_THREADS=1
exec python scripts/mutants.py "$@"
