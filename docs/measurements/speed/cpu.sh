#!/usr/bin/env bash
# cpu.sh JOB RECORD C…: CPU time per request of a worker process and of a bare Go client, in turn, each C in flight at the
# engine that runs at $ENGINE. $MILLRACE and $BENCH are the programs (bin/millrace, bin/millrace-bench).
set -u
job=$1 record=$2; shift 2
mr=${MILLRACE:-bin/millrace} bench=${BENCH:-bin/millrace-bench} hz=$(getconf CLK_TCK)
used() { awk -v hz="$hz" '{sub(/.*\) /, ""); printf "%.3f", ($12 + $13) / hz}' "/proc/$1/stat"; }
for c in "$@"; do
	"$bench" bare -engine "$ENGINE" -c "$c" "$job" | tee -a "$record"
	dir=$(mktemp -d)
	"$mr" serve --addr 127.0.0.1:4333 --data "$dir/b" --output "$dir/out" > "$dir/serve.log" 2>&1 & serve=$!
	"$mr" worker --engine "$ENGINE" --concurrency "$c" --nats nats://127.0.0.1:4333 --data "$dir/w" > "$dir/worker.log" 2>&1 & worker=$!
	until grep -q "engine is ready" "$dir/worker.log"; do kill -0 $worker || break; sleep 0.1; done
	start=$(used $worker) begin=$(date +%s.%N)
	timeout 500 "$mr" produce "$job" --nats nats://127.0.0.1:4333 --data "$dir/p" > "$dir/produce.log" 2>&1 || tail -3 "$dir/produce.log"
	cpu=$(used $worker) end=$(date +%s.%N)
	awk -v c="$c" -v cpu="$cpu" -v start="$start" -v n="$(wc -l < "$job")" -v w="$begin $end" 'BEGIN {split(w, t, " ");
		printf "{\"how\":\"worker\",\"c\":%d,\"lines\":%d,\"wall_s\":%.2f,\"cpu_ms_per_request\":%.3f}\n", c, n, t[2] - t[1], 1000 * (cpu - start) / n}' | tee -a "$record"
	kill -TERM $worker $serve; wait $worker $serve
	rm -rf "$dir"
done
