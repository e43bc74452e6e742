"""Decoding the same problems in several ways, in one run.

    python benchmarks/generate.py [--model student] [--n 256] > generate.md

One at a time through the NF4 model, as the usual tutorial does; static
batches of 32, one batch of all and continuous batching, all by transformers,
and our slots, all on the merged model. One at a time is timed on the first
`--alone` problems, because it takes so long. Ways take turns, `--rounds` times;
the fastest round counts. Prints problems a second, and how many token sequences
are those of one at a time on the merged model. `--clock cpu` counts seconds of
the processor, all threads together: for a machine that other programs use."""
import argparse
import logging
from contextlib import nullcontext
from time import perf_counter, process_time
from unittest import mock

import torch
import transformers
from transformers import GenerationConfig

from tiny_reason.data import build_prompt, load_problems
from tiny_reason.lib.decode import end_ids, generate_ids
from tiny_reason.model import load_base, merge


def plain_config(model, tokenizer, limit):
    stops = end_ids(model, tokenizer)
    return GenerationConfig(max_new_tokens=limit, do_sample=False,
                            eos_token_id=stops, pad_token_id=stops[0])


def padded(model, tokenizer, prompts, limit, size=32):
    "transformers' generate on left-padded batches, sorted by length."
    config = plain_config(model, tokenizer, limit)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    new = [None] * len(prompts)
    for start in range(0, len(order), size):
        rows = order[start:start + size]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[config.pad_token_id] * (width - len(prompts[i]))
                            + prompts[i] for i in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i]))
                             + [1] * len(prompts[i]) for i in rows],
                            device=model.device)
        out = model.generate(input_ids=ids, attention_mask=mask,
                             generation_config=config)[:, width:]
        for i, row in zip(rows, out.tolist()):
            ends = [j for j, t in enumerate(row) if t in config.eos_token_id]
            new[i] = row[:ends[0] + 1] if ends else row
    return new


def continuous(model, tokenizer, prompts, limit, settings=None):
    "transformers' continuous batching."
    config = plain_config(model, tokenizer, limit)
    # It takes one end token; the base ends plain text by the smallest id.
    config.eos_token_id = min(config.eos_token_id)
    out = model.generate_batch(inputs=prompts, generation_config=config,
                               continuous_batching_config=settings,
                               progress_bar=False)
    if failed := [r.error for r in out.values() if r.error]:
        raise RuntimeError(failed[0])
    results = sorted(out.values(), key=lambda r: int(
        "".join(c for c in r.request_id if c.isdigit())))
    return [list(r.generated_tokens) for r in results]


def by_mkl(*how):
    "Ours, but torch multiplies as it does by default."
    with mock.patch("tiny_reason.lib.decode.onednn", nullcontext):
        return generate_ids(*how)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="student")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--alone", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--skip", help="a way not to go, as: continuous")
    args = parser.parse_args()
    clock = dict(wall=perf_counter, cpu=process_time)[args.clock]
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    nf4, tokenizer = load_base(args.model)
    merged = merge(nf4)
    source = "arithmetic" if args.model == "student" else "openai/gsm8k"
    rows = load_problems(source, split="test", n=args.n)
    prompts = [build_prompt(q, tokenizer, style="question")
               for q in rows["question"]]
    few = prompts[:args.alone]
    ways = {
        "one at a time, NF4": lambda: padded(nf4, tokenizer, few,
                                             args.limit, 1),
        "one at a time, merged": lambda: padded(merged, tokenizer, few,
                                                args.limit, 1),
        "batches of 32, transformers": lambda: padded(merged, tokenizer,
                                                      prompts, args.limit),
        "all in one batch, transformers": lambda: padded(
            merged, tokenizer, prompts, args.limit, args.n),
        "continuous batching, transformers": lambda: continuous(
            merged, tokenizer, prompts, args.limit),
        "ours, by MKL": lambda: by_mkl(merged, tokenizer, prompts, args.limit),
        "ours, 32 slots": lambda: generate_ids(merged, tokenizer, prompts,
                                               args.limit, 32),
        "ours": lambda: generate_ids(merged, tokenizer, prompts, args.limit)}
    if args.skip: ways = {n: w for n, w in ways.items() if args.skip not in n}
    best, tokens, steps = {}, {}, {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            count = [0]
            model = nf4 if "NF4" in name else merged
            hook = model.register_forward_pre_hook(
                lambda *_: count.__setitem__(0, count[0] + 1))
            start = clock()
            try:
                with torch.no_grad(): tokens[name] = way()
            except Exception as e:
                tokens[name] = f"{type(e).__name__}: {e}"[:80]
            spent, steps[name] = clock() - start, count[0]
            best[name] = min(best.get(name, spent), spent)
            hook.remove()
    alone = tokens["one at a time, merged"]
    stops = end_ids(merged, tokenizer)
    def cut(ids): return ids[:-1] if ids and ids[-1] in stops else ids
    slowest = len(few) / best["one at a time, NF4"]
    dtype = str(merged.dtype).removeprefix("torch.")
    print(f"{args.model}, merged {dtype}, {args.n} test problems, at most "
          f"{args.limit} tokens, {args.threads} threads, fastest of "
          f"{args.rounds} rounds taken in turn, {args.clock} seconds:\n")
    print("| way | problems | steps | problems/s | times NF4 alone | the same "
          "tokens as alone |\n|---|---|---|---|---|---|")
    for name, ids in tokens.items():
        if isinstance(ids, str):
            print(f"| {name} | | | did not run: {ids} | | |"); continue
        rate = len(ids) / best[name]
        same = sum(cut(a) == cut(b) for a, b in zip(alone, ids))
        print(f"| {name} | {len(ids)} | {steps[name]:,} | {rate:.2f} | "
              f"{rate / slowest:.1f} | {same} of {len(alone)} |")


if __name__ == "__main__": main()
