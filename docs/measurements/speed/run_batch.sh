#!/usr/bin/env bash
# run_batch.sh JOB OUT RECORD MODEL [flags of vllm]: one run of `vllm run-batch`; appends to RECORD.
# $VLLM is the command (default vllm), $LABEL its name in the record, $CARD that of the card.
set -u
job=$1 out=$2 record=$3 model=$4; shift 4
log=$out.log
begin=$(date +%s.%N)
rm -f "$out"
${VLLM:-vllm} run-batch -i "$job" -o "$out" --model "$model" --served-model-name m "$@" 2>&1 | python3 -S "$(dirname "$0")/stamp.py" > "$log"
sync "$out"
end=$(date +%s.%N)
python3 -S - "$job" "$out" "$record" "$log" "$begin" "$end" "${LABEL:-run-batch}" "${CARD:-}" "$*" <<'P'
import json, os, re, sys
job, out, record, log, begin, end, label, card, flags = sys.argv[1:]
bar = [(float(l.split(None, 1)[0]), l) for l in open(log, errors="replace") if "Running batch" in l]
answers = [json.loads(l) for l in open(out)]
ok = [a["response"]["body"]["usage"] for a in answers if a.get("response") and a["response"]["status_code"] == 200 and not a.get("error")]
first = bar[0][0] if bar else 0
last = next((t for t, l in bar if "100%" in l), bar[-1][0] if bar else 0)
with open(record, "a") as f:
    f.write(json.dumps({"card": card, "how": "run-batch", "label": label, "job": os.path.basename(job), "lines": len(ok), "in": sum(u["prompt_tokens"] for u in ok),
                        "out": sum(u["completion_tokens"] for u in ok), "warm_s": round(last - first, 2),
                        "cold_s": round(float(end) - float(begin), 2), "begin": round(first), "args": flags}) + "\n")
P
tail -1 "$record"
