"""What do verdicts alone teach? Arms from three starts, three seeds.

    python benchmarks/reinforce.py rates
    python benchmarks/reinforce.py run [--seeds 0 1 2] [--only short_rl ...]
    python benchmarks/reinforce.py table
    python benchmarks/reinforce.py unpack

A finished run is a file below --folder and is not done again; `table` writes
reinforce.json and reinforce.md from what is there. `unpack` does the reverse:
it puts the committed runs below --folder, to go on from them. Processes can
share the work by --seeds.

A seed decides everything: the written solutions and batches of the start, the
problems, attempts and batches of an arm. The starts, merged into the weights:

* base: the bundled student, asked in plain text. No fine-tuning at all.
* short: 40 steps of the recipe on written solutions of 2,000 problems.
* full: 250 steps of it.

The arms, each a fresh adapter on its start, on 640 of the same 2,000 problems
and 8 attempts at each, 5,120 in all; of the problems they are told the answer:

* rl: `reinforce`, 20 steps of 32 problems, the reward is `right_answer`.
* random: the same, and the reward is a coin. What is left is not the verdict.
* rejection: attempts of the start at the same problems; those that
  `filter_traces` keeps, at most 4 a problem, are taught by `train`.
* written: the written solutions of the same 640 problems, by `train`. What
  verdicts are to be measured against; it is told more than they are.
* equations: `reinforce`, and the reward is the share of equations that are
  true. A checker that never asks whether they have to do with the problem.
* repaired: the same share, and nothing where the answer is wrong.

*rejection* and *written* train on as many completion tokens as *rl* of their
seed did: those of groups that were not dead. Their rate is the recipe's, which
nbs/02_train found for this student. That of `reinforce` is chosen from the
short start, by the greedy answers to 200 *taught* problems of the validation
split, on a seed that is not used again. No test problem is read before the end.

At the end: greedy answers to n test problems a group; 64 attempts at 40
problems of two groups, for pass@k; and of 256 of these attempts, entropy and
divergence from the start, both in nats a token."""
import argparse
import json
import os
import random
import sys
from itertools import islice
from pathlib import Path
from statistics import mean

import datasets
import numpy as np
import torch
import transformers

from tiny_reason.data import prepare
from tiny_reason.distill import filter_traces, trace_of
from tiny_reason.eval import evaluate
from tiny_reason.lib.answers import is_correct
from tiny_reason.lib.arithmetic import check_steps
from tiny_reason.lib.device import machine
from tiny_reason.lib.disk import file_hash, write_whole
from tiny_reason.lib.folders import find_base
from tiny_reason.lib.journal import read_rollouts
from tiny_reason.lib.loading import load_base, merge
from tiny_reason.lib.problems import load_problems
from tiny_reason.lib.stats import holm, mcnemar, paired_difference, wilson
from tiny_reason.model import add_lora
from tiny_reason.pretrain import repeated
from tiny_reason.reinforce import (known_logp, pass_at_k, reinforce,
                                   ReinforceConfig, right_answer, try_out)
from tiny_reason.train import sft_config, train

HERE = Path(__file__).parent
STARTS = dict(base=0, short=40, full=250) # steps of fine-tuning
ARMS = ("short_start", "short_rl", "short_rejection", "short_written",
        "short_random", "short_equations", "short_repaired", "full_start",
        "full_rl", "full_rejection", "base_start", "base_rl")
GROUPS = "familiar", "taught", "combined", "twin", "longer"
SPREAD = "taught", "combined" # asked 64 times each
RATES = 1e-3, 3e-3 # of `reinforce`
COPYING = 4e-3 # of `train`: found by the sweep of nbs/02_train
RATE_SEED = 9


# The rewards.

def coin(completions, **more):
    "Whether a hash of the text is odd: no verdict, and the same each time."
    return [float(random.Random(text).random() < 0.5) for text in completions]


def share_true(completions, **more):
    "The share of equations that hold; nothing where there is none."
    marks = [[ok for _, ok in check_steps(text)] for text in completions]
    return [sum(ok is True for ok in m) / len(m) if m else 0.0 for m in marks]


def share_true_and_right(completions, answer, **more):
    return [a * b for a, b in zip(share_true(completions),
                                  right_answer(completions, answer))]


