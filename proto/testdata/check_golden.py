#!/usr/bin/env python3
"""Hold golden.json against Python's msgpack: each record reads as its value, and packs to the same bytes."""
import json
import pathlib
import sys

import msgpack


def value(v):
    if isinstance(v, list):
        return [value(x) for x in v]
    if isinstance(v, dict):
        return bytes.fromhex(v["hex"])
    return v


records = json.loads(pathlib.Path(__file__).with_name("golden.json").read_text())
for r in records:
    wire, want = bytes.fromhex(r["hex"]), value(r["value"])
    got = msgpack.unpackb(wire, raw=False, strict_map_key=True)
    if got != want:
        sys.exit(f"{r['name']}: reads as {got!r}, want {want!r}")
    # A rate of 0.0 stands as 0 in the JSON text, which would pack as an integer.
    if r["name"] != "progress" and msgpack.packb(want, use_bin_type=True) != wire:
        sys.exit(f"{r['name']}: Python packs it otherwise")
print(f"{len(records)} records agree with msgpack {'.'.join(map(str, msgpack.version))}")
