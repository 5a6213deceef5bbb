#!/usr/bin/env bash
# Set up and run every test: each notebook from top to bottom, and tests/, in two processes. Further arguments go to pytest:
# `-n 0` for one process, in which `-s` and `--pdb` work.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=agg
exec python -m pytest -q -n 2 --dist worksteal "$@"
