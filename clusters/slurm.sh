#!/bin/bash
# A search on a Slurm cluster: Ray is started on every node of the job and stopped with it. From the project's folder,
# on a file system that all nodes share, where `make setup` has run on a node like those:
#
#   sbatch clusters/slurm.sh --name lung --data chest-ctscan    any flags of `python -m lungct_tune.search`
#   tail -f lungct-JOB.log                                      what the search says
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

# Said in words, since Ray's default differs from command to command: the token is asked for. It is in the home, which
# the nodes share. Slots are listed in the dashboard's Train view. A busy file system may take its time with imports.
export RAY_AUTH_MODE=token RAY_TRAIN_ENABLE_STATE_TRACKING=1 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
ray get-auth-token --generate > /dev/null

# Slurm runs this script on the job's first node; an address, because many a node takes its own name for 127.0.1.1
read -r head _ < <(hostname -I)

# The same command on every node: Ray sees by the address which one is the head, and runs the search there. The search's
# exit status is kept apart: Ray 2.60 ends as failed on every node of several, since each loses the Ray that it talks to
# (the first at once, the others a minute after it).
status=lungct-$SLURM_JOB_ID.status
echo 1 > "$status"
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus="$SLURM_CPUS_PER_TASK" \
  -- bash -c 'python -m lungct_tune.search "${@:2}"; echo $? > "$1"' search "$status" "$@" || true
read -r ended < "$status"
rm "$status"
exit "$ended"
