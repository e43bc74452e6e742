"""Which part gives RWKV-7 its head start? A ladder of mechanisms.

About 300 core-minutes. Two processes, A and B, need nothing of each other; in
brackets core-minutes, estimated on quiet cores (busy ones take a fifth more).
Every command says first what it will run and how long that may take, and ends
there with --plan.

    M="python benchmarks/mechanisms.py"
    $M time                                            # (3) first, alone
    $M rates --only =transformer +                     # A (30)
    $M train --tokens 0.6 time --only =transformer +   # A (51)
    $M train --tokens 2.5 --only =transformer +        # A (26)
    $M train --tokens 10 --seeds 0 --only =transformer # A (17)
    $M recall                                          # A (23)
    $M rates --only rwkv                               # B (46)
    $M train --tokens 0.6 --only rwkv                  # B (34)
    $M train --tokens 2.5 --only rwkv                  # B (38)
    $M train --tokens 10 --seeds 0 --only rwkv         # B (25)
    $M grade                                           # (9) after both
    $M table
    $M train --tokens 10 --seeds 1                     # (42) more, if wanted

`$M unpack` puts the runs of the committed table below --folder, to go on from
them.

The arms are those of nbs/13_comparison, all of one size; RWKV-7 with a tied
head and without the norm after its embedding are left out, for time: the ladder
has a rung for each. Every run is a file below --folder: a finished one is not
repeated, and a killed one goes on from its last checkpoint (recall and grading:
from the start of that run). Processes share the work by --only (arms whose name
begins so), --seeds and --tokens. `table` gathers what is there into
mechanisms.json and mechanisms.md, and refuses files that were made with other
settings.

* rates: 2e-3 and 4e-3, then on in factors of two, towards the better one,
  until the best has a worse one on both sides; 0.6 million tokens, a seed that
  is not used again, the loss on solution tokens of the validation split. The
  curve is taken to have one valley. No test problem is read.
* train: at 0.6 million tokens all arms, five seeds, and three of RWKV-7
  without a part. At 2.5 million, three seeds, the plain transformer, the whole
  ladder, RWKV-7 and RWKV-7 without the part whose loss hurt most at 0.6
  million (on validation). At 10 million the two ends, for a look: one seed, or
  two. *time*: the plain transformer and the whole ladder, three seeds, as many
  steps as fit into the time that RWKV-7 takes for 0.6 million tokens, measured
  by `time`. Arms of a seed read the same text in the same order; the schedule
  is scaled to each run. Loss on the test split, on all tokens and on those of
  solutions.
* grade: runs of 2.5 million tokens and more; familiar test problems.
* recall: key, value, key, value, ..., then keys again, by arms of two layers
  with one head of 64. Two memories of 64 by 64 hold 128 keys at right angles;
  up to 160 pairs are asked for, and the arms are tested there. Trained from
  scratch on random pairs, small numbers of them first; three seeds, each arm at
  a rate of its own, swept like the others.
* time: core-seconds of training steps, in turn.

A step is the same for all arms: 4,096 tokens, one thread, bf16 products,
compiled. It is taken in two halves, which saves RWKV-7 a seventh of its time
and costs the transformer none.

The unit of every test is the run: paired differences by seed, t intervals.
Beside those of answers stands McNemar's test over problems."""
import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean, median
from time import process_time
from types import SimpleNamespace

import datasets
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from scipy import stats

from tiny_reason.comparison import (ARMS as ALL, build, LADDER, new_arm,
                                    parameters)
from tiny_reason.data import encode_problems
from tiny_reason.eval import evaluate
from tiny_reason.lib.checkpoints import Stopped
from tiny_reason.lib.device import machine
from tiny_reason.lib.disk import discard, file_hash, write_whole
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.lib.problems import load_problems
from tiny_reason.lib.stats import holm, mcnemar, paired_difference, wilson
from tiny_reason.pretrain import (Plan, as_function, make_optimizers, pretrain,
                                  rows, take_steps, train_step)

