# What follows is the same in every run's job. One life of a run: look at the nodes, start the ranks, pass a stop on to them, and come back
# if there is more to do. SLURM's signal before the time limit (USR1 to this shell) makes the run save; so does the file STOP in its folder.
set -u
say() { echo "$(date '+%F %T') $*"; }
on_node() { $VS_CONTAINER "$VS_PYTHON" "$@"; }
follow() {  # run in the background, so that signals are heard meanwhile; returns its exit code
  "$@" &
  local child=$!
  while kill -0 $child 2> /dev/null; do wait $child; done
  wait $child
}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}  # a task of an array by this name: its own number may stand for the whole array
life=${SLURM_RESTART_COUNT:-0}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + 2 * (SLURM_JOB_ID % 6000)))  # below the ports that systems give out
while (exec 3<> "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$((MASTER_PORT + 2)); done  # another job's
export VAR_SCALE_WORLD=$((VS_NODES * VS_TASKS)) VAR_SCALE_LOGS=$VS_RUN/log/$job.$life
mkdir -p "$VAR_SCALE_LOGS"
rm -f "$VS_RUN/STOP"  # of an earlier life
if [ -e "$VS_RUN/HOLD" ]; then say "stopped by study stop before it began"; exit 85; fi
printf "%s slots=$VS_TASKS\n" "${hosts[@]}" > "$VAR_SCALE_LOGS/hosts"
trap 'say "asked to stop: the run saves"; touch "$VS_RUN/STOP"' USR1 TERM
steps=(srun --nodes="$VS_NODES" --kill-on-bad-exit=1 --wait=60 --cpu-bind=none --export=ALL)
each_node=("${steps[@]}" --ntasks="$VS_NODES" --ntasks-per-node=1 --cpus-per-task=$((VS_TASKS * VS_CPUS)))
each_rank=("${steps[@]}" --ntasks="$VAR_SCALE_WORLD" --ntasks-per-node="$VS_TASKS" --cpus-per-task="$VS_CPUS")

again() {  # come back: $1 why, $2 nodes to leave out
  if [ "$life" -ge "$VS_REQUEUES" ]; then
    on_node -m var_scale.cluster.job fail "$VS_RUN" "$1; came back $life times, cluster.requeues allows no more"
    exit 1
  fi
  if [ "$(squeue -h -j "$job" -o %T)" != RUNNING ]; then say "$1; the job is being ended, it does not come back"; exit 85; fi
  say "$1; the job comes back${2:+ without $2}"
  trap '' TERM
  scontrol requeue "$job"
  [ -z "${2:-}" ] || scontrol update jobid="$job" excnodelist="$2"
  exit 85
}

say "job $job, life $life: $VS_RUN on ${hosts[*]}, $VAR_SCALE_WORLD ranks by $VS_LAUNCHER"
if [ ${#hosts[@]} != "$VS_NODES" ]; then
  on_node -m var_scale.cluster.job fail "$VS_RUN" "the job got ${#hosts[@]} nodes, the run needs $VS_NODES"
  exit 2
fi
on_node -m var_scale.cluster.job begin "$VS_RUN" "$job" || exit 2
if [ "$VS_CHECK" = 1 ]; then
  export VS_CHECK_PORT=$((MASTER_PORT + 1))
  each=("${each_rank[@]}" --kill-on-bad-exit=0 --wait=0 timeout 300)  # every rank is to say how far it came
  follow "${each[@]}" $VS_CONTAINER "$VS_PYTHON" -m var_scale.cluster.nodes check "$VAR_SCALE_LOGS" > "$VAR_SCALE_LOGS/check.log" 2>&1
  if [ $? != 0 ] && [ ! -e "$VS_RUN/STOP" ]; then
    grep '^error:' "$VAR_SCALE_LOGS/check.log"
    bad=$(on_node -m var_scale.cluster.nodes bad "$VAR_SCALE_LOGS" "${hosts[@]}")
    [ -z "$bad" ] || again "a node failed its check" "$bad"
    on_node -m var_scale.cluster.job fail "$VS_RUN" "the nodes ${hosts[*]} failed their check, see $VAR_SCALE_LOGS/check.log"
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
verdict=$(on_node -m var_scale.cluster.job end "$VS_RUN" $code "$VAR_SCALE_LOGS/launch.log")
say "ranks ended with code $code: $verdict"
case $verdict in
  complete) exit 0 ;;
  again*) again "${verdict#again: }" ;;
  held*) exit 85 ;;
  diverged*) exit 3 ;;
  *) exit 1 ;;
esac
