#!/usr/bin/env bash
# Run the tests as other processors would, with vectors of three widths and 1, 2 and 4 threads. Arguments go to pytest:
#   scripts/other_processors.sh tests/test_notebooks.py -k 'picking or peers'
# CAPABILITIES="default avx2" and THREADS="1 4" choose among them. What this machine cannot do is said and left out.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=agg
# threads that wait leave their core to others: more of them than cores would take ten times as long
export OMP_WAIT_POLICY=passive
unset ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA MKL_ENABLE_INSTRUCTIONS OPENBLAS_CORETYPE NPY_DISABLE_CPU_FEATURES
best=$(python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')
# features of NumPy that a processor without AVX2 (default) or without AVX-512 (avx2) would lack
features() {
    python - "$1" <<'PY'
import sys
import numpy as np
found = np.show_config(mode='dicts')['SIMD Extensions'].get('found', [])
wide = [name for name in found if name.startswith('AVX512') or name == 'X86_V4']
print(*{'default': found, 'avx2': wide, 'avx512': []}[sys.argv[1]])
PY
}
logs=$(mktemp -d)
failed=0
for capability in ${CAPABILITIES:-default avx2 avx512}; do
    case $capability in
        default) isa=SSE41 mkl=SSE4_2 blas=Prescott able='DEFAULT AVX2 AVX512' ;;
        avx2) isa=AVX2 mkl=AVX2 blas=Haswell able='AVX2 AVX512' ;;
        avx512) isa=AVX512_CORE mkl=AVX512 blas=SkylakeX able='AVX512' ;;
        *) echo "There is no capability '$capability'; choose among default, avx2 and avx512." >&2; exit 2 ;;
    esac
    if [[ " $able " != *" $best "* ]]; then
        echo "$capability: left out, this machine has $best"
        continue
    fi
    without=$(features "$capability")
    for threads in ${THREADS:-1 2 4}; do
        log=$logs/$capability-$threads.txt
        code=0
        ATEN_CPU_CAPABILITY=$capability ONEDNN_MAX_CPU_ISA=$isa MKL_ENABLE_INSTRUCTIONS=$mkl OPENBLAS_CORETYPE=$blas \
            NPY_DISABLE_CPU_FEATURES=$without OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads OPENBLAS_NUM_THREADS=$threads \
            python -m pytest -q "$@" > "$log" 2>&1 || code=$?
        echo "$capability, $threads threads: $(tail -n 1 "$log")"
        if [ $code -ne 0 ]; then
            failed=1
            grep -E '^(FAILED|ERROR)' "$log" || true
            echo "  all of it: $log"
        fi
    done
done
exit $failed