HERE = Path(__file__).parent
ARMS = tuple(arm for arm in ALL if arm not in ("rwkv - norm", "rwkv - head"))
FULL = [*LADDER][-1] # the transformer with every mechanism
LONG = ("transformer", FULL, "rwkv")
LESS = tuple(arm for arm in ARMS if arm.startswith("rwkv - "))
STEPS = {"0.6": 146, "2.5": 610, "10": 2441} # of 16 rows of 256
TIME = "time" # a budget, too: of RWKV-7's time for the first one
SEEDS = {"0.6": 5, TIME: 3, "2.5": 3, "10": 2}
LESS_SEEDS = 3 # of RWKV-7 without a part
RATES = (2e-3, 4e-3) # neighbours: the sweep goes on from them
RATE_SEED = 9
PROBLEMS = dict(validation=200, test=500) # that losses are measured on
RECALL = (*LONG, "rwkv - delta")
PAIRS = (8, 32, 64, 96, 128, 160) # in a row of recall
KEYS, ROW = 192, 384 # ids 0 to 191 are keys, the next 192 are values
SMALL = dict(width=64, layers=2, vocab_size=2 * KEYS)
RECALL_STEPS, RECALL_SEEDS = 500, 3
# Core-seconds of a step, of a run's ends, of a step of recall, of 300 answers,
# of compiling; measured on an AMD EPYC of family 26. True: RWKV-7.
COST = {False: (0.41, 8, 0.08, 30, 20), True: (0.6, 14, 0.13, 45, 100)}


def slug(*parts): return "_".join(str(p).replace(" ", "") for p in parts)


def cost(arm): return COST[arm.startswith("rwkv")]


