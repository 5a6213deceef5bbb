#!/usr/bin/env bash
# Associate our picks with PyOcto itself and with GaMMA itself, each in a virtual environment of its own: both pin packages
# that this project does not want. The environments lie outside of the repository and are made once.
#   scripts/associators.sh [FOLDER]       # default: ~/.cache/seismodel/associators
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-${SEISMODEL_ASSOCIATORS:-$HOME/.cache/seismodel/associators}}
make_env() {       # name, a module that must be there, packages
    local name=$1 module=$2; shift 2
    if "$folder/$name/bin/python" -c "import $module, pandas" 2>/dev/null; then return; fi
    python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install -q "$@"
}
make_env pyocto pyocto 'pyocto>=0.1.6' 'pandas<3' pyproj
make_env gamma gamma 'GMMA>=1.2.17' 'pandas<3' 'numba>=0.57'
SEISMODEL_ASSOCIATORS=$folder python -m pytest -q tests/test_associators.py
