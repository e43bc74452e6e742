"""RWKV-7's memory as a loop over tokens and in chunks, in one run.

    python benchmarks/rwkv.py [--tokens 256] [--rows 4] > rwkv.md

First the memory of one layer alone (8 heads of 64), forward and backward. Then
forward and backward of whole models of `--layers` layers, 128 and 512 wide.
Ways take turns, `--rounds` times; the fastest round counts, in seconds of the
processor, so that other programs disturb less. MB kept are those that autograd
saves in the memory's forward pass."""
import argparse
from functools import partial
from time import process_time

import torch
import torch.nn.functional as F

from tiny_reason import rwkv
from tiny_reason.memory import saved_bytes


def inputs(rows, heads, tokens, size):
    x = lambda: torch.randn(rows, heads, tokens, size)
    key, rate = F.normalize(x(), dim=-1), x().sigmoid()
    parts = [x(), -0.6 * x().sigmoid(), x() * rate, x(), -key, key * rate]
    return [p.requires_grad_() for p in parts]


def memory_step(form, parts, memory):
    y, end = form(*parts, memory)
    (y.sum() + end.sum()).backward()


def train_step(form, model, ids):
    usual, rwkv.chunked = rwkv.chunked, form
    try: model(ids, labels=ids).loss.backward()
    finally: rwkv.chunked = usual
    model.zero_grad()


def fastest(jobs, rounds):
    "Processor seconds of each job; they take turns."
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, job in jobs.items():
            start = process_time()
            job()
            best[name] = min(best[name], process_time() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    forms = {"a loop over tokens": rwkv.recurrent} | {
        f"chunks of {c}": partial(rwkv.chunked, chunk=c)
        for c in (16, 32, 64)}
    parts = inputs(args.rows, 8, args.tokens, 64)
    memory = torch.zeros(args.rows, 8, 64, 64)
    one = fastest({n: partial(memory_step, f, parts, memory)
                   for n, f in forms.items()}, args.rounds)
    kept = {n: saved_bytes(torch.nn.Module(), lambda: f(*parts, memory))
            for n, f in forms.items()}
    tokens, loop = args.rows * args.tokens, "a loop over tokens"
    ids, whole = torch.randint(1152, (args.rows, args.tokens)), []
    for width in (128, 512):
        model = rwkv.RWKV7ForCausalLM(rwkv.RWKV7Config(
            hidden_size=width, num_hidden_layers=args.layers))
        whole.append(fastest({n: partial(train_step, f, model, ids)
                              for n, f in forms.items()}, args.rounds))
    print(f"{args.rows} rows of {args.tokens} tokens, fp32, {args.threads} "
          f"thread(s), fastest of {args.rounds} rounds taken in turn:\n")
    print("| | one memory, CPU ms | times the loop | MB kept "
          + "".join(f"| {args.layers} × {width}, tokens a CPU second "
                    "| times the loop " for width in (128, 512)) + "|")
    print("|---" * 8 + "|")
    for name in forms:
        rates = "".join(f"{tokens / w[name]:,.0f} | {w[loop] / w[name]:.1f} | "
                        for w in whole)
        print(f"| {name} | {1000 * one[name]:.0f} | "
              f"{one[loop] / one[name]:.1f} | {kept[name] / 1e6:.0f} | {rates}"
              .rstrip())


if __name__ == "__main__": main()
