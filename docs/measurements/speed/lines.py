#!/usr/bin/env python3
"""Write a job of chat requests for a tokenizer in which a byte is a token.

    lines.py OUT LINES PROMPT LEAST MOST SEED [TEMPLATES SHARED]

PROMPT bytes of random letters a line, all different; outputs of LEAST to MOST tokens (min_tokens = max_tokens). With
TEMPLATES, the first SHARED bytes of a line are those of its template, line i of template i modulo TEMPLATES.
"""
import json, random, string, sys

out, lines, prompt, least, most, seed, *shared = sys.argv[1:2] + [int(a) for a in sys.argv[2:]]
templates, size = shared or (0, 0)
r = random.Random(seed)
text = lambda n: "".join(r.choices(string.ascii_lowercase, k=n))
heads = [text(size) for _ in range(templates)] or [""]
with open(out, "w") as f:
    for i in range(lines):
        c = r.randint(least, most)
        f.write(json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": "m", "messages": [{"role": "user", "content": heads[i % len(heads)] + text(prompt - size)}],
            "max_tokens": c, "min_tokens": c, "ignore_eos": True, "temperature": 0}}) + "\n")
