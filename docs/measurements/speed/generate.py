#!/usr/bin/env python3
"""LLM.generate with all prompts of a job at once.

    generate.py JOB WARM OUT RECORD MODEL [JSON with more arguments of LLM]

The prompts of the job WARM run first, so that the kernels are compiled; the cold time holds them, too. Prompts are
rendered by the chat template before the clock of the warm time starts; they are tokenised within it, as they are by a
server. Appends to RECORD, with $CARD as the name of the card.
"""
import time; begin = time.time()
import json, os, sys


def read(llm, job):
    """The prompts of a job as the chat template renders them, and its lines."""
    lines = [json.loads(l) for l in open(job)]
    tok = llm.get_tokenizer()
    prompts = [tok.apply_chat_template(l["body"]["messages"], tokenize=False, add_generation_prompt=True) for l in lines]
    if tok(prompts[0]).input_ids[:2] == 2 * [tok.bos_token_id]:  # the tokenizer adds what the template has
        prompts = [p.removeprefix(tok.bos_token) for p in prompts]
    return prompts, lines


def main():
    job, warm, out, record, model, *more = sys.argv[1:]
    from vllm import LLM, SamplingParams
    args = {"model": model, "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 4096}
    args.update(json.loads(more[0]) if more else {})
    llm = LLM(**args)
    warm, _ = read(llm, warm)
    prompts, lines = read(llm, job)
    params = [SamplingParams(max_tokens=l["body"]["max_tokens"], min_tokens=l["body"]["min_tokens"], ignore_eos=True,
                             temperature=0) for l in lines]
    llm.generate(warm, params[0], use_tqdm=False)
    ready = time.time()
    answers = llm.generate(prompts, params, use_tqdm=False)
    done = time.time()
    with open(out, "w") as f:
        for l, a in zip(lines, answers):
            f.write(json.dumps({"custom_id": l["custom_id"], "text": a.outputs[0].text}) + "\n")
        f.flush()
        os.fsync(f.fileno())
    end = time.time()
    with open(record, "a") as f:
        f.write(json.dumps({"card": os.environ.get("CARD", ""), "how": "generate", "label": os.environ.get("LABEL", "LLM.generate"), "job": os.path.basename(job), "lines": len(answers),
                            "in": sum(len(a.prompt_token_ids) for a in answers), "out": sum(len(a.outputs[0].token_ids) for a in answers),
                            "warm_s": round(done - ready, 2), "cold_s": round(end - begin, 2), "begin": round(ready), "args": args}) + "\n")


if __name__ == "__main__":
    main()
