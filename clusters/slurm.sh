#!/bin/bash
# A search on a Slurm cluster: Ray is started on every node of the job and stopped with it. From the project's folder,
# on a file system that all nodes share, where `make setup` has run on a node like those:
#
#   sbatch clusters/slurm.sh --name lung --data chest-ctscan    any flags of `python -m lungct_tune.search`
#   tail -f lungct-JOB.log                                      the output of the search
#   sbatch clusters/slurm.sh --resume lung                      after the time limit, a lost node, or scancel
#
# The dashboard: ssh -L 8265:localhost:8265 FIRST-NODE, then open http://localhost:8265; `ray get-auth-token` prints
# the token that it asks for. Change the lines that begin with #SBATCH to what your cluster has.

#SBATCH --job-name=lungct
#SBATCH --output=lungct-%j.log
#SBATCH --time=04:00:00
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
# (exclusive and one task, because a node has one Ray, with its ports and its /tmp/ray)

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
. .venv/bin/activate

# RAY_AUTH_MODE: every connection needs the token, which is in the home that the nodes share; the default differs
# between Ray's commands. The second lists slots in the dashboard's Train view. The third is for slow imports on a busy
# file system.
export RAY_AUTH_MODE=token RAY_TRAIN_ENABLE_STATE_TRACKING=1 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
export RAY_USAGE_STATS_ENABLED=0
ray get-auth-token --generate > /dev/null

# Slurm runs this script on the job's first node. An address, because on many nodes the own name is 127.0.1.1
read -r head _ < <(hostname -I)

# The same command on every node: Ray finds the head by the address, and runs the search there. The search's exit
# status goes to a file, because Ray 2.60 itself ends as failed on every node if there are several: each loses its
# connection to the stopped Ray (the first node at once, the others a minute later).
status=lungct-$SLURM_JOB_ID.status
echo 1 > "$status"
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus="$SLURM_CPUS_PER_TASK" \
  -- bash -c 'python -m lungct_tune.search "${@:2}"; echo $? > "$1"' search "$status" "$@" || true
read -r ended < "$status"
rm "$status"
exit "$ended"
