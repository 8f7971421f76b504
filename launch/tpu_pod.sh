#!/usr/bin/env bash
# Train on every host of a Cloud TPU slice; the same command resumes.
#   TPU=name ZONE=zone launch/tpu_pod.sh configs/t2v_base.py /mnt/runs/base [--config.key=value ...]
# Makes the slice first if ACCELERATOR (e.g. v5litepod-64) and VERSION (a TPU VM image) are set.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?the name of the TPU slice}" "${ZONE:?its zone}"
config=${1:?a config, e.g. configs/t2v_base.py}
workdir=${2:?a workdir that every host can write, e.g. a mounted bucket: /mnt/runs/base}

if [[ -n "${ACCELERATOR:-}" ]]; then
  gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
    --version="${VERSION:?a TPU VM image, e.g. v2-alpha-tpuv5-lite}"
fi
everywhere() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

archive=$(mktemp --suffix=.tar)
git archive --prefix=vdx/ -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU":vdx.tar --zone="$ZONE" --worker=all
everywhere "tar xf vdx.tar && pip install -q -e 'vdx[tpu]'"
everywhere "cd vdx && python3 -m vdx.main --config=$config --workdir=$workdir --distributed ${*:3}"
