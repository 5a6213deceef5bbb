#!/usr/bin/env bash
# The pages of the site: with Quarto `nbdev-docs` makes them in _docs; without it smalldocs makes a preview in _preview/_docs.
# tools/signatures.py, which nbdev asks for signatures, is found by the search path.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/tools${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=agg
if command -v quarto > /dev/null; then exec nbdev-docs; fi
nbdev-proc-nbs
python tools/preview.py
exec smalldocs render _preview
