#!/usr/bin/env bash
# Run the tests with the lowest versions that settings.ini allows, on Python 3.11, and with the newest ones on Python 3.13.
# `scripts/versions.sh resolve` only asks which versions these are, in seconds; `lowest` and `newest` run one of the two. Further arguments go
# to pytest. Needs `uv`, which finds installed interpreters or downloads them; environments and lists of versions lie in build/versions, and take
# some ten gigabytes where PyTorch comes with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv > /dev/null || { echo "scripts/versions.sh needs uv: pip install uv" >&2; exit 2; }
what=${1:-both}
case $what in both|lowest|newest|resolve) shift $(( $# > 0 )) ;; *) echo "Say lowest, newest, both or resolve, and not $what." >&2; exit 2 ;; esac
mkdir -p build/versions

versions() { # name, Python, how to resolve
    uv pip compile -q pyproject.toml --extra dev --python-version "$2" --resolution "$3" --upgrade --no-annotate --no-header -o "build/versions/$1.txt"
    echo "$1, Python $2: $(grep -cve '^ *#' "build/versions/$1.txt") packages, with $(grep -E '^(torch|triton|numpy|seisbench|obspy|nbdev)==' "build/versions/$1.txt" | paste -sd' ')"
}

tests() { # name, Python, then arguments of pytest
    local python=build/versions/$1/bin/python
    { [ -x "$python" ] || uv venv -q --python "$2" "build/versions/$1"; } &&
        uv pip sync -q --python "$python" "build/versions/$1.txt" &&
        # a test builds a wheel by it
        uv pip install -q --python "$python" pip &&
        uv pip install -q --python "$python" --no-deps -e . &&
        PATH="$PWD/build/versions/$1/bin:$PATH" MPLBACKEND=agg "$python" -m pytest -q "${@:3}"
}

[ "$what" = newest ] || versions lowest 3.11 lowest-direct
[ "$what" = lowest ] || versions newest 3.13 highest
[ "$what" = resolve ] && exit
failed=0
[ "$what" = newest ] || tests lowest 3.11 "$@" || failed=1
[ "$what" = lowest ] || tests newest 3.13 "$@" || failed=1
exit $failed
