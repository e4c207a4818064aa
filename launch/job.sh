# The following is the same in the job of every run. One attempt checks the nodes, starts the ranks,
# passes a stop on to them, and requeues the job if work remains. SLURM's signal before the time
# limit (USR1 to this shell) makes the run save, and so does the file STOP in its folder.
set -u
say() { echo "$(date '+%F %T') $*"; }
on_node() { $VS_CONTAINER "$VS_PYTHON" "$@"; }
fail() { on_node -m var_scale.jobs.job fail "$VS_RUN" "$@"; }
follow() {  # runs in the background, so that signals arrive meanwhile; returns the exit code
  "$@" &
  local child=$!
  while kill -0 $child 2> /dev/null; do wait $child; done
  wait $child
}
# A task of an array is identified this way: its own number may be that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
attempt=${SLURM_RESTART_COUNT:-0}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The port is below those that systems assign, and no other job listens on it.
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + 2 * (SLURM_JOB_ID % 6000)))
while (exec 3<> "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do
  MASTER_PORT=$((MASTER_PORT + 2))
done
export VAR_SCALE_WORLD=$((VS_NODES * VS_TASKS)) VAR_SCALE_LOGS=$VS_RUN/log/$job.$attempt
mkdir -p "$VAR_SCALE_LOGS"
rm -f "$VS_RUN/STOP"  # left by an earlier attempt
if [ -e "$VS_RUN/HOLD" ]; then say "stopped by study stop before it began"; exit 85; fi
printf "%s slots=$VS_TASKS\n" "${hosts[@]}" > "$VAR_SCALE_LOGS/hosts"
trap 'say "asked to stop: the run saves"; touch "$VS_RUN/STOP"' USR1 TERM
steps=(srun --nodes="$VS_NODES" --kill-on-bad-exit=1 --wait=60 --cpu-bind=none --export=ALL)
each_node=("${steps[@]}" --ntasks="$VS_NODES" --ntasks-per-node=1
           --cpus-per-task=$((VS_TASKS * VS_CPUS)))
each_rank=("${steps[@]}" --ntasks="$VAR_SCALE_WORLD" --ntasks-per-node="$VS_TASKS"
           --cpus-per-task="$VS_CPUS")

again() {  # requeue the job: $1 the reason, $2 nodes to leave out
  if [ "$attempt" -ge "$VS_REQUEUES" ]; then
    fail requeues-exhausted "$1; cluster.requeues allows no more than $attempt requeues"
    exit 1
  fi
  if [ "$(squeue -h -j "$job" -o %T)" != RUNNING ]; then
    say "$1; the job is being ended, it does not come back"
    exit 85
  fi
  say "$1; the job comes back${2:+ without $2}"
  trap '' TERM
  scontrol requeue "$job"
  [ -z "${2:-}" ] || scontrol update jobid="$job" excnodelist="$2"
  exit 85
}

say "job $job, attempt $attempt: $VS_RUN on ${hosts[*]}, $VAR_SCALE_WORLD ranks by $VS_LAUNCHER"
if [ ${#hosts[@]} != "$VS_NODES" ]; then
  fail nodes-differ "the job got ${#hosts[@]} nodes, the run needs $VS_NODES"
  exit 2
fi
on_node -m var_scale.jobs.job begin "$VS_RUN" "$job" || exit 2
if [ "$VS_CHECK" = 1 ]; then
  export VS_CHECK_PORT=$((MASTER_PORT + 1))
  # A rank that fails does not end the others: each reports how far it came.
  each=("${each_rank[@]}" --kill-on-bad-exit=0 --wait=0 timeout 300)
  follow "${each[@]}" $VS_CONTAINER "$VS_PYTHON" -m var_scale.jobs.nodes check "$VAR_SCALE_LOGS" \
    > "$VAR_SCALE_LOGS/check.log" 2>&1
  if [ $? != 0 ] && [ ! -e "$VS_RUN/STOP" ]; then
    grep '^error:' "$VAR_SCALE_LOGS/check.log"
    bad=$(on_node -m var_scale.jobs.nodes bad "$VAR_SCALE_LOGS" "${hosts[@]}")
    [ -z "$bad" ] || again "a node failed its check" "$bad"
    fail setup-failed "the nodes ${hosts[*]} failed their check, see $VAR_SCALE_LOGS/check.log"
    exit 1
  fi
fi

tail --follow=name --retry --quiet "$VAR_SCALE_LOGS/rank-0.log" 2> /dev/null &
tail=$!
case $VS_LAUNCHER in
  srun) follow "${each_rank[@]}" bash "$VS_LAUNCH/node.sh" ;;
  pdsh | slurm) follow bash "$VS_LAUNCH/node.sh" ;;
  *) follow "${each_node[@]}" bash "$VS_LAUNCH/node.sh" ;;
esac > >(tee -a "$VAR_SCALE_LOGS/launch.log") 2>&1
code=$?
sleep 1
kill $tail
verdict=$(on_node -m var_scale.jobs.job end "$VS_RUN" $code "$VAR_SCALE_LOGS/launch.log")
say "ranks ended with code $code: $verdict"
case $verdict in
  complete) exit 0 ;;
  again*) again "${verdict#again: }" ;;
  held*) exit 85 ;;
  diverged*) exit 3 ;;
  *) exit 1 ;;
esac
