#!/usr/bin/env bash
# Set up and run every test: each notebook from top to bottom, then tests/. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=agg
exec python -m pytest -q "$@"
