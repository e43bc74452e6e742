"""What fine-tuning elicits, teaches and carries over, on several seeds.

    python benchmarks/spine.py [--seeds 0 1 2 3 4] [--n 300]

Asks the bundled base in four ways, tunes it once a seed and once more without
the taught kinds (the control), and grades all of them on the same test
problems. Writes spine.md and spine.json beside this file. About half an hour
on one core."""
import argparse
import json
import tempfile
from pathlib import Path
from time import perf_counter

import datasets
import transformers

from tiny_reason.data import GROUPS, load_problems, prepare
from tiny_reason.eval import evaluate, mcnemar, perplexity, strict, wilson
from tiny_reason.lib.device import machine
from tiny_reason.lib.disk import file_hash
from tiny_reason.lib.folders import find_base
from tiny_reason.lib.stats import paired_difference
from tiny_reason.model import add_lora, load_base, merge
from tiny_reason.train import sft_config, train

LIMIT = 256 # tokens of an answer
SHOTS = list(load_problems("arithmetic", "familiar", n=2))
WAYS = {"chat": dict(style="think", prime=False),
        "chat, <think> opened": dict(style="think"),
        "plain text": dict(style="question"),
        "plain text, 2 shots": dict(style="question", shots=SHOTS)}
TUNED = WAYS["chat, <think> opened"] # as in training


def problems(split, n, seed=0, groups=GROUPS):
    return [dict(p) for g in groups for p in load_problems(
        "arithmetic", g, split, n, 3407 + seed)]


def tune(subset, seed):
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_base("student")
        rows, held, _ = prepare("arithmetic", 2000, seed=3407 + seed,
                                subset=subset, tokenizer=tokenizer)
        args = sft_config(folder, learning_rate=4e-3, seed=seed)
        tuned = add_lora(model, r=16, alpha=32, seed=seed)
        train(tuned, tokenizer, rows, held, args)
        return merge(tuned)


def cell(report, p=None):
    text = f"{report.accuracy:.1%} [{report.low:.1%}, {report.high:.1%}]"
    return text if p is None else f"{text}, {p_said(p)}"


def p_said(p): return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def flags(report): return [r["correct"] for r in report.records]


def cost_of_order(splits, runs):
    "What a reserved order costs, pair by pair and run by run, in points."
    lines, means = [], []
    for name in runs:
        new, ordinary = (flags(splits[name][g]) for g in ("combined", "twin"))
        mean, low, high, _ = paired_difference(ordinary, new)
        means.append(mean)
        lines.append(f"- {name}: {100 * mean:+.1f} points [{100 * low:+.1f}, "
                     f"{100 * high:+.1f}], right in the twin alone "
                     f"{sum(b > a for a, b in zip(new, ordinary))}, in the "
                     f"combined one alone "
                     f"{sum(a > b for a, b in zip(new, ordinary))}, "
                     f"{p_said(mcnemar(new, ordinary))}")
    if len(means) < 2: return lines, {}
    mean, low, high, p = paired_difference(means, [0] * len(means))
    lines.append(f"- over the {len(means)} runs: {100 * mean:+.1f} points "
                 f"[{100 * low:+.1f}, {100 * high:+.1f}], {p_said(p)} (t)")
    return lines, dict(each=means, mean=mean, low=low, high=high, p=p)


def arguments(text):
    "Seeds and test problems a group; the libraries are silenced."
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--n", type=int, default=300,
                        help="test problems a group")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return parser.parse_args()


def main():
    args = arguments(__doc__)
    start = perf_counter()
    base, tokenizer = load_base("student")
    base = merge(base)
    test, chosen_on = problems("test", args.n), problems(
        "validation", 60, groups=GROUPS[:3])

    def ask(model, rows, **how):
        return evaluate(model, tokenizer, rows, max_new_tokens=LIMIT, **how)
    trial = {w: ask(base, chosen_on, **how).correct for w, how in WAYS.items()}
    best = max(trial, key=trial.get)
    models = {f"base, {way}": (base, how) for way, how in WAYS.items()}
    models["control, seed 0"] = (tune("familiar", 0), TUNED)
    for seed in args.seeds:
        models[f"tuned, seed {seed}"] = (tune("main", seed), TUNED)
    runs = {name: ask(m, test, **how) for name, (m, how) in models.items()}
    split = {name: r.by_group() for name, r in runs.items()}
    reference = f"base, {best}"

    lines = [f"Base asked in four ways; the best on {len(chosen_on)} "
             f"validation problems is **{best}** ("
             + ", ".join(f"{w}: {k}" for w, k in trial.items()) + "). "
             f"{args.n} test problems a group, greedy; brackets: Wilson's 95 % "
             f"interval; p: exact McNemar against {reference}.", "",
             "| run | " + " | ".join(GROUPS) + " |",
             "|---" * (1 + len(GROUPS)) + "|"]
    for name in runs:
        cells = [cell(split[name][g], None if name.startswith("base") else
                      mcnemar(flags(split[name][g]),
                              flags(split[reference][g]))) for g in GROUPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    tuned = [n for n in runs if n.startswith("tuned")]
    spread = [f"{g}: {min(split[n][g].accuracy for n in tuned):.1%} to "
              f"{max(split[n][g].accuracy for n in tuned):.1%}"
              for g in GROUPS]
    text = [p["question"] for p in chosen_on]
    surprise = {n: perplexity(models[n][0], tokenizer, text)
                for n in [reference, *tuned]}
    order, cost = cost_of_order(split, tuned)
    lines += ["", f"From seed to seed, {'; '.join(spread)}.", "",
              "What a reserved order costs, twin minus combined:", "", *order, "",
              "Perplexity on held-out stories: " + ", ".join(
                  f"{n.replace(reference, 'base')} {p:.2f}"
                  for n, p in surprise.items()) + "."]

    known = 3 * args.n # familiar, taught, combined
    few = list(range(0, known, known // 50))[:50]
    claimed = ["| run, strict reader | of 50 | \"accuracy\" | 95 % interval |",
               "|---|---|---|---|"]
    for name in ["base, chat", *tuned]:
        k = sum(strict(r["completion"], r["gold"])
                for r in (runs[name].records[i] for i in few))
        low, high = wilson(k, 50)
        claimed.append(f"| {name} | {k} | {k / 50:.0%} | {low:.0%} to "
                       f"{high:.0%} |")
    seconds = perf_counter() - start
    lines += ["", f"{seconds / 60:.0f} minutes: {machine()}. "
              "`python benchmarks/spine.py`."]
    keys = ("n", "correct", "accuracy", "low", "high")
    result = dict(best=best, chosen=trial, runs=list(runs), groups={
        g: {n: {k: getattr(split[n][g], k) for k in keys} for n in runs}
        for g in GROUPS}, cost_of_order=cost, perplexity=surprise,
        student=file_hash(Path(find_base("student")[0], "model.safetensors")),
        seconds=seconds,
        markdown="\n".join(lines), claimed="\n".join(claimed))
    here = Path(__file__).parent
    (here / "spine.json").write_text(json.dumps(result, indent=1) + "\n")
    (here / "spine.md").write_text("\n".join(
        ["# The spine, on the student", "", *lines, "",
         "The same runs as they might have been claimed:", "", *claimed, ""]))
    print((here / "spine.md").read_text())


if __name__ == "__main__": main()
