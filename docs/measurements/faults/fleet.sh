#!/bin/bash
# A fleet on one machine: N simulated engines of about 15 lines a second each, a worker for each, a broker, an aggregator, and a
# job of LINES lines; with KILL=1 ten workers and five engines are killed after 15 s, the broker after 30 s and started again 5 s
# later, the aggregator after a minute and started again. Prints the end of the job, processor time and memory by role, and
# whether every line was answered once and in order.
#
#   MILLRACE=bin/millrace [N=50] [LINES=60000] [KILL=1] docs/measurements/faults/fleet.sh
set -u
M=$(realpath "${MILLRACE:-bin/millrace}") N=${N:-50} LINES=${LINES:-60000} D=$(mktemp -d)
export MILLRACE_DATA=$D/data NATS_URL=nats://127.0.0.1:${PORT:-24222}
ulimit -n 65536 2>/dev/null || true
declare -A pids
role() { # NAME COMMAND…: starts it
	local name=$1; shift
	"$@" >> "$D/$name.log" 2>&1 &
	pids[$name]=$!
}
kill_() { kill -9 "${pids[$1]}"; wait "${pids[$1]}" 2>/dev/null; } # its figures go with it
broker() { role broker "$M" broker --addr "127.0.0.1:${PORT:-24222}"; }
aggregate() { (cd "$D" && exec "$M" aggregate) >> "$D/aggregator.log" 2>&1 & pids[aggregator]=$!; }
engine() { echo "http://127.0.0.1:$((25000 + $1))"; }
trap 'kill "${pids[@]}" 2>/dev/null; wait; rm -rf "$D"' EXIT

broker
for i in $(seq "$N"); do
	role "sim$i" "$M" sim --addr "127.0.0.1:$((25000 + i))" --model m --step-time 200ms --decode-time 0us --prefill-time 0us --max-num-seqs 64 --output-min 10 --output-max 30 --seed "$i"
done
until "$M" doctor > /dev/null 2>&1; do read -rt 0.2 <> <(:) || true; done
aggregate
for i in $(seq "$N"); do MILLRACE_DATA=$D/w$i role "worker$i" "$M" worker --engine "$(engine "$i")"; done
for ((i = 0; i < LINES; i++)); do
	printf '{"custom_id":"r%d","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":"line %d"}],"max_tokens":30}}\n' "$i" "$i"
done > "$D/in.jsonl"
"$M" produce "$D/in.jsonl" > "$D/produce.log" 2>&1 &
job=$!
if [ -n "${KILL:-}" ]; then
	sleep 15
	for i in $(seq 10); do kill_ "worker$i"; done
	for i in $(seq $((N - 4)) "$N"); do kill_ "sim$i"; done
	sleep 15; kill_ broker; sleep 5; broker
	sleep 25; kill_ aggregator; aggregate
fi
wait "$job"; echo "produce: exit code $?"
grep -A4 VALID "$D/produce.log"
grep "not counted above" "$D/produce.log"
for name in "${!pids[@]}"; do
	awk -v role="${name%%[0-9]*}" -v hz="$(getconf CLK_TCK)" '{ sub(/.*\) /, ""); print role, ($12 + $13) / hz, $22 / 256 }' "/proc/${pids[$name]}/stat" 2>/dev/null
done | awk '{ n[$1]++; cpu[$1] += $2; mem[$1] += $3 } END { for (r in n) printf "%-10s %3d: %6.1f s of processor time, %5.0f MB\n", r, n[r], cpu[r], mem[r] }'
out=$(sed -n 's/^output *//p' "$D/produce.log")
sed -E 's/.*"custom_id":"(r[0-9]+)".*/\1/' "$out" | cmp - <(for ((i = 0; i < LINES; i++)); do echo "r$i"; done) && echo "$LINES lines, each once and in order"
