#!/usr/bin/env python3
"""Print how full each of the records of looks CSV… shows an engine: the time-weighted mean of what runs over that of the limit.

The time is that between ramp and drain: from the first look at which 95 % of the limit run to the last at which 95 %
of it are in flight.
"""
import csv, sys

for name in sys.argv[1:]:
    rows = [{c: float(v) for c, v in r.items()} for r in csv.DictReader(open(name)) if "" not in r.values()]
    begin = next((i for i, r in enumerate(rows) if r["limit"] > 0 and r["running"] >= 0.95 * r["limit"]), len(rows))
    end = max((i for i, r in enumerate(rows) if r["inflight"] >= 0.95 * r["limit"]), default=0)
    if begin >= end:
        print(f"{name}: never full")
        continue
    steps = [(b["t"] - a["t"], a["running"], a["limit"]) for a, b in zip(rows[begin:end], rows[begin + 1:end + 1])]
    time, running, limit = (sum(x[0] * (x[i] if i else 1) for x in steps) for i in range(3))
    print(f"{name}: {running / time:.1f} of {limit / time:.1f} run = {running / limit:.3f}, over {time:.0f} s")
