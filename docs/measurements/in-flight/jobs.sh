#!/bin/bash
# Does an engine run empty between jobs? LINES lines as one job, and as JOBS jobs that wait at the same time, each on a broker
# and a simulated engine of its own (128 sequences at once, 30 ms a step, outputs of 50 to 150 tokens). Prints for each the time
# from the first request to the last result, and the time-weighted mean of what ran, by one look each half second.
#
#   MILLRACE=bin/millrace [LINES=3000] [JOBS=6] docs/measurements/in-flight/jobs.sh
set -u
M=$(realpath "${MILLRACE:-bin/millrace}") LINES=${LINES:-3000} JOBS=${JOBS:-6} PORT=${PORT:-24322}
once() { # JOBS
	local D pids=() jobs=() n=$((LINES / $1)) i
	D=$(mktemp -d)
	export MILLRACE_DATA=$D/data NATS_URL=nats://127.0.0.1:$PORT
	"$M" sim --addr "127.0.0.1:$((PORT + 1))" --model m --step-time 30ms --decode-time 0us --prefill-time 0us --max-num-seqs 128 --output-min 50 --output-max 150 --seed 1 > "$D/sim.log" 2>&1 & pids+=($!)
	"$M" broker --addr "127.0.0.1:$PORT" > "$D/broker.log" 2>&1 & pids+=($!)
	until "$M" doctor > /dev/null 2>&1; do read -rt 0.2 <> <(:) || true; done
	"$M" aggregate --output "$D/out" > "$D/aggregator.log" 2>&1 & pids+=($!)
	for ((i = 0; i < LINES; i++)); do
		printf '{"custom_id":"r%d","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":"line %d"}],"max_tokens":150}}\n' "$i" "$i"
	done | split -l "$n" -d - "$D/in."
	for f in "$D"/in.*; do
		mv "$f" "$f.jsonl"
		MILLRACE_DATA=$D/p${f##*.} "$M" produce "$f.jsonl" > "$f.log" 2>&1 & jobs+=($!)
	done
	until [ "$("$M" jobs --json | grep -o '"state": *"running"' | wc -l)" -ge "${#jobs[@]}" ]; do read -rt 0.2 <> <(:) || true; done
	python3 -S - "$((PORT + 1))" > "$D/running" <<-'P' & pids+=($!)
		import re, sys, time, urllib.request
		while True:
		    t = urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics", timeout=5).read().decode()
		    print(time.time(), re.search(r"(?m)^vllm:num_requests_running\S* ([0-9.]+)$", t)[1], flush=True)
		    time.sleep(0.5)
	P
	"$M" worker --engine "http://127.0.0.1:$((PORT + 1))" > "$D/worker.log" 2>&1 & pids+=($!)
	wait "${jobs[@]}"
	"$M" jobs --json > "$D/jobs.json"
	python3 -S - "$D" "$1" <<-'P'
		import glob, json, sys
		d, jobs = sys.argv[1:]
		looks = [[float(x) for x in l.split()] for l in open(d + "/running")]
		busy = [i for i, (_, n) in enumerate(looks) if n > 0]
		full = [i for i in busy if looks[i][1] >= 0.9 * 128]
		a, b = full[0], full[-1]
		mean = sum((y[0] - x[0]) * x[1] for x, y in zip(looks[a:b], looks[a + 1:b + 1])) / (looks[b][0] - looks[a][0])
		ms = [json.load(open(m))["statistics"] for m in glob.glob(d + "/out/*/manifest.json")]
		print(f"{jobs} jobs: {sum(s['completed'] for s in ms)} lines, {looks[busy[-1]][0] - looks[busy[0]][0]:.1f} s, {mean:.1f} of 128 run over {looks[b][0] - looks[a][0]:.0f} s, fewest {min(n for _, n in looks[a:b]):.0f}")
	P
	kill "${pids[@]}"
	wait "${pids[@]}" 2> /dev/null
	rm -rf "$D"
}
once 1
once "$JOBS"
