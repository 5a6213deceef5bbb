#!/usr/bin/env bash
# The main job: set up, then pretrain a tiny model on synthetic seismograms. Further arguments go to `seismodel pretrain`.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/seismodel pretrain --preset contrastive-tiny "$@"
