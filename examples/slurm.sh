#!/bin/bash
# A run on several nodes under Slurm, which goes on by itself when its time is over:
#
#   sbatch --nodes 4 examples/slurm.sh --config configs/qwen2.5_math.yaml --distributed.replicas 4
#
# Start it in the checkout, on a file system that all nodes share: output_dir and the models are
# looked for from there. Ahead of the time limit the run saves a checkpoint and ends, and the job is
# put back into the queue.

#SBATCH --job-name=codistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# The 900 seconds above and the timeout below must hold a step and a checkpoint.
readonly GPUS=8 SECONDS_TO_SAVE=850 PORT=29500

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
is_stopped=false

# Slurm sends USR1 to this shell (B: in --signal). srun passes it on to torchrun on each node, and
# torchrun to the processes.
stop() {
  is_stopped=true
  kill -USR1 "$run"
}
trap stop USR1

# Without --kill-on-bad-exit=0 the first node to end could end the others before they have saved. A
# job that was put back has the same id, and must not meet at the rendezvous of its earlier starts.
srun --kill-on-bad-exit=0 --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "$first_node:$PORT" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --shutdown-timeout "$SECONDS_TO_SAVE" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
  train.py "$@" &
run=$!

wait "$run"
code=$?
if "$is_stopped"; then # the signal has ended the first wait, not the run
  wait "$run"
  code=$?
  if [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
