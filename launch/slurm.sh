#!/usr/bin/env bash
#SBATCH --job-name=vdx
#SBATCH --output=vdx-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
# Train on GPUs under Slurm, one task a GPU; goes back into the queue by itself and resumes there.
#   sbatch --nodes=4 launch/slurm.sh CONFIG WORKDIR [--config.key=value ...]
# From the repository's root, with the environment active; options of sbatch replace those above.
# 120 s before the time limit the tasks save and end with 42. After 42 and 75 the job is requeued,
# at most RESTARTS times (20).
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0"; exit 0; }
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a job: sbatch launch/slurm.sh CONFIG WORKDIR}"
config=${1:?a config, e.g. configs/t2v_base.py} workdir=${2:?a workdir that every node can write}
# JAX uses the GPU of its task's number on the node, so each task must see all of them: no
# --gpus-per-task. srun does not inherit the number of cores from sbatch.
export JAX_PLATFORMS=cuda,cpu SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Without RESTARTS again.sh only turns deaths by signal into 75. A task that has saved first must
# not end the others, which are saving.
RESTARTS=0 launch/again.sh srun --kill-on-bad-exit=0 python3 -m vdx.main --config="$config" \
  --workdir="$workdir" --distributed "${@:3}"
code=$?
# Not reached after scancel: Slurm ends this shell with the tasks.
if ((code == 42 || code == 75)) && ((${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-20})); then
  echo "slurm.sh: exit code $code, back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
