#!/usr/bin/env python3
"""Print the records of RECORD as a table, and of each job the mean of the controller's runs over that of the best fixed number."""
import json, statistics, sys

jobs = {}
for l in open(sys.argv[1]):
    r = json.loads(l)
    jobs.setdefault((r["card"], r["kv_tokens"] or 0, r["job"]), []).append(r)
print("| card | KV, tokens | job | in flight | out tok/s | pre-emptions | limit at the end |\n|---|---|---|---|---|---|---|")
for (card, kv, job), rs in jobs.items():
    for r in rs:
        print(f"| {card} | {kv:,} | {job} | {r['in_flight']} | {r['out_tok_s']:,} | {r['preemptions']} | {r['limit']} |")
for (card, kv, job), rs in jobs.items():
    each = {}
    for r in rs:
        each.setdefault(r["in_flight"], []).append(r["out"] / r["s"])
    means = {n: statistics.mean(v) for n, v in each.items()}
    auto = means.pop("auto", None)
    if auto and means:
        best = max(means, key=means.get)
        print(f"\n{card}, {kv:,} tokens, {job}: {auto:,.0f} / {means[best]:,.0f} (best fixed: {best}) = {auto / means[best]:.3f}")
