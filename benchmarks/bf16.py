"""What does computing a CPU step in bf16 change, beyond another seed?

    python benchmarks/bf16.py [--steps 250] [--n 100] > benchmarks/bf16.md

The recipe on the bundled student, three seeds; fp32 as PEFT's layers compute
it, fp32 as `train` does, and bf16. As many runs at once as there are cores.
"""
import argparse, contextlib, os, statistics, sys, tempfile, time
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
SEEDS, GROUPS = (0, 1, 2), ("taught", "combined", "familiar")
SETTINGS = {"fp32": {}, "bf16": dict(bf16=True), "fp32, PEFT's layers": {}}


def one_run(job):
    "Train with one seed in one precision, then answer."
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging
    from tiny_reason import train as lesson
    from tiny_reason.data import make_problems, prepare
    from tiny_reason.eval import evaluate
    from tiny_reason.model import add_lora, load_base, merge
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    seed, name, steps, n = job
    model, tokenizer = load_base("student", device="cpu")
    rows, held, _ = prepare("arithmetic", 2000, tokenizer=tokenizer)
    model, as_before = add_lora(model, seed=seed), contextlib.nullcontext()
    if "PEFT" in name:
        as_before = patch.object(lesson, "plain_layers", lambda model: [])
    with tempfile.TemporaryDirectory() as folder, as_before:
        start = time.process_time()
        run = lesson.train(model, tokenizer, rows, held, lesson.sft_config(
            folder, "cpu", learning_rate=4e-3, max_steps=steps, seed=seed,
            warmup_steps=steps // 5, eval_steps=steps, save_steps=steps,
            **SETTINGS[name]))
        spent = time.process_time() - start
    right = {g: evaluate(merge(model), tokenizer, make_problems(
        n, split="test", group=g), max_new_tokens=300).accuracy
        for g in GROUPS}
    losses = [h["loss"] for h in run.history if "loss" in h]
    print(seed, name, losses[-1], run.best_loss, right, round(spent),
          file=sys.stderr, flush=True)
    return name, dict(right, train=losses[-1], held=run.best_loss,
                      speed=run.tokens / spent)


def span(runs, key, form, by=1):
    values = [by * r[key] for r in runs]
    return (f"{statistics.mean(values):{form}} ({min(values):{form}} to "
            f"{max(values):{form}})")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--n", type=int, default=100)
    options = parser.parse_args()
    jobs = [(seed, name, options.steps, options.n)
            for name in SETTINGS for seed in SEEDS]
    found = {name: [] for name in SETTINGS}
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        for name, result in pool.imap_unordered(one_run, jobs):
            found[name].append(result)
    report(found, options)


def report(found, options):
    chips = [line.split(":")[1].strip() for line in
             Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    print(f"{options.steps} steps of 8 on the student, learning rate 4e-3, "
          f"seeds {', '.join(map(str, SEEDS))}: mean (lowest to highest). "
          f"% right: greedy, n = {options.n} test problems of each group, the "
          f"same for all. {os.cpu_count()} cores of {chips[0]}, one thread a "
          "run, no GPU.\n")
    print("| computed in | last training loss | validation loss |",
          " | ".join(f"{g}, % right" for g in GROUPS),
          "| tokens per CPU second |\n" + "|---" * 7 + "|")
    for name, runs in found.items():
        print(f"| {name} | {span(runs, 'train', '.4f')} | "
              f"{span(runs, 'held', '.4f')} |",
              " | ".join(span(runs, g, ".0f", 100) for g in GROUPS),
              f"| {span(runs, 'speed', ',.0f')} |")


if __name__ == "__main__": main()
