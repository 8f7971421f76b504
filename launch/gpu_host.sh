#!/usr/bin/env bash
# Train on all GPUs of this machine, in one process; the same command resumes.
#   launch/gpu_host.sh CONFIG WORKDIR [--config.key=value ...]
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?a config, e.g. configs/t2v_base.py} workdir=${2:?a workdir}
# Without a GPU, or without its CUDA part, JAX would train on the CPU and not warn.
nvidia-smi -L || { echo "gpu_host.sh: nvidia-smi finds no GPU here" >&2; exit 1; }
export JAX_PLATFORMS=cuda,cpu
exec launch/again.sh python3 -m vdx.main --config="$config" --workdir="$workdir" "${@:3}"
