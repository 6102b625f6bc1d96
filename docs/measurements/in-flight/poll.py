#!/usr/bin/env python3
"""Write what a vLLM and a millrace say of themselves to OUT, one look a second, until SIGTERM, and one look then.

    poll.py OUT ENGINE/metrics[,ENGINE/metrics…] MILLRACE/metrics

Figures of several engines are their sums. A field is empty where there is no such figure, as while one of them is not up.
"""
import re, signal, sys, threading, time, urllib.request

COLUMNS = [("limit", 2, "millrace_inflight_limit"), ("inflight", 2, "millrace_inflight_requests"),
           ("running", 1, "vllm:num_requests_running"), ("waiting", 1, "vllm:num_requests_waiting"),
           ("kv", 1, "vllm:kv_cache_usage_perc"), ("preempt", 1, "vllm:num_preemptions_total"),
           ("gen", 1, "vllm:generation_tokens_total"), ("cached", 1, "vllm:prompt_tokens_cached_total"),
           ("prompt", 1, "vllm:prompt_tokens_total")]


def page(url):
    try:
        return urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        return ""


def figure(text, name):
    """The sum of a metric over its labels, as text."""
    found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? ([0-9.eE+-]+)$", text, re.M)
    return f"{sum(map(float, found)):.4f}".rstrip("0").rstrip(".") if found else ""


end = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: end.set())
start = time.monotonic()
with open(sys.argv[1], "w", buffering=1) as out:
    out.write("t," + ",".join(c for c, _, _ in COLUMNS) + "\n")
    last = False
    while not last:
        last, now = end.is_set(), time.monotonic()
        pages = [None, "".join(map(page, sys.argv[2].split(","))), page(sys.argv[3])]
        out.write(f"{now - start:.1f}," + ",".join(figure(pages[i], m) for _, i, m in COLUMNS) + "\n")
        if not last:
            end.wait(max(0.05, now + 1 - time.monotonic()))