REWARDS = dict(rl=right_answer, random=coin, equations=share_true,
               repaired=share_true_and_right)


# Runs, each of them once.

def used(): return sum(os.times()[:4]) # core-seconds


def settings(args): return dict(
    n=args.n, steps=args.steps, asked=args.asked, attempts=args.attempts,
    student=args.hash)


def finished(args, stage, name):
    path = args.folder / stage / f"{name}.json"
    if not path.is_file(): return None
    record = json.loads(path.read_text())
    if record["settings"] != settings(args): raise SystemExit(
        f"{path} was made with {record['settings']}, this command has "
        f"{settings(args)}: repeat its flags, or choose another --folder")
    return record


def once(args, stage, name, work):
    if found := finished(args, stage, name): return found
    start = used()
    record = dict(work(), settings=settings(args), machine=machine(),
                  minutes=round((used() - start) / 60, 2), command=args.command)
    (args.folder / stage).mkdir(parents=True, exist_ok=True)
    write_whole(args.folder / stage / f"{name}.json",
                [json.dumps(record), "\n"])
    print(f"{stage}: {name}, {record['minutes']} core-minutes", flush=True)
    return finished(args, stage, name)


def pool(seed): # the problems of a seed
    return [dict(p) for p in load_problems("arithmetic", "main", "train", 2000,
                                           seed)]


def style_of(start): return "think" if STARTS[start] else "question"