def plan_of(steps, rate):
    return Plan(steps=steps, batch=8, accumulation=2, length=256,
                learning_rate=rate, warmup=min(100, max(1, steps // 6)))


# What is finished, and what is to be done.

def settings(args, stage):
    "What results must share to stand in one table."
    plan = plan_of(1, 0)
    common = dict(steps=args.steps, problems=args.problems,
                  recall_steps=args.recall_steps, tokenizer=args.text_hash,
                  rows=[plan.batch, plan.accumulation, plan.length])
    return common | (dict(n=args.n) if stage == "grade" else {})


def read(args, path):
    "A finished run. `SystemExit`: it was made with other settings."
    record = json.loads(path.read_text())
    for key, value in settings(args, path.parent.name).items():
        there = record["settings"].get(key)
        if there != value: raise SystemExit(
            f"{path} was made with {key} {there!r}, this command has {value!r}:"
            " repeat its flags, or choose another --folder")
    return record


def gathered(args, stage):
    return [read(args, p)
            for p in sorted((args.folder / stage).glob("*.json"))]


def finished(args, stage, name): # its record, or None
    path = args.folder / stage / f"{name}.json"
    return read(args, path) if path.is_file() else None


def used(): return sum(os.times()[:4]) # core-seconds, compilers' too


def once(args, stage, name, work):
    "What a finished run has written; else do it now and write it."
    found = finished(args, stage, name)
    if found: return found
    start = used()
    record = dict(work(), settings=settings(args, stage),
                  minutes=round((used() - start) / 60, 2),
                  machine=machine(), command=args.command)
    (args.folder / stage).mkdir(parents=True, exist_ok=True)
    write_whole(args.folder / stage / f"{name}.json",
                [json.dumps(record, indent=1), "\n"])
    print(f"{stage}: {name}, {record['minutes']} core-minutes", flush=True)
    return read(args, args.folder / stage / f"{name}.json")


def in_turn(args, stage, jobs): # (arm, name, core-seconds, () -> dict) each
    todo = [job for job in jobs if not finished(args, stage, job[1])]
    print(f"{stage}: {len(todo)} of {len(jobs)} runs to do, about "
          f"{sum(job[2] for job in todo) / 60:.0f} core-minutes:",
          ", ".join(job[1] for job in todo) or "none", flush=True)
    last = None
    for arm, name, _, work in [] if args.plan else todo:
        if arm != last: torch._dynamo.reset() # each arm is another graph
        last = arm
        once(args, stage, name, work)


# Training.

def text(tokenizer, split, n, seed):
    "Problems of the first two groups: ids, and 1 where a solution stands."
    encoded = encode_problems(load_problems("arithmetic", "main", split, n,
                                            seed), tokenizer, "question")
    return ([e["input_ids"] for e in encoded],
            [e["completion_mask"] for e in encoded])


@torch.no_grad()
def losses(model, tokenizer, split, n):
    "Nats a token of unseen problems: of all tokens, of those of solutions."
    ids, masks = text(tokenizer, split, n, 0)
    model.eval()
    total, solution, count, inside = 0.0, 0.0, 0, 0
    for (x, y), (_, mask) in zip(rows(ids, 8, 256), rows(masks, 8, 256)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(),
                               reduction="none")
        total += loss.sum().item()
        solution += (loss * mask.flatten()).sum().item()
        count, inside = count + y.numel(), inside + int(mask.sum())
    return dict(all=total / count, solution=solution / inside, n=n)


def run(args, arm, seed, steps, rate, name, test=True, keep=False):
    "Train an arm; its losses and log, and its weights if they are kept."
    out = args.folder / "runs" / name / "weights"
    plan = plan_of(steps, rate)
    documents, _ = text(args.tokenizer, "train", plan.tokens // 130 + 100, seed)
    held, _ = text(args.tokenizer, "validation", 130, 0)
    model = new_arm(arm, seed)
    log = pretrain(model, args.tokenizer, documents, out, plan,
                   [*rows(held, 8, 256)][:8], resume=True,
                   save_every=max(1, steps // 4), compiled=args.shrink == 1)
    found = dict(arm=arm, seed=seed, tokens=plan.tokens, rate=rate,
                 parameters=parameters(model), log=log,
                 feed_forward=model.config.intermediate_size)
    for split in ("validation", "test") if test else ("validation",):
        found[split] = losses(model, args.tokenizer, split,
                              args.problems[split])
    if not keep: discard(out)
    return found


def next_rates(tried): # {rate: loss}
    "What to try next; nothing if those beside the best are both worse."
    if not {*RATES} <= {*tried}: return {*RATES} - {*tried}
    best = min(tried, key=tried.get)
    return {best / 2, best * 2} - {*tried}


def sweep(ask): # rate -> loss
    "{rate: loss}, until those beside the best are both worse."
    tried = {}
    while rates := next_rates(tried):
        tried |= {rate: ask(rate) for rate in sorted(rates)}
    return tried


def tried_rates(args, arm, stage): # {rate: loss}
    return {r["rate"]: r["loss"] for r in gathered(args, stage)
            if r["arm"] == arm}


def best_rate(args, arm, stage="rates"):
    tried = tried_rates(args, arm, stage)
    if next_rates(tried):
        raise SystemExit(f"the rate of {arm!r} is not found yet: "
                         f"`{stage.partition('_')[0]}` first")
    return min(tried, key=tried.get)


def find_rates(args, stage, seconds, # {arm: core-seconds of a run}
               attempt): # (arm, rate) -> record, with its loss
    left = {}
    for arm in seconds:
        tried = tried_rates(args, arm, stage)
        left[arm] = len(next_rates(tried)) + (not {*RATES} <= {*tried})
    print(f"{stage}: {sum(left.values())} runs to do, more for an arm whose "
          "best is at the edge, about "
          f"{sum(n * seconds[arm] for arm, n in left.items()) / 60:.0f} "
          "core-minutes", flush=True)
    for arm in {} if args.plan else seconds:
        torch._dynamo.reset()

        def ask(rate):
            def work(): # a run that ends in no numbers has lost
                try: return attempt(arm, rate)
                except FloatingPointError as error:
                    return dict(arm=arm, rate=rate, loss=99.0,
                                failed=str(error))
            return once(args, stage, slug(arm, rate), work)["loss"]

        print(arm, {r: round(v, 3) for r, v in sorted(sweep(ask).items())},
              flush=True)


def rates(args):
    steps = args.steps["0.6"]

    def attempt(arm, rate):
        found = run(args, arm, RATE_SEED, steps, rate,
                    f"rate_{slug(arm, rate)}", test=False)
        return dict(found, loss=found["validation"]["solution"])
    find_rates(args, "rates", { # three of an arm share its compiling
        arm: steps * cost(arm)[0] + cost(arm)[1] + cost(arm)[4] / 3
        for arm in args.arms}, attempt)


def most_missed(args):
    "RWKV-7 without the part that it misses most, by validation loss."
    found = {arm: [] for arm in LESS}
    for r in gathered(args, "train"):
        if r["arm"] in found and r["size"] == "0.6":
            found[r["arm"]].append(r["validation"]["solution"])
    if min(map(len, found.values())) < LESS_SEEDS: # it might change yet
        raise SystemExit("which part RWKV-7 misses most is not known yet: "
                         "`train --tokens 0.6 --only rwkv` first")
    return max(found, key=lambda arm: mean(found[arm]))


def wanted(args, size):
    "(arm, seed) of a budget, of those that were asked for."
    arms = {"0.6": ARMS, TIME: LONG[:2], "2.5": LONG, "10": LONG[::2]}[size]
    if size == "2.5" and {*LESS} & {*args.arms}: arms += most_missed(args),
    return [(arm, seed) for arm in arms if arm in args.arms
            for seed in range(min(SEEDS[size], LESS_SEEDS) if arm in LESS
                              else SEEDS[size]) if seed in args.seeds]


def steps_of(args, arm, size):
    if size != TIME: return args.steps[size]
    found = finished(args, "time", "time")
    if not found: raise SystemExit("how fast the arms are is not known yet: "
                                   "`time` first")
    speed = found["tokens_a_second"]
    return round(args.steps["0.6"] * speed[arm] / speed["rwkv"])


def train(args):
    jobs = []
    for size in args.tokens:
        for arm, seed in wanted(args, size):
            def work(arm=arm, seed=seed, size=size):
                return dict(run(
                    args, arm, seed, steps_of(args, arm, size),
                    best_rate(args, arm), slug(arm, size, seed),
                    keep=size in ("2.5", "10")), size=size)
            jobs.append((arm, slug(arm, size, seed), cost(arm)[1]
                         + steps_of(args, arm, size) * cost(arm)[0], work))
    in_turn(args, "train", jobs)


# Answers, recall, time.

def grade(args):
    problems = [dict(p) for p in load_problems("arithmetic", "familiar",
                                               "test", args.n)]
    ends = {k: getattr(args.tokenizer, k)
            for k in ("eos_token_id", "pad_token_id")}

    def ask(arm, seed, size, weights):
        model = new_arm(arm, seed)
        lost = model.load_state_dict(load_file(weights), strict=False)
        assert {*lost.missing_keys} <= {"lm_head.weight", "head.weight"}, lost
        model.generation_config.update(**ends)
        report = evaluate(model.eval(), args.tokenizer, problems, "question",
                          max_new_tokens=200)
        return dict(arm=arm, seed=seed, size=size, group="familiar",
                    right="".join("01"[r["correct"]] for r in report.records))

    jobs = []
    for size in (s for s in args.tokens if s in ("2.5", "10")):
        for arm, seed in wanted(args, size):
            name = slug(arm, size, seed)
            weights = args.folder / "runs" / name / "weights"
            if not finished(args, "train", name):
                print(f"{name} is not trained yet, and not graded")
                continue
            jobs.append((arm, name, cost(arm)[3] * args.n / 300,
                         lambda told=(arm, seed, size,
                                      weights / "model.safetensors"):
                         ask(*told)))
    in_turn(args, "grade", jobs)


def recall_row(n, generator):
    "n pairs, then questions: ids (ROW,), targets (ROW,), -100 unless asked."
    keys = torch.randperm(KEYS, generator=generator)[:n]
    values = KEYS + torch.randint(KEYS, (n,), generator=generator)
    asked = torch.randint(n, (ROW // 2 - n,), generator=generator)
    pairs = torch.stack([keys, values], 1)
    ids = torch.cat([pairs, pairs[asked]]).flatten()
    targets = torch.full((ROW,), -100)
    targets[2 * n::2] = values[asked]
    return ids, targets


def recall_batch(numbers, generator):
    return [torch.stack(part) for part in zip(*(
        recall_row(n, generator) for n in numbers))]


@torch.no_grad()
def recalled(model, seed, rounds=8):
    "{pairs: [right values, asked]} and the loss, of rows never trained on."
    generator, found, total = torch.Generator().manual_seed(seed), {}, 0.0
    model.eval()
    for n in PAIRS:
        right = asked = 0
        for _ in range(rounds):
            x, y = recall_batch([n] * 8, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(x, use_cache=False).logits.float()
            right += int((logits.argmax(-1) == y)[y >= 0].sum())
            asked += int((y >= 0).sum())
            total += F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        found[n] = [right, asked]
    return found, total / rounds / len(PAIRS)


def learn_recall(args, arm, seed, rate, rows_seed):
    "Train a small arm on random pairs; its log, then what it recalls."
    steps = args.recall_steps
    plan = plan_of(steps, rate)
    model = new_arm(arm, seed, parameters(build("rwkv", 256, **SMALL)), **SMALL)
    generator = torch.Generator().manual_seed(seed)
    forward, optimizers = as_function(model), make_optimizers(model, plan)
    state = SimpleNamespace(model=model, optimizers=optimizers,
                            out=args.folder / "recall")

    def batches():
        for step in range(steps):
            known = PAIRS[:1 + 2 * step * len(PAIRS) // steps] # all by half
            picks = torch.randint(len(known), (8,), generator=generator)
            yield step, [recall_batch([known[i] for i in picks], generator)]
    log = [(step, round(loss, 4)) for step, loss in take_steps(
        state, forward, batches(), plan) if step % 20 == 0]
    found, loss = recalled(model, rows_seed)
    return dict(arm=arm, seed=seed, steps=steps, rate=rate, log=log,
                parameters=parameters(model), recalled=found, loss=loss)


def recall(args):
    seconds = {arm: args.recall_steps * cost(arm)[2] + 3
               for arm in RECALL if arm in args.arms}
    find_rates(args, "recall_rates", seconds, lambda arm, rate: learn_recall(
        args, arm, RATE_SEED, rate, 10**6))
    in_turn(args, "recall", [
        (arm, slug(arm, seed), seconds[arm], lambda arm=arm, seed=seed:
         learn_recall(args, arm, seed, best_rate(args, arm, "recall_rates"),
                      10**6 + 1))
        for arm in seconds for seed in range(RECALL_SEEDS)
        if seed in args.seeds])


def time(args):
    def measure():
        "Tokens a core-second of whole training steps, arms in turn."
        plan, jobs = plan_of(100, 1e-3), {}
        halves = torch.randint(1152, (2, 8, 256),
                               generator=torch.manual_seed(0))
        for arm in LONG:
            model = new_arm(arm, 0)

            def step(forward=as_function(model, args.shrink == 1),
                     optimizers=make_optimizers(model, plan)):
                train_step(forward, [(x, x) for x in halves])
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            jobs[arm] = step
            step() # compiles
        taken = {arm: [] for arm in jobs}
        for _ in range(args.rounds):
            for arm, job in jobs.items():
                start = process_time()
                job()
                taken[arm].append(process_time() - start)
        return dict(rounds=args.rounds, tokens_a_second={
            arm: halves.numel() / median(t) for arm, t in taken.items()})
    in_turn(args, "time", [(LONG, "time", 150, measure)])


# The page.

def by_seed(result, arm, size, kind="solution"): # {seed: test loss}
    if size == TIME and arm == "rwkv": size = "0.6" # whose time it is
    return {r["seed"]: r["test"][kind] for r in result["train"]
            if r["arm"] == arm and r["size"] == size}


def difference(a, b): # {seed: figure} of two arms
    "Of a - b over their common seeds; None with less than two."
    seeds = sorted({*a} & {*b})
    if len(seeds) < 2: return None
    found = paired_difference(*([way[s] for s in seeds] for way in (a, b)))
    return dict(zip(("mean", "low", "high", "p"), found), runs=len(seeds))


def against(arm):
    "Whom an arm is compared with: the rung below, or RWKV-7 with all parts."
    if arm == "transformer": return None
    if arm in LADDER: return [*LADDER][[*LADDER].index(arm) - 1]
    return FULL if arm == "rwkv" else "rwkv"


def pairs(size): # whose runs are compared
    if size == TIME: return [("rwkv", arm) for arm in LONG[:2]]
    found = [(arm, against(arm)) for arm in ARMS if against(arm)]
    return found + [(arm, "transformer") for arm in LONG[1:]]


def with_holm(tests): # {name: difference or None}
    found = {name: t for name, t in tests.items() if t}
    for t, p in zip(found.values(), holm([t["p"] for t in found.values()])):
        t["holm"] = p
    return found


def comparisons(result):
    "{budget: {'arm, against other': difference}}, Holm's p by budget."
    return {size: with_holm({
        f"{a}, against {b}": difference(by_seed(result, a, size),
                                        by_seed(result, b, size))
        for a, b in dict.fromkeys(pairs(size))}) for size in SEEDS}


def answers(result):
    "As `comparisons`, of shares of right answers; McNemar's p of each seed."
    found = {}
    for size in ("2.5", "10"):
        right = {arm: {g["seed"]: g["right"] for g in result["grade"]
                       if (g["arm"], g["size"]) == (arm, size)}
                 for arm in ARMS}
        share = {arm: {s: v.count("1") / len(v) for s, v in some.items()}
                 for arm, some in right.items()}
        found[size] = with_holm({
            f"{a}, against {b}": difference(share[a], share[b])
            for a, b in dict.fromkeys(pairs(size))})
        for name, t in found[size].items():
            a, b = (right[arm] for arm in name.split(", against "))
            t["problems"] = [mcnemar(*([x == "1" for x in way[s]]
                                       for way in (a, b)))
                             for s in sorted({*a} & {*b})]
    return found


def recall_tests(result):
    "RWKV-7 against the others, shares at the most pairs, over runs."
    def share(arm): return {
        r["seed"]: r["recalled"][n][0] / r["recalled"][n][1]
        for r in result["recall"] if r["arm"] == arm}
    n = str(PAIRS[-1])
    return with_holm({f"{arm}, against rwkv": difference(share(arm),
                                                         share("rwkv"))
                      for arm in RECALL if arm != "rwkv"})


def mean_text(values):
    if not values: return ""
    if len(values) < 2: return f"{values[0]:.3f}"
    low, high = stats.t.interval(0.95, len(values) - 1, mean(values),
                                 stats.sem(values))
    return f"{mean(values):.3f} [{low:.3f}, {high:.3f}]"


def table_lines(head, body):
    if not body: return []
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in body), ""]


def arm_lines(result, size):
    body = []
    for arm in ARMS:
        some = [r for r in result["train"]
                if r["arm"] == arm and r["size"] == size]
        if some: body.append([
            arm, f"{some[0]['parameters']:,}", some[0]["feed_forward"],
            f"{some[0]['rate']:g}", f"{some[0]['tokens']:,}", len(some),
            *(mean_text([r["test"][k] for r in some])
              for k in ("all", "solution"))])
    return table_lines(["arm", "parameters", "feed-forward", "rate", "tokens",
                        "runs", "loss, all", "loss, solution"], body)


def test_lines(tests, more={}): # more: {heading: difference -> text}
    return table_lines(
        ["difference", "mean", "p over runs", "Holm", "runs", *more],
        [[name, f"{t['mean']:+.3f} [{t['low']:+.3f}, {t['high']:+.3f}]",
          f"{t['p']:.2g}", f"{t['holm']:.2g}", t["runs"],
          *(text(t) for text in more.values())] for name, t in tests.items()])


def titled(title, lines): # nothing of nothing
    return [f"## {title}", "", *lines] if lines else []


def budget_lines(result, size):
    title = ("In the time that RWKV-7 takes for its smallest budget"
             if size == TIME else f"{size} million tokens")
    return titled(title, arm_lines(result, size)
                  + test_lines(result["comparisons"][size]))


def rate_lines(records, arms):
    tried = sorted({r["rate"] for r in records})
    body = []
    for arm in arms:
        row = {r["rate"]: r["loss"] for r in records if r["arm"] == arm}
        if row: body.append([arm, *(f"{row[r]:.3f}" if r in row else ""
                                    for r in tried),
                             f"{min(row, key=row.get):g}"])
    return table_lines(["arm", *(f"{r:g}" for r in tried), "taken"], body)


def answer_lines(result):
    lines = []
    for size, tests in result["answers"].items():
        body = [[g["arm"], g["seed"], "{:.1%} [{:.1%}, {:.1%}]".format(
            k / n, *wilson(k, n))] for g in result["grade"]
            if g["size"] == size
            for k, n in [(g["right"].count("1"), len(g["right"]))]]
        lines += titled(
            f"Right answers, {size} million tokens",
            table_lines(["arm", "seed", "familiar"], body)
            + test_lines(tests, {"p over problems, seed by seed": lambda t:
                         ", ".join(f"{p:.2g}" for p in t["problems"])}))
    return lines


def recall_lines(result):
    body = []
    for arm in RECALL:
        runs = [r for r in result["recall"] if r["arm"] == arm]
        if runs: body.append([
            arm, f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g}",
            len(runs), *("; ".join("{:.0%}".format(
                r["recalled"][str(n)][0] / r["recalled"][str(n)][1])
                for r in runs) for n in PAIRS)])
    return table_lines(["arm", "parameters", "rate", "runs",
                        *(f"{n} pairs" for n in PAIRS)], body)


def to_markdown(result):
    speed = result["time"].get("tokens_a_second", {})
    return "\n".join([
        "# Which part gives the head start?", "",
        "Arms of nbs/13_comparison at equal parameters. Losses in nats a token "
        f"on {result['problems']['test']} problems of the test split, means "
        "over runs with 95 % t intervals; differences are paired by seed, p by "
        "the paired t test, Holm's over all tests of a table. Below zero: the "
        "first arm learns more. Answers: greedy, Wilson's interval over "
        "problems; beside the test over runs, exact McNemar of each seed. "
        "What is said of a mechanism follows the weaker one.", "",
        *(line for size in SEEDS for line in budget_lines(result, size)),
        *answer_lines(result),
        *titled("Recall: share of right values, each seed", recall_lines(
            result) + test_lines(result["recall_tests"])),
        *titled("Time", table_lines(["arm", "tokens a core-second"], [
            [arm, f"{v:,.0f}"] for arm, v in speed.items()])),
        *titled("Rates: validation loss on solution tokens",
                rate_lines(result["rates"], ARMS)),
        *titled("Rates of recall: loss on rows of their own",
                rate_lines(result["recall_rates"], RECALL)),
        f"{result['minutes']} core-minutes on {'; '.join(result['machines'])}. "
        + "; ".join(f"`{c}`" for c in result["commands"]) + ".", ""])


def check_rates(args, result):
    "`SystemExit`: a run was trained at a rate that is not the best any more."
    for stage, source in ("train", "rates"), ("recall", "recall_rates"):
        for arm in {r["arm"] for r in result[stage]}:
            best = best_rate(args, arm, source)
            for r in result[stage]:
                if r["arm"] == arm and r["rate"] != best: raise SystemExit(
                    f"{arm!r}, seed {r['seed']} of {stage!r} ran at "
                    f"{r['rate']:g}, and the best rate is {best:g}: delete "
                    "that run's file and repeat it")


def table(args):
    result = {stage: gathered(args, stage) for stage in KEPT}
    if not any(result.values()): raise SystemExit(
        f"{args.folder} holds no results")
    check_rates(args, result)
    result["time"] = finished(args, "time", "time") or {}
    records = [r for s in KEPT for r in result[s]] + [
        r for r in [result["time"]] if r]
    result |= dict(settings(args, "grade"), shrink=args.shrink,
                   minutes=round(sum(r["minutes"] for r in records)),
                   commands=sorted({r["command"] for r in records}),
                   machines=sorted({r["machine"] for r in records}))
    result |= dict(comparisons=comparisons(result), answers=answers(result),
                   recall_tests=recall_tests(result))
    result = json.loads(json.dumps(result))
    write_whole(args.out / "mechanisms.json", [json.dumps(result), "\n"])
    write_whole(args.out / "mechanisms.md", [to_markdown(result)])


def unpack(args):
    "What the committed table holds, as files below --folder."
    result = json.loads((args.out / "mechanisms.json").read_text())
    names = dict(rates=("arm", "rate"), recall_rates=("arm", "rate"),
                 recall=("arm", "seed"))
    found = [(stage, slug(*(r[key] for key in names.get(
        stage, ("arm", "size", "seed")))), r)
        for stage in KEPT for r in result[stage]]
    if result["time"]: found.append(("time", "time", result["time"]))
    for stage, name, record in found:
        (args.folder / stage).mkdir(parents=True, exist_ok=True)
        write_whole(args.folder / stage / f"{name}.json",
                    [json.dumps(record, indent=1), "\n"])


KEPT = "rates", "train", "grade", "recall_rates", "recall" # and time
STAGES = dict(time=time, rates=rates, train=train, grade=grade, recall=recall,
              table=table, unpack=unpack)


def chosen(names): # of --only
    "Arms that begin so. `ValueError` for a name that is none's beginning."
    def fits(arm, name):
        return arm == name[1:] if name[:1] == "=" else arm.startswith(name)
    for name in names:
        if not any(fits(arm, name) for arm in ARMS): raise ValueError(
            f"no arm begins with {name!r}; there are {', '.join(ARMS)}")
    return [arm for arm in ARMS if any(fits(arm, name) for name in names)]


def arguments(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--only", nargs="+", default=[""],
                        help="arms that begin so; = before a name: this one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(5)])
    parser.add_argument("--tokens", nargs="+", choices=SEEDS, default=[*SEEDS],
                        help="millions, or `time`, for train and grade")
    parser.add_argument("--plan", action="store_true",
                        help="say what would run, and end")
    parser.add_argument("--n", type=int, default=300, help="test problems")
    parser.add_argument("--rounds", type=int, default=9, help="of `time`")
    parser.add_argument("--shrink", type=int, default=1,
                        help="divide all steps, to try the script out")
    parser.add_argument("--folder", type=Path,
                        default=Path("_build/mechanisms"))
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(words)
    try: args.arms = chosen(args.only)
    except ValueError as error: parser.error(str(error))
    args.steps, args.problems = ({k: max(least, v // args.shrink)
                                  for k, v in sizes.items()}
                                 for sizes, least in ((STEPS, 2),
                                                      (PROBLEMS, 30)))
    args.recall_steps = max(2, RECALL_STEPS // args.shrink)
    args.command = " ".join(["python benchmarks/mechanisms.py", *words])
    return args


def main(words):
    args = arguments(words)
    torch.set_num_threads(1)
    # beyond the limit a model would silently run uncompiled
    torch._dynamo.config.recompile_limit = 64
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    student = Path(find_base("student")[0])
    args.tokenizer = load_tokenizer(student)
    args.text_hash = file_hash(student / "tokenizer.json")[:16]
    try: STAGES[args.stage](args)
    except Stopped as stopped:
        raise SystemExit(f"{stopped}; the same command goes on") from None


if __name__ == "__main__": main(sys.argv[1:])
