#!/bin/bash
# What a job's step runs: all ranks of this node (deepspeed, torchrun), one rank (srun), or from the first node all of them (pdsh, slurm).
# The launchers end at a USR1 without a word to their ranks; the ranks learn of a stop by the file STOP, and hear SLURM's SIGTERM themselves.
set -u
trap '' USR1
worker=(--module var_scale.train.worker "$VS_RUN")
deepspeed=(-m deepspeed.launcher.runner --hostfile "$VAR_SCALE_LOGS/hosts" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
           --no_local_rank)
case $VS_LAUNCHER in
  deepspeed)
    exec $VS_CONTAINER "$VS_PYTHON" "${deepspeed[@]}" --no_ssh --node_rank "$SLURM_NODEID" "${worker[@]}" ;;
  torchrun)
    exec $VS_CONTAINER "$VS_PYTHON" -m torch.distributed.run --nnodes "$VS_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$VS_TASKS" \
      --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 "${worker[@]}" ;;
  srun)
    exec $VS_CONTAINER "$VS_PYTHON" -m var_scale.train.worker "$VS_RUN" ;;
  pdsh)  # over ssh only these variables travel
    export DS_ENV_FILE=$VAR_SCALE_LOGS/environment
    env | grep -E "^(PATH|LD_LIBRARY_PATH|PYTHONPATH|OMP_NUM_THREADS|DS_ACCELERATOR|VAR_SCALE_[A-Z_]*|NCCL_[A-Z_]*|${VS_ENV// /|})=" \
      > "$DS_ENV_FILE"
    exec $VS_CONTAINER "$VS_PYTHON" "${deepspeed[@]}" --launcher pdsh --no_ssh_check --force_multi "${worker[@]}" ;;
  slurm)  # it starts a file, not a module
    file=$("$VS_PYTHON" -c 'import importlib.util as u; print(u.find_spec("var_scale.train.worker").origin)')
    exec $VS_CONTAINER "$VS_PYTHON" "${deepspeed[@]}" --launcher slurm --no_ssh_check --force_multi \
      --launcher_args "--nodes=$VS_NODES --ntasks-per-node=$VS_TASKS --cpus-per-task=$VS_CPUS --kill-on-bad-exit=1 --cpu-bind=none" \
      "$file" "$VS_RUN" ;;
  *)
    echo "error: cluster.launcher $VS_LAUNCHER is not known" >&2
    exit 2 ;;
esac