def recipe(out, steps, rate, seed):
    every = max(1, steps // 4)
    return sft_config(str(out), "cpu", learning_rate=rate, max_steps=steps,
                      warmup_steps=min(50, steps // 4), eval_steps=every,
                      save_steps=every, logging_steps=every, seed=seed)


def start_model(args, start, seed): # (model, tokenizer)
    "The start of a seed; made when it is first asked for."
    if not STARTS[start]: return load_base(args.student, False, "cpu")
    folder = args.folder / "starts" / f"{start}_{seed}"
    if not (folder / "model.safetensors").is_file():
        base, tokenizer = load_base(args.student, device="cpu")
        rows = prepare("arithmetic", 2000, seed=seed, tokenizer=tokenizer,
                       max_length=384)[:2]
        tuned = add_lora(base, seed=seed)
        train(tuned, tokenizer, *rows, recipe(
            args.folder / "work" / f"{start}_{seed}",
            max(1, STARTS[start] // args.shrink), 4e-3, seed))
        merge(tuned, torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return load_base(str(folder), False, "cpu")


def config_of(args, start, arm, seed, rate): return ReinforceConfig(
    str(args.folder / "work" / f"{start}_{arm}_{seed}_{rate:g}"),
    max_steps=args.steps, prompts=args.asked, learning_rate=rate,
    style=style_of(start), seed=seed)


def by_verdicts(args, model, tokenizer, start, arm, seed, rate):
    "Train by `reinforce`; what it did."
    config = config_of(args, start, arm, seed, rate)
    reward = REWARDS[arm]
    try: run = reinforce(model, tokenizer, pool(seed), reward, config, True)
    except ValueError as error: # no group has anything to teach
        return dict(ended=str(error), log=[], tokens=0)
    tries = read_rollouts(Path(config.output_dir, "rollouts.jsonl"))
    golds = {p["question"]: p["answer"] for p in pool(seed)}
    truth = {}
    for r in tries: truth.setdefault(r["step"], []).append(
        is_correct(r["completion"], golds[r["question"]]))
    for line in run.history: line["right"] = round(mean(truth[line["step"]]), 4)
    shown = [{k: r[k] for k in ("step", "question", "completion", "reward")}
             for r in tries if r["step"] in (1, run.steps)][:: args.asked]
    return dict(log=run.history, shown=shown, tokens=sum(
        r["tokens"] for r in tries if r["advantage"]))


def asked_problems(args, seed): # those that the steps of `reinforce` take
    return [*islice(repeated(pool(seed), seed), args.steps * args.asked)]


def kept_attempts(args, model, tokenizer, start, seed): # rows to train on
    "The start's own attempts at the problems, filtered; made once a seed."
    path = args.folder / "work" / f"{start}_{seed}_attempts.json"
    if path.is_file(): return json.loads(path.read_text())
    config = config_of(args, start, "rejection", seed, 0)
    asked, traces = asked_problems(args, seed), []
    for step in range(args.steps):
        some = asked[step * args.asked:][:args.asked]
        golds = {p["question"]: p for p in some}
        for i, r in enumerate(try_out(model, tokenizer, some, right_answer,
                                      config, step + 1)):
            traces.append(trace_of(golds[r["question"]], i, r["completion"],
                                   r["finished"], r["tokens"], {}))
    kept, report = filter_traces(traces)
    found = [kept, {k: report[k] for k in ("read", "kept", "solved",
                                           "questions")}]
    write_whole(path, [json.dumps(found)])
    return found


def by_copying(args, model, tokenizer, start, arm, seed, rate, tokens):
    "Train by `train` on so many completion tokens; what it did."
    rows, report = ((asked_problems(args, seed), {}) if arm == "written" else
                    kept_attempts(args, model, tokenizer, start, seed))
    out = args.folder / "work" / f"{start}_{arm}_{seed}_{rate:g}"
    out.mkdir(parents=True, exist_ok=True)
    path = write_whole(out / "rows.jsonl", [json.dumps(
        {k: r[k] for k in ("question", "answer")}) + "\n" for r in rows])
    *sets, _ = prepare(str(path), None, seed=seed, tokenizer=tokenizer,
                       max_length=384, style=style_of(start))
    each = mean(sum(m) for m in sets[0]["completion_mask"])
    run = train(model, tokenizer, *sets, recipe(
        out, max(4, round(tokens / each / 8)), rate, seed))
    return dict(log=run.history, tokens=run.loss_tokens, **report)


# What a model can do afterwards.

def answers(args, model, tokenizer, style, groups=GROUPS, split="test", n=None):
    found = {}
    for group in groups:
        problems = load_problems("arithmetic", group, split, n or args.n)
        report = evaluate(model, tokenizer, problems, style, max_new_tokens=200)
        found[group] = "".join("01"[r["correct"]] for r in report.records)
    return found


def spread(args, model, start, tokenizer, style):
    "64 attempts at each of 40 problems, counted; and what they look like."
    config = ReinforceConfig(num_generations=args.attempts, style=style)
    counts, seen = {}, []
    for group in SPREAD:
        problems = [dict(p) for p in load_problems("arithmetic", group, "test",
                                                   40)]
        tries = try_out(model, tokenizer, problems, right_answer, config, 0)
        rewards = torch.tensor([r["reward"] for r in tries])
        counts[group] = rewards.view(40, -1).sum(1).int().tolist()
        seen += tries[::2 * len(tries) // 256 or 1]
    ours, before = (known_logp(m, seen, config) for m in (model, start))
    tokens = sum(r["tokens"] for r in seen)
    return dict(counts=counts, length=tokens / len(seen),
                entropy=-ours.sum().item() / tokens,
                divergence=(ours - before).sum().item() / tokens)


def trained(args, name, seed, rate): # (model, start, tokenizer, what it did)
    start, arm = name.split("_")
    begin, tokenizer = start_model(args, start, seed)
    if arm == "start": return begin, begin, tokenizer, dict(tokens=0)
    model = add_lora(start_model(args, start, seed)[0], seed=seed)
    if arm in REWARDS: told = by_verdicts(args, model, tokenizer, start, arm,
                                          seed, rate)
    else:
        tokens = once(args, "run", f"{start}_rl_{seed}", lambda: measured(
            args, f"{start}_rl", seed))["tokens"]
        told = by_copying(args, model, tokenizer, start, arm, seed, rate,
                          tokens)
    return model, begin, tokenizer, told


def best_rate(args):
    tried = {rate: finished(args, "rates", f"rl_{rate:g}") for rate in RATES}
    if not all(tried.values()): raise SystemExit("`rates` first")
    return max(tried, key=lambda rate: tried[rate]["right"])


def measured(args, name, seed):
    start, arm = name.split("_")
    rate = (0 if arm == "start" else best_rate(args) if arm in REWARDS
            else COPYING)
    model, begin, tokenizer, told = trained(args, name, seed, rate)
    whole, style = merge(model, torch.float32), style_of(start)
    found = dict(told, name=name, seed=seed, rate=rate,
                 right=answers(args, whole, tokenizer, style))
    if arm in ("start", "rl"): found |= spread(args, whole, begin, tokenizer,
                                               style)
    return found


def rates(args):
    for rate in RATES:
        def work():
            begin, tokenizer = start_model(args, "short", RATE_SEED)
            model = add_lora(begin, seed=RATE_SEED)
            told = by_verdicts(args, model, tokenizer, "short", "rl", RATE_SEED,
                               rate)
            right = answers(args, merge(model, torch.float32), tokenizer,
                            "think", ("taught",), "validation", 200)
            return dict(arm="rl", rate=rate, tokens=told["tokens"],
                        right=right["taught"].count("1"))
        once(args, "rates", f"rl_{rate:g}", work)


def run(args):
    for name in args.only:
        for seed in args.seeds:
            once(args, "run", f"{name}_{seed}",
                 lambda: measured(args, name, seed))


# The page.

def runs_of(result, name): # {seed: run}
    return {r["seed"]: r for r in result["run"] if r["name"] == name}


def share(text): return text.count("1") / len(text)


def against(result, a, b, group):
    "Points between two arms: over runs, and over problems seed by seed."
    left, right = (runs_of(result, name) for name in (a, b))
    seeds = sorted({*left} & {*right})
    if len(seeds) < 2: return None
    texts = [[way[s]["right"][group] for s in seeds] for way in (left, right)]
    found = paired_difference(*(map(share, some) for some in texts))
    return dict(zip(("mean", "low", "high", "p"), found), runs=len(seeds),
                problems=[mcnemar(*([x == "1" for x in t] for t in pair))
                          for pair in zip(*texts)])


def pass_curve(result, name, group, seed=0): # {k: [mean, low, high]}
    "pass@k over all runs; a bootstrap over problems gives the interval."
    runs = [r for r in runs_of(result, name).values() if "counts" in r]
    if not runs: return {}
    n, rng = result["attempts"], np.random.default_rng(seed)
    found = {}
    for k in (1, 2, 4, 8, 16, 32, 64):
        if k > n: break
        each = np.mean([[pass_at_k(n, c, k) for c in r["counts"][group]]
                        for r in runs], 0) # of a problem, over runs
        drawn = rng.choice(each, (2000, len(each))).mean(1)
        found[k] = [float(each.mean()), *map(float, np.quantile(
            drawn, (0.025, 0.975)))]
    return found


PAIRS = [(f"short_{a}", "short_start") for a in (
    "rl", "rejection", "written", "random", "equations", "repaired")] + [
    ("short_rl", "short_rejection"), ("short_rl", "short_written"),
    ("short_rl", "short_random"), ("short_repaired", "short_equations"),
    ("full_rl", "full_start"), ("full_rejection", "full_start"),
    ("full_rl", "full_rejection"), ("base_rl", "base_start")]


def tests(result):
    "{group: {'a, against b': test}}, Holm's p over the questions of a group."
    found = {}
    for group in GROUPS:
        some = {f"{a}, against {b}": t for a, b in PAIRS
                if (t := against(result, a, b, group))}
        for t, p in zip(some.values(), holm([t["p"] for t in some.values()])):
            t["holm"] = p
        found[group] = some
    return found


def lines(head, body):
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in body), ""]


def page(result):
    names = [a for a in ARMS if runs_of(result, a)]
    body, looks = [], []
    for name in names:
        runs = [r for _, r in sorted(runs_of(result, name).items())]
        body.append([name.replace("_", ": "), f"{runs[0]['rate']:g}",
                     "; ".join(f"{r['tokens']:,}" for r in runs), *(
                         "; ".join("{:.0%} [{:.0%}, {:.0%}]".format(
                             share(t), *wilson(t.count("1"), len(t)))
                             for t in (r["right"][g] for r in runs))
                         for g in GROUPS)])
        looks += [[name.replace("_", ": "), r["seed"], f"{r['length']:.0f}",
                   f"{r['entropy']:.3f}", f"{r['divergence']:.4f}"]
                  for r in runs if "counts" in r]
    text = ["# What do verdicts alone teach?", "",
            f"Greedy answers to {result['n']} test problems a group, seed by "
            "seed, with Wilson's interval over problems.", "",
            *lines(["arm", "rate", "trained tokens", *GROUPS], body)]
    for group, some in result["tests"].items():
        text += [f"## {group}: points between arms", "", *lines(
            ["question", "mean and 95 % over runs", "p over runs", "Holm",
             "runs", "p over problems, seed by seed"],
            [[name.replace("_", ": "), "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                *(100 * t[k] for k in ("mean", "low", "high"))),
              f"{t['p']:.2g}", f"{t['holm']:.2g}", t["runs"],
              ", ".join(f"{p:.2g}" for p in t["problems"])]
             for name, t in some.items()])]
    for group in SPREAD:
        curves = {a: c for a in names if (c := pass_curve(result, a, group))}
        ks = sorted({k for c in curves.values() for k in c})
        text += [f"## {group}: pass@k, {result['attempts']} attempts at 40 "
                 "problems, mean of the runs, bootstrap over problems", "",
                 *lines(["arm", *(f"k = {k}" for k in ks)],
                        [[a.replace("_", ": "), *(
                            "{:.0%} [{:.0%}, {:.0%}]".format(*c[k])
                            for k in ks)] for a, c in curves.items()])]
    text += ["## Attempts: length in tokens, entropy and divergence from the "
             "start in nats a token", "",
             *lines(["arm", "seed", "length", "entropy", "divergence"], looks),
             "## Rates: right of 200 validation problems", "",
             *lines(["arm", "rate", "right"], [
                 [r["arm"], f"{r['rate']:g}", r["right"]]
                 for r in result["rates"]]),
             f"{result['minutes']} core-minutes on "
             f"{'; '.join(result['machines'])}. "
             + "; ".join(f"`{c}`" for c in result["commands"]) + ".", ""]
    return "\n".join(text)


def table(args):
    result = dict(settings(args))
    for stage in ("rates", "run"):
        result[stage] = [finished(args, stage, path.stem) for path in sorted(
            (args.folder / stage).glob("*.json"))]
    records = result["rates"] + result["run"]
    if not result["run"]: raise SystemExit(f"{args.folder} holds no runs")
    result |= dict(minutes=round(sum(r["minutes"] for r in records)),
                   commands=sorted({r["command"] for r in records}),
                   machines=sorted({r["machine"] for r in records}))
    result["tests"] = tests(result)
    result["pass_at_k"] = {name: {g: c for g in SPREAD if (
        c := pass_curve(result, name, g))} for name in ARMS}
    write_whole(args.out / "reinforce.json", [json.dumps(result), "\n"])
    write_whole(args.out / "reinforce.md", [page(result)])


def unpack(args):
    "What the committed table holds, as files below --folder."
    result = json.loads((args.out / "reinforce.json").read_text())
    for stage in ("rates", "run"):
        (args.folder / stage).mkdir(parents=True, exist_ok=True)
        for r in result[stage]:
            name = (f"{r['arm']}_{r['rate']:g}" if stage == "rates" else
                    f"{r['name']}_{r['seed']}")
            write_whole(args.folder / stage / f"{name}.json",
                        [json.dumps(r), "\n"])


STAGES = dict(rates=rates, run=run, table=table, unpack=unpack)


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--student", default="student")
    parser.add_argument("--folder", type=Path, default=Path("_build/reinforce"))
    parser.add_argument("--out", type=Path, default=HERE)
    for name, value, text in (
            ("--n", 300, "test problems a group"),
            ("--steps", 20, "of reinforce"),
            ("--asked", 32, "problems a step"),
            ("--attempts", 64, "at each problem of pass@k"),
            ("--shrink", 1, "divide the steps of the starts")):
        parser.add_argument(name, type=int, default=value, help=text)
    args = parser.parse_args(words)
    args.command = " ".join(["python benchmarks/reinforce.py", *words])
    args.hash = file_hash(Path(find_base(args.student)[0]) / "model.safetensors"
                          )[:16]
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    STAGES[args.stage](args)


if __name__ == "__main__": main(sys.argv[1:])
