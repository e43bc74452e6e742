"""Which knobs of the recipe matter beyond another seed?

    python benchmarks/knobs.py [--steps 100] [--n 150] > benchmarks/knobs.md

Short runs of the bundled student, three seeds for each setting, as many at
once as there are cores. The problems to answer are of the validation split,
familiar and taught kinds evenly, and the same for every run.
"""
import argparse, os, statistics, sys, tempfile, time
from multiprocessing import get_context

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
SEEDS = (3407, 3408, 3409)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTINGS = {"the recipe": {}, "loss on the problem too": dict(masked=False),
            "annotations kept": dict(calculator="keep"),
            "rank 4": dict(r=4), "rank 64": dict(r=64),
            "attention alone": dict(target_modules=ATTENTION)}


def one_run(job):
    "Train and test one setting with one seed."
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging
    from tiny_reason.data import load_problems, prepare
    from tiny_reason.eval import evaluate
    from tiny_reason.model import add_lora, load_base, merge
    from tiny_reason.train import sft_config, train
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    name, seed, steps, n, base = job
    setting, start = SETTINGS[name], time.time()
    model, tokenizer = load_base(base, device="cpu")
    rows, held, _ = prepare("arithmetic", 2000, tokenizer=tokenizer,
                            calculator=setting.get("calculator", "strip"))
    r = setting.get("r", 16)
    model = add_lora(model, r, 2 * r, seed=seed,
                     target_modules=setting.get("target_modules"))
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        run = train(model, tokenizer, rows, held, sft_config(
            folder, device="cpu", learning_rate=4e-3, max_steps=steps,
            warmup_steps=steps // 5, eval_steps=steps, save_steps=steps,
            seed=seed, completion_only_loss=setting.get("masked", True)))
    problems = load_problems("arithmetic", "main", "validation", n)
    report = evaluate(merge(model), tokenizer, problems, max_new_tokens=300)
    print(name, seed, f"{run.best_loss:.4f} {report.accuracy:.3f} "
          f"{time.time() - start:.0f} s", file=sys.stderr, flush=True)
    return name, dict(loss=run.best_loss, accuracy=report.accuracy, size=size)


def span(values, form):
    return (f"{statistics.mean(values):{form}} ({min(values):{form}} to "
            f"{max(values):{form}})")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--n", type=int, default=150)
    parser.add_argument("--base", default="student", help="or a folder")
    options = parser.parse_args()
    start, jobs = time.time(), [
        (name, seed, options.steps, options.n, options.base)
        for seed in SEEDS for name in SETTINGS]
    found = {name: [] for name in SETTINGS}
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        for name, result in pool.imap_unordered(one_run, jobs):
            found[name].append(result)
    from tiny_reason.lib.folders import find_base
    from tiny_reason.lib.disk import file_hash
    weights = file_hash(find_base(options.base)[0] + "/model.safetensors")
    base = [r["accuracy"] for r in found["the recipe"]]
    print(f"{options.steps} steps of 8 on the student (weights "
          f"{weights[:12]}), learning rate 4e-3, {len(SEEDS)} seeds: mean "
          "(lowest to highest). Accuracy: greedy, "
          f"n = {options.n} validation problems, the same for all. "
          f"{os.cpu_count()} cores, one thread a run, no GPU, "
          f"{(time.time() - start) / 60:.0f} minutes in all.\n")
    print("| setting | weights trained | validation loss | % right | beyond "
          "the seeds' range? |\n|---|---|---|---|---|")
    for name, runs in found.items():
        right = [r["accuracy"] for r in runs]
        apart = min(right) > max(base) or max(right) < min(base)
        verdict = "" if name == "the recipe" else "yes" if apart else "no"
        print(f"| {name} | {runs[0]['size']:,} | "
              f"{span([r['loss'] for r in runs], '.3f')} | "
              f"{span([100 * a for a in right], '.1f')} | {verdict} |")
    print("\nLosses of *loss on the problem too* and of *annotations kept* are "
          "taken over other tokens and do not compare with the rest; accuracy "
          "does. Two ranges of three seeds that do not overlap happen by "
          "chance in 1 of 10 comparisons.")


if __name__ == "__main__": main()
