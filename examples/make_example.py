#!/usr/bin/env python3
"""Write requests.jsonl: 1,200 chat requests for two models, three of which no engine can serve.

usage: make_example.py > requests.jsonl
"""
import json

THINGS = ["kettle", "desk lamp", "rain jacket", "road bike", "paper notebook", "headphones", "cast-iron pan", "tent",
          "wool blanket", "keyboard", "water filter", "garden hose", "travel mug", "chess set", "camera strap"]
VERDICTS = ["broke after a week", "does what it says", "is the best I have owned", "arrived late but works well",
            "was smaller than the picture", "is too loud", "smells odd at first", "survived a winter outside"]
TASKS = [
    ("llama-3.2-1b-instruct", "You label product reviews. Answer with one word: positive, negative or mixed.", 8, "Review: the {t} {v}."),
    ("qwen3-4b-instruct", "You write short, polite replies from a shop to its customers. Two sentences at most.", 60, "A customer writes that the {t} {v}. Reply."),
]
BROKEN = {
    137: {"temperature": 9.0},     # outside [0, 2]
    586: {"max_tokens": 100000},   # longer than the context
    1043: {"top_p": 2.0},          # outside (0, 1]
}

for i in range(1200):
    model, system, max_tokens, ask = TASKS[i % 2]
    text = ask.format(t=THINGS[i // 2 % len(THINGS)], v=VERDICTS[i // 30 % len(VERDICTS)]) + f" (case {i})"
    body = {"model": model, "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}],
            "max_tokens": max_tokens, "temperature": 0.0}
    body.update(BROKEN.get(i, {}))
    print(json.dumps({"custom_id": f"review-{i:04d}", "method": "POST", "url": "/v1/chat/completions", "body": body}))
