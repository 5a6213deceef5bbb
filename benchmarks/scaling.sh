#!/usr/bin/env bash
# Pretraining on 1, 2, 4, 8 … GPUs of this machine, as far as it has them: `bash benchmarks/scaling.sh OUT [PART…]`.
# Parts: speed, store, profile (these have the machine for themselves), losses, resume, faults (side by side); all of them if none is named.
# OUT gets scaling_*.csv and scaling_machine.json, which belong into nbs/runs/, row by row as they are found; the tables are printed last.
# STORE=FOLDER is a packed store, which the part `store` needs. RANKS="4 8" takes these counts alone; a later call adds its counts to the table
# of speed. LIMIT=540 ends everything after so many seconds. PYTHON names the interpreter. No part leaves a process behind.
# Without a GPU, to see that everything runs: `SMALL=1 bash benchmarks/scaling.sh OUT` (tiny models, 1 and 2 ranks over Gloo).
set -euo pipefail
cd "$(dirname "$0")/.."
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1     # no NVLink multicast
export OMP_NUM_THREADS=1 MPLBACKEND=agg PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/scaling.py "$@" ${SMALL:+--small}
