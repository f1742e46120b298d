#!/bin/bash
# LSUN at 256x256 on 4 nodes of 8 GPUs: sbatch examples/slurm.sh --preset lsun256 --data /shared/church.fdpack
#
# Options after the script are those of fastddpm.train. One torchrun a node starts 8 processes; each trains its part of
# every batch. Two minutes before the time limit, or when the job is preempted, SLURM's SIGTERM makes the run save and
# stop, and the job goes back into the queue; started again, the same script resumes. A process that dies is replaced
# at once, with all others, from the last checkpoint (--max-restarts).
#
#SBATCH --job-name=fastddpm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

OUT=${OUT:-$SLURM_SUBMIT_DIR/runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}   # on a disk that all nodes see
PROCESSES=${PROCESSES:-8}                                          # on each node
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

RESUME=()
if [ -e "$OUT/config.json" ]; then RESUME=(--resume); fi

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCESSES" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$MASTER:29500" \
    -m fastddpm.train --out "$OUT" "$@" "${RESUME[@]}"
code=$?

# 143: saved and stopped by SIGTERM; 75: a process was lost more often than --max-restarts allows. torchrun itself says 1.
if [ "$code" -ne 0 ] && [ -n "$(ls -d "$OUT"/checkpoints/step-* 2>/dev/null)" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]
then
    echo "stopped with exit code $code; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
