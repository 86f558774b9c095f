#!/usr/bin/env bash
# Trains under SLURM:  sbatch [sbatch's options] slurm.sh [RECIPE] [further flags of main.py]
# As run_code.sh, with the same variables; for finetune.sh:  sbatch slurm.sh finetune CHECKPOINT RECIPE [further flags]
#
# One task for each GPU. Two minutes before its time is over, and when it is preempted, the job writes a checkpoint,
# and it starts again by itself and goes on. Adapt the lines below, or override them: on nodes of 4 GPUs,
# sbatch --gpus-per-node=4 --ntasks-per-node=4 slurm.sh RECIPE
#SBATCH --job-name=dhvt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
set -eo pipefail
if [ -z "$SLURM_JOB_ID" ]; then
    . "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh" # which answers --help
    echo 'error: this is a job for SLURM: sbatch slurm.sh [RECIPE] [further flags]' >&2
    exit 2
fi
root=${SLURM_SUBMIT_DIR:-$PWD} # SLURM runs a copy of this file
script=run_code.sh
if [ "$1" = finetune ]; then
    script=finetune.sh
    shift
fi
if [ ! -f "$root/$script" ]; then
    echo "error: $root has no $script: submit this from the folder that holds it" >&2
    exit 1
fi
export LAUNCHER=srun NNODES=${SLURM_JOB_NUM_NODES:-1} NPROC=${NPROC:-${SLURM_NTASKS_PER_NODE:-1}}
# Processes that share a machine share its cores, which SLURM deals out.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
bash "$root/$script" "$@"
