#!/usr/bin/env python3
"""Print the records of RECORD as a table: output tokens per second of the warm time, and both times, from three runs on with 95 % intervals (Student)."""
import json, statistics, sys
T = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}


def span(v):
    if len(v) < 3:
        return ", ".join(f"{x:.1f}" for x in v)
    return f"{statistics.mean(v):.1f} ± {T.get(len(v), 2.4) * statistics.stdev(v) / len(v) ** 0.5:.1f}"


groups = {}
for l in open(sys.argv[1]):
    r = json.loads(l)
    groups.setdefault((r["card"], r["job"], r["label"]), []).append(r)
print("| card | job | how | n | warm, s | out tok/s | each | cold, s |\n|---|---|---|---|---|---|---|---|")
for (card, job, label), rs in groups.items():
    rates = [r["out"] / r["warm_s"] for r in rs if r["warm_s"] > 0]
    print(f"| {card} | {job} | {label} | {len(rs)} | {span([r['warm_s'] for r in rs])} | {sum(rates) / max(len(rates), 1):,.0f} | "
          + ", ".join(f"{x:,.0f}" for x in rates) + f" | {span([r['cold_s'] for r in rs])} |")
