#!/usr/bin/env bash
# case.sh JOB RECORD auto|N [flags of millrace run]: one job on the engine that runs at $ENGINE; appends to RECORD.
# Its looks, one a second, go to LABEL.csv beside RECORD. $LABEL is its name (JOB-N), $MILLRACE the program (millrace), $METRICS a free
# HOST:PORT (127.0.0.1:9109), $CARD the name of the card, $LIMIT the seconds that it may take (500).
set -u
job=$1 record=$2 n=$3; shift 3
metrics=${METRICS:-127.0.0.1:9109} label=${LABEL:-$(basename "$job" .jsonl)-$n}
looks=$(dirname "$record")/$label.csv
state=$(mktemp -d)
: > "$looks"
python3 -S "$(dirname "$0")/poll.py" "$looks" "$ENGINE/metrics" "http://$metrics/metrics" & poll=$!
trap 'kill "$poll" 2> /dev/null; rm -rf "$state"' EXIT
until [ "$(wc -l < "$looks")" -ge 2 ]; do kill -0 "$poll" || exit 1; sleep 0.1; done
MILLRACE_DATA=$state timeout -k 30 "${LIMIT:-500}" "${MILLRACE:-millrace}" run "$job" --engine "$ENGINE" --concurrency "$n" -o "$state/out.jsonl" \
	--metrics-addr "$metrics" --json "$@" > /dev/null 2> "$state/log" || tail -5 "$state/log"
kill "$poll"; wait "$poll"; trap 'rm -rf "$state"' EXIT
[ -f "$state/out.manifest.json" ] || exit 1
python3 -S - "$state/out.manifest.json" "$looks" "$record" "${CARD:-}" "$label" "$(basename "$job")" "$n" "$*" <<'P' && tail -1 "$record"
import csv, json, sys
manifest, looks, record, card, label, job, n, flags = sys.argv[1:]
m = json.load(open(manifest))
s, e = m["statistics"], (m.get("engines") or [{}])[0]
rows = list(csv.DictReader(open(looks)))
grown = lambda c: int(float(rows[-1][c] or 0) - float(rows[0][c] or 0))
with open(record, "a") as f:
    f.write(json.dumps({"card": card, "case": label, "job": job, "in_flight": n, "flags": flags, "lines": s["completed"], "failed": s["failed"],
                        "s": round(s["duration"], 2), "out": s["total_output_tokens"], "out_tok_s": round(s["output_throughput"]),
                        "limit": e.get("in_flight_limit"), "full_share": e.get("full_share"), "kv_tokens": e.get("kv_tokens"),
                        "windows": s["windows"], "preemptions": grown("preempt"), "cached": grown("cached"), "prompt": grown("prompt")}) + "\n")
P
