#!/usr/bin/env bash
# One Ray node, in the foreground: the head on the first SLURM node, a worker elsewhere. train.sbatch starts it by srun.
#
# Why not `ray symmetric-run`: (1) it tells the head by comparing addresses, so it cannot do with nodes that share a
# host; (2) it ends with `ray stop`, which ends every Ray process of the user on that host, another job's included, and
# it refuses to start beside one; (3) where `ray start` fails it still exits with 0; (4) the driver is its child within
# the job step, so the signal that should make the driver save a checkpoint ends the Ray nodes at the same time.
set -uo pipefail

name=${SLURMD_NODENAME:-$(hostname)}
python=$FLAMINGO_VENV/bin/python
address=$FLAMINGO_HEAD_IP:$FLAMINGO_RAY_PORT
# Of this job and node alone, and short: Ray puts unix sockets below it, whose paths may have 107 characters.
temp=$FLAMINGO_RAY_TMP/ray-$SLURM_JOB_ID-$SLURM_NODEID

# Ray would run its workers at nice 15, so that any other process on the node stalled training.
export PATH=$FLAMINGO_VENV/bin:$PATH RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
# By default Ray answers TERM by draining the node for up to 30 s, through a head that got the same TERM and is gone.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

# Worker ports: 0 lets the system choose. Ray's fixed range would be fought over by nodes or jobs that share a host.
arguments=(--block --disable-usage-stats --log-color=false --temp-dir="$temp"
    --min-worker-port=0 --max-worker-port=0 --num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}")
[ -n "${SLURM_GPUS_ON_NODE:-}" ] && arguments+=(--num-gpus="$SLURM_GPUS_ON_NODE")
read -r -a extra <<<"${FLAMINGO_RAY_ARGS:-}"
arguments+=("${extra[@]}")

if [ "$SLURM_NODEID" -eq 0 ]; then
    arguments=(--head --node-ip-address="$FLAMINGO_HEAD_IP" --port="$FLAMINGO_RAY_PORT" --include-dashboard=false
        "${arguments[@]}")
else
    deadline=$((SECONDS + FLAMINGO_START_TIMEOUT))
    until (exec 3<>"/dev/tcp/$FLAMINGO_HEAD_IP/$FLAMINGO_RAY_PORT") 2>/dev/null; do
        if [ $SECONDS -ge $deadline ]; then
            echo "ray_node.sh: error: node $name cannot reach the Ray head at $address within $FLAMINGO_START_TIMEOUT s." \
                "If that is not the address by which nodes reach each other, set FLAMINGO_HEAD_IP" >&2
            exit 1
        fi
        sleep 1
    done
    arguments=(--address="$address" "${arguments[@]}")
fi

descendants() {
    local child
    for child in $(ps -o pid= --ppid "$1"); do
        echo "$child"
        descendants "$child"
    done
}

end_descendants() {
    # shellcheck disable=SC2046
    kill -KILL $(descendants $$) 2>/dev/null
}

mkdir -p "$temp"
stopping=
trap 'stopping=yes; kill -TERM "$ray" 2>/dev/null' TERM INT

# Ray gives its own parts half a minute to start, which a cold network file system or a busy machine may exceed; the
# next attempt finds the files in memory.
for attempt in 1 2 3 4 5; do
    # What `ray start` says is worth reading only when it fails; on a hundred nodes it would bury the training log.
    "$python" -m ray.scripts.scripts start "${arguments[@]}" >"$temp/start.log" 2>&1 &
    ray=$!
    while [ -z "$stopping" ] && kill -0 "$ray" 2>/dev/null; do wait "$ray"; done
    if [ -n "$stopping" ]; then
        # `ray start` that is caught by TERM while still starting may wait for a head that is gone.
        for _ in $(seq 30); do
            kill -0 "$ray" 2>/dev/null || break
            sleep 0.5
        done
        end_descendants
        rm -rf "$temp"
        exit 0
    fi
    wait "$ray"
    code=$?
    end_descendants
    if grep -q "Ray runtime started" "$temp/start.log"; then break; fi
    echo "ray_node.sh: Ray did not start on node $name (attempt $attempt of 5): $(tail -n 1 "$temp/start.log")" >&2
    [ $SECONDS -lt "$FLAMINGO_START_TIMEOUT" ] || break
    sleep 2
done

tail -n 20 "$temp/start.log" >&2
echo "ray_node.sh: error: Ray ended on node $name with exit code $code; its logs are in $temp/session_latest/logs there" >&2
exit $((code == 0 ? 1 : code))
