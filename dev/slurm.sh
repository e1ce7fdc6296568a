#!/usr/bin/env bash
# speedrun.sh on several nodes of a SLURM cluster, one task a node, which starts a rank a GPU.
#
#     sbatch --nodes=4 dev/slurm.sh                            # from the project's folder, on a disk that all nodes see
#     sbatch --nodes=4 --partition=gpu --gres=gpu:8 dev/slurm.sh --dry-run
#     SPEEDRUN_PROFILE=d32 sbatch --nodes=4 dev/slurm.sh       # settings: those of speedrun.sh
#
# Node 0 is the first of the job's nodes. Node failures: without --no-kill SLURM ends the whole job; the next sbatch goes
# on from the last checkpoint. `scancel` and the end of the time limit let the ranks save first: SLURM sends SIGTERM five
# minutes before the limit (--signal), and a run that was requeued goes on.
#
#SBATCH --job-name=nanochat
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=nanochat-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch; on one machine: bash speedrun.sh}"

NNODES=$SLURM_JOB_NUM_NODES
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # whole: a pipe to head may end scontrol, and with it this script
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # two jobs may share a node
export NNODES MASTER_ADDR MASTER_PORT

# The set-up of the environment once, where its disk is shared; a second look at what is there takes a moment.
bash dev/setup.sh
# --kill-on-bad-exit=0: where a node fails, the others wait for it, or end by themselves
# shellcheck disable=SC2016 # SLURM_NODEID is that of the task
srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec bash speedrun.sh "$@"' speedrun "$@"
