#!/bin/bash
# The command of a job's step: all ranks of this node (deepspeed, torchrun), one rank (srun), or
# from the first node all of them (pdsh, slurm). A USR1 would end the launchers without telling
# their ranks, which learn of a stop by the file STOP, and receive SLURM's SIGTERM themselves.
set -u
trap '' USR1
worker=(--module var_scale.train.worker "$VS_RUN")
deepspeed=(-m deepspeed.launcher.runner --hostfile "$VAR_SCALE_LOGS/hosts"
           --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --no_local_rank)
case $VS_LAUNCHER in
  deepspeed)
    exec $VS_CONTAINER "$VS_PYTHON" "${deepspeed[@]}" --no_ssh --node_rank "$SLURM_NODEID" \
      "${worker[@]}" ;;
  torchrun)
    exec $VS_CONTAINER "$VS_PYTHON" -m torch.distributed.run --nnodes "$VS_NODES" \
      --node-rank "$SLURM_NODEID" --nproc-per-node "$VS_TASKS" --master-addr "$MASTER_ADDR" \
      --master-port "$MASTER_PORT" --max-restarts 0 "${worker[@]}" ;;
  srun)
    exec $VS_CONTAINER "$VS_PYTHON" -m var_scale.train.worker "$VS_RUN" ;;
  pdsh)  # over ssh only these variables reach the ranks
    export DS_ENV_FILE=$VAR_SCALE_LOGS/environment
    passed="PATH|LD_LIBRARY_PATH|PYTHON[A-Z]*|OMP_NUM_THREADS|DS_ACCELERATOR"
    passed="$passed|VAR_SCALE_[A-Z_]*|NCCL_[A-Z_]*|${VS_ENV// /|}"
    env | grep -E "^($passed)=" > "$DS_ENV_FILE"
    exec $VS_CONTAINER "$VS_PYTHON" "${deepspeed[@]}" --launcher pdsh --no_ssh_check --force_multi \
      "${worker[@]}" ;;
  slurm)  # this launcher starts a file, not a module
    find='import importlib.util as u; print(u.find_spec("var_scale.train.worker").origin)'
    file=$("$VS_PYTHON" -c "$find")
    each="--nodes=$VS_NODES --ntasks-per-node=$VS_TASKS --cpus-per-task=$VS_CPUS"
    exec $VS_CONTAINER "$VS_PYTHON" "${deepspeed[@]}" --launcher slurm --no_ssh_check \
      --force_multi --launcher_args "$each --kill-on-bad-exit=1 --cpu-bind=none" \
      "$file" "$VS_RUN" ;;
  *)
    echo "error: cluster.launcher $VS_LAUNCHER is unknown" >&2
    exit 2 ;;
esac
