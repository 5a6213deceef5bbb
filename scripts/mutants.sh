#!/usr/bin/env bash
# Break the package on purpose, one small change at a time, and see whether the tests of the changed module notice: 300 changes, the same
# ones every time, in two processes. It can be stopped and started again. Further arguments go to scripts/mutants.py, which explains them.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=agg OMP_NUM_THREADS=1
exec python scripts/mutants.py "$@"
