"""Which part gives RWKV-7 its head start? A ladder of mechanisms.

    python benchmarks/mechanisms.py rates [--only rwkv]  # a rate for each arm
    python benchmarks/mechanisms.py train [--tokens 0.6] [--seeds 0 1]
    python benchmarks/mechanisms.py grade                # greedy answers
    python benchmarks/mechanisms.py recall               # keys and values
    python benchmarks/mechanisms.py time                 # on a quiet core
    python benchmarks/mechanisms.py table

The arms are those of nbs/13_comparison, all of one size. Every run is a file
below --folder: a finished one is not repeated, and a killed one goes on from
its last checkpoint, so that processes can share the work by --only (arms whose
name begins so), --seeds and --tokens. `table` gathers what is there into
mechanisms.json and mechanisms.md.

* rates: 1e-3, 2e-3 and 4e-3, then outwards by factors of two (5e-4, 8e-3,
  ...) until the best is not at the edge; 0.6 million tokens, a seed that is
  not used again, the loss on solution tokens of the validation split. A rate
  beyond a worse one is not tried: the curve is taken to have one valley.
* train: all arms at 0.6 million tokens, five seeds; at 2.5 million, five
  seeds, the plain transformer, the whole ladder, RWKV-7 and RWKV-7 without the
  part whose loss hurt most at 0.6 million (on validation); at 10 million, two
  seeds of the first three. RWKV-7 without a changing decay is left out, for
  time. Arms of a seed read the same text in the same
  order; the schedule is scaled to each run. Loss on the test split, on all
  tokens and on those of solutions.
* grade: runs of 2.5 million tokens and more; familiar test problems.
* recall: key, value, key, value, ..., then keys again. In rows of 512 tokens
  up to 224 pairs; three heads of 64 hold 192 keys at right angles in a layer.
  Trained from scratch on random pairs; small numbers of them come first.
* time: training steps in turn. At equal time, an arm's loss is read off a
  line through the ends of its own runs, over the logarithm of tokens. (Not
  off one run's curve: its rate has not yet fallen in the middle.)

The unit of every test is the run: paired differences by seed, t intervals."""
import argparse
import json
import math
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import datasets
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from scipy import stats

from tiny_reason.comparison import ARMS as ALL, LADDER, new_arm, parameters
from tiny_reason.data import encode_problems
from tiny_reason.eval import evaluate
from tiny_reason.lib.device import machine
from tiny_reason.lib.disk import discard, write_whole
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.lib.problems import load_problems
from tiny_reason.lib.stats import wilson
from tiny_reason.pretrain import (Plan, as_function, make_optimizers, pretrain,
                                  rate_at, rows, train_step)

HERE = Path(__file__).parent
ARMS = tuple(arm for arm in ALL if arm != "rwkv - decay") # dear, and last
FULL = [*LADDER][-1] # the transformer with every mechanism
LONG = ("transformer", FULL, "rwkv")
STEPS = {"0.6": 146, "2.5": 610, "10": 2441} # of 16 rows of 256
SEEDS = {"0.6": 5, "2.5": 5, "10": 2}
RATES = (1e-3, 2e-3, 4e-3) # then outwards, while the best is at the edge
RATE_SEED = 9
RECALL = (*LONG, "rwkv - delta")
PAIRS = (4, 16, 64, 128, 192, 224) # in a row of recall
ROW, RECALL_STEPS = 512, 300
KEYS = 512 # ids 0 to 511 are keys, the next 512 are values


def slug(*parts): return "_".join(str(p).replace(" ", "") for p in parts)


def plan_of(steps, rate):
    return Plan(steps=steps, batch=16, length=256, learning_rate=rate,
                warmup=min(100, max(1, steps // 6)))


def once(path, work):
    "What a finished run has written; else do it now and write it."
    if not path.is_file():
        print(path.stem, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [json.dumps(work(), indent=1), "\n"])
    return json.loads(path.read_text())


def gathered(folder, stage):
    return [json.loads(p.read_text())
            for p in sorted((folder / stage).glob("*.json"))]


def text(tokenizer, split, n, seed):
    "Problems of the first two groups: ids, and 1 where a solution stands."
    encoded = encode_problems(load_problems("arithmetic", "main", split, n,
                                            seed), tokenizer, "question")
    return ([e["input_ids"] for e in encoded],
            [e["completion_mask"] for e in encoded])


@torch.no_grad()
def losses(model, tokenizer, split, n=500):
    "Nats a token of unseen problems: of all tokens, of those of solutions."
    ids, masks = text(tokenizer, split, n, 0)
    model.eval()
    total, solution, count, inside = 0.0, 0.0, 0, 0
    for (x, y), (_, mask) in zip(rows(ids, 16, 256), rows(masks, 16, 256)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(),
                               reduction="none")
        total += loss.sum().item()
        solution += (loss * mask.flatten()).sum().item()
        count, inside = count + y.numel(), inside + int(mask.sum())
    return dict(all=total / count, solution=solution / inside, n=n)


def run(args, arm, seed, size, rate, tokenizer, name):
    "Train an arm; its losses and log. Weights of the short runs are not kept."
    steps, out = args.steps[size], args.folder / "runs" / name / "weights"
    plan = plan_of(steps, rate)
    documents, _ = text(tokenizer, "train", plan.tokens // 130 + 100, seed)
    held, _ = text(tokenizer, "validation", 130, 0)
    model = new_arm(arm, seed)
    log = pretrain(model, tokenizer, documents, out, plan,
                   [*rows(held, 16, 256)][:4], resume=True,
                   save_every=max(1, steps // 4), compiled=args.shrink == 1)
    found = dict(arm=arm, seed=seed, tokens=plan.tokens, rate=rate,
                 parameters=parameters(model), log=log,
                 feed_forward=model.config.intermediate_size,
                 validation=losses(model, tokenizer, "validation"),
                 test=losses(model, tokenizer, "test"))
    if size == "0.6": discard(out)
    return found


def run_or_fail(args, arm, rate, tokenizer):
    "A run at a rate; one that ends in numbers that are none has lost."
    try:
        return run(args, arm, RATE_SEED, "0.6", rate, tokenizer,
                   f"rate_{slug(arm, rate)}")
    except FloatingPointError as error:
        return dict(arm=arm, rate=rate, failed=str(error),
                    validation=dict(all=99.0, solution=99.0))


def find_rates(args, tokenizer):
    for arm in args.arms:
        torch._dynamo.reset() # each arm is another graph
        tried, todo = {}, {*RATES}
        while todo:
            for rate in sorted(todo):
                path = args.folder / "rates" / f"{slug(arm, rate)}.json"
                tried[rate] = once(path, lambda: run_or_fail(
                    args, arm, rate, tokenizer))["validation"]["solution"]
            best, least, most = min(tried, key=tried.get), *(
                f(tried) for f in (min, max))
            todo = ({best / 2} if best == least else
                    {best * 2} if best == most else {})
        print(arm, {r: round(v, 3) for r, v in sorted(tried.items())},
              flush=True)


def best_rate(folder, arm):
    tried = {r["rate"]: r["validation"]["solution"]
             for r in gathered(folder, "rates") if r["arm"] == arm}
    best = min(tried, key=tried.get, default=None)
    if not {*RATES} <= {*tried} or best in (min(tried), max(tried)):
        raise SystemExit(f"the rate of {arm!r} is not found yet: `rates` first")
    return best


def most_missed(folder, tokens):
    "RWKV-7 without the part that it misses most, by validation loss."
    found = {arm: [] for arm in ARMS if arm.startswith("rwkv - ")}
    for r in gathered(folder, "train"):
        if r["arm"] in found and r["tokens"] == tokens:
            found[r["arm"]].append(r["validation"]["solution"])
    if min(map(len, found.values())) < SEEDS["0.6"]: # or it might change yet
        raise SystemExit("which part RWKV-7 misses most is not known yet: "
                         "`train --tokens 0.6` first")
    return max(found, key=lambda arm: mean(found[arm]))


def wanted(args, size):
    "Arms and seeds of a budget that were asked for."
    arms = ARMS if size == "0.6" else LONG
    if size == "2.5":
        arms += most_missed(args.folder, 4096 * args.steps["0.6"]),
    return ([arm for arm in arms if arm in args.arms],
            [s for s in args.seeds if s < SEEDS[size]])


def train_all(args, tokenizer):
    for size in args.tokens:
        arms, seeds = wanted(args, size)
        for arm in arms:
            torch._dynamo.reset()
            rate = best_rate(args.folder, arm)
            for seed in seeds:
                name = slug(arm, size, seed)
                once(args.folder / "train" / f"{name}.json",
                     lambda: run(args, arm, seed, size, rate, tokenizer, name))


def grade_all(args, tokenizer):
    problems = [dict(p) for p in load_problems("arithmetic", "familiar",
                                               "test", args.n)]
    ends = {k: getattr(tokenizer, k) for k in ("eos_token_id", "pad_token_id")}

    def ask(arm, seed, weights):
        model = new_arm(arm, seed)
        model.load_state_dict(load_file(weights), strict=False)
        model.generation_config.update(**ends)
        report = evaluate(model.eval(), tokenizer, problems, "question",
                          max_new_tokens=200)
        return "".join(str(int(r["correct"])) for r in report.records)

    for size in (s for s in args.tokens if s != "0.6"):
        arms, seeds = wanted(args, size)
        for arm in arms:
            for seed in seeds:
                name = slug(arm, size, seed)
                weights = (args.folder / "runs" / name / "weights"
                           / "model.safetensors")
                if not weights.is_file(): continue
                once(args.folder / "grade" / f"{name}.json", lambda: dict(
                    arm=arm, seed=seed, tokens=4096 * args.steps[size],
                    group="familiar", right=ask(arm, seed, weights)))


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
def recalled(model, rounds):
    "Share of right values by number of pairs; rows that nobody trained on."
    generator, found = torch.Generator().manual_seed(10**6), {}
    model.eval()
    for n in PAIRS:
        right = asked = 0
        for _ in range(rounds):
            x, y = recall_batch([n] * 8, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                guess = model(x, use_cache=False).logits.argmax(-1)
            right += int((guess == y)[y >= 0].sum())
            asked += int((y >= 0).sum())
        found[n] = [right, asked]
    return found


def learn_recall(arm, seed, steps, rate, compiled):
    "Train an arm on random pairs; what it recalls, and its loss on the way."
    plan, model = plan_of(steps, rate), new_arm(arm, seed)
    generator = torch.Generator().manual_seed(seed)
    forward, optimizers = as_function(model, compiled), make_optimizers(
        model, plan)
    log, start = [], perf_counter()
    for step in range(steps):
        known = PAIRS[:1 + 2 * step * len(PAIRS) // steps] # all by half time
        picks = torch.randint(len(known), (8,), generator=generator)
        loss = train_step(forward, [recall_batch([known[i] for i in picks],
                                                 generator)])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(step, steps, plan.warmup)
            optimizer.step()
            optimizer.zero_grad()
        if not step % 20: log.append([step, round(loss, 4)])
    return dict(arm=arm, seed=seed, steps=steps, rate=rate, log=log,
                recalled=recalled(model, 8), seconds=perf_counter() - start)


def recall_all(args, tokenizer):
    steps = max(2, RECALL_STEPS // args.shrink)
    for arm in (a for a in RECALL if a in args.arms):
        torch._dynamo.reset()
        for seed in (s for s in args.seeds if s < 3):
            once(args.folder / "recall" / f"{slug(arm, seed)}.json",
                 lambda: learn_recall(arm, seed, steps,
                                      best_rate(args.folder, arm),
                                      args.shrink == 1))


def time_all(args, tokenizer):
    "Tokens a second of whole training steps, arms in turn."
    torch.set_num_threads(1)
    plan, jobs = plan_of(100, 1e-3), {}
    x = torch.randint(1152, (16, 256), generator=torch.manual_seed(0))
    for arm in args.arms:
        model = new_arm(arm, 0)

        def step(forward=as_function(model, args.shrink == 1),
                 optimizers=make_optimizers(model, plan)):
            train_step(forward, [(x, x)])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        jobs[arm] = step
        step() # compiles
    taken = {arm: [] for arm in jobs}
    for _ in range(args.rounds):
        for arm, job in jobs.items():
            start = perf_counter()
            job()
            taken[arm].append(perf_counter() - start)
    (args.folder / "time").mkdir(parents=True, exist_ok=True)
    write_whole(args.folder / "time" / "time.json", [json.dumps(dict(
        machine=machine(), rounds=args.rounds, tokens_a_second={
            arm: x.numel() / median(t) for arm, t in taken.items()}))])


def difference(a, b):
    "Mean of a - b by seed, its 95 % t interval, p; None with less than two."
    seeds = sorted({*a} & {*b})
    if len(seeds) < 2: return None
    test = stats.ttest_rel([a[s] for s in seeds], [b[s] for s in seeds])
    low, high = test.confidence_interval(0.95)
    return dict(runs=len(seeds), mean=mean(a[s] - b[s] for s in seeds),
                low=float(low), high=float(high), p=float(test.pvalue))


def by_seed(result, arm, tokens, kind="solution"):
    return {r["seed"]: r["test"][kind] for r in result["train"]
            if r["arm"] == arm and r["tokens"] == tokens}


def against(arm):
    "Whom an arm is compared with: the rung below, or RWKV-7 with all parts."
    if arm == "transformer": return None
    if arm in LADDER: return [*LADDER][[*LADDER].index(arm) - 1]
    return FULL if arm == "rwkv" else "rwkv"


def holm(tests):
    "Add Holm's p to each test of a family."
    worst = 0.0
    for i, t in enumerate(sorted(tests, key=lambda t: t["p"])):
        worst = max(worst, min(1.0, (len(tests) - i) * t["p"]))
        t["holm"] = worst


def comparisons(result):
    "All tests: {tokens: {'arm, against other': difference}}, Holm by budget."
    found = {}
    for tokens in sorted({r["tokens"] for r in result["train"]}):
        pairs = {(arm, against(arm)) for arm in ARMS if against(arm)}
        pairs |= {(arm, "transformer") for arm in (FULL, "rwkv")}
        tests = {f"{a}, against {b}": difference(
            by_seed(result, a, tokens), by_seed(result, b, tokens))
            for a, b in sorted(pairs, key=lambda p: ARMS.index(p[0]))}
        found[str(tokens)] = {k: t for k, t in tests.items() if t}
        holm(found[str(tokens)].values())
    return found


def equal_time(result):
    "Solution loss of the long arms in the time that RWKV-7's runs took."
    speed = result["time"].get("tokens_a_second", {})
    if not {*LONG} <= {*speed}: return {}
    found = {}
    budgets = sorted({r["tokens"] for r in result["train"]})
    for tokens in budgets[:-1]: # beyond the last run there is no line
        line = {}
        for arm in LONG:
            at, runs = tokens * speed[arm] / speed["rwkv"], {}
            for low, high in zip(budgets, budgets[1:]):
                if not low <= at <= high: continue
                share = math.log(at / low) / math.log(high / low)
                a, b = (by_seed(result, arm, t) for t in (low, high))
                runs = {s: a[s] + share * (b[s] - a[s]) for s in {*a} & {*b}}
                break
            line[arm] = dict(tokens=round(at), loss=runs)
        for cell in line.values():
            cell["against rwkv"] = difference(cell["loss"],
                                              line["rwkv"]["loss"])
        found[str(tokens)] = line
    return found


def mean_text(values):
    if not values: return ""
    if len(values) < 2: return f"{values[0]:.3f}"
    low, high = stats.t.interval(0.95, len(values) - 1, mean(values),
                                 stats.sem(values))
    return f"{mean(values):.3f} [{low:.3f}, {high:.3f}]"


def difference_text(t):
    if t is None: return ""
    return (f"{t['mean']:+.3f} [{t['low']:+.3f}, {t['high']:+.3f}], "
            f"p {t['p']:.2g}, {t['runs']} runs")


def table_lines(head, body):
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in body), ""]


def budget_lines(result, tokens):
    "Losses and tests of one budget."
    tests, body = result["comparisons"][str(tokens)], []
    for arm in ARMS:
        some = [r for r in result["train"]
                if r["arm"] == arm and r["tokens"] == tokens]
        if not some: continue
        cells = []
        for other in dict.fromkeys([against(arm), "transformer"]):
            t = tests.get(f"{arm}, against {other}")
            if t: cells.append(f"{difference_text(t)}, Holm {t['holm']:.2g}, "
                               f"against {other}")
        right = [g["right"] for g in result["grade"]
                 if g["arm"] == arm and g["tokens"] == tokens]
        answers = "; ".join(
            "{:.0%} [{:.0%}, {:.0%}]".format(v.count("1") / len(v), *wilson(
                v.count("1"), len(v))) for v in right)
        body.append([arm, f"{some[0]['parameters']:,}",
                     some[0]["feed_forward"], some[0]["rate"], len(some),
                     *(mean_text([r["test"][k] for r in some])
                       for k in ("all", "solution")), "; ".join(cells),
                     answers])
    return [f"## {tokens:,} tokens", "", *table_lines(
        ["arm", "parameters", "feed-forward", "rate", "runs", "loss, all",
         "loss, solution", "difference in solution loss",
         "*familiar* right, each seed"], body)]


def rate_lines(result):
    rates = sorted({r["rate"] for r in result["rates"]})
    body = []
    for arm in ARMS:
        row = {r["rate"]: r["validation"]["solution"] for r in result["rates"]
               if r["arm"] == arm}
        if row: body.append([arm, *(f"{row[r]:.3f}" if r in row else ""
                                    for r in rates), min(row, key=row.get)])
    return ["## Rates", "", *table_lines(
        ["arm", *(f"{r:g}" for r in rates), "taken"], body)]


def recall_lines(result):
    body = []
    for arm in RECALL:
        runs = [r for r in result["recall"] if r["arm"] == arm]
        if runs: body.append([arm, len(runs), *("; ".join(
            f"{r['recalled'][str(n)][0] / r['recalled'][str(n)][1]:.0%}"
            for r in runs) for n in PAIRS)])
    return ["## Recall, each seed", "",
            *table_lines(["arm", "runs", *(f"{n} pairs" for n in PAIRS)], body)]


def time_lines(result):
    speed = result["time"].get("tokens_a_second", {})
    lines = ["## Time", "", *table_lines(["arm", "tokens/s"], [
        [arm, f"{v:,.0f}"] for arm, v in speed.items()])]
    body = [[f"{int(tokens):,}", arm, f"{cell['tokens']:,}",
             mean_text([*cell["loss"].values()]),
             difference_text(cell["against rwkv"]) if arm != "rwkv" else ""]
            for tokens, row in result["equal_time"].items()
            for arm, cell in row.items()]
    return lines + table_lines(["as long as RWKV-7 for", "arm",
                                "reads tokens", "solution loss",
                                "difference to RWKV-7"], body)


def to_markdown(result):
    budgets = sorted({r["tokens"] for r in result["train"]})
    return "\n".join([
        "# Which part gives the head start?", "",
        "Arms of nbs/13_comparison at equal parameters. Losses in nats a token "
        "on 500 problems of the test split (rates: validation), means over "
        "runs with 95 % t intervals; differences are paired by seed, p by the "
        "paired t test, Holm's over all tests of a budget. Below zero: the "
        "arm learns more. Answers: greedy, Wilson's interval over problems. "
        "Recall: share of right values on new rows. "
        f"Commands: {'; '.join(result['commands'])}. "
        f"{result['time'].get('machine', machine())}.", "",
        *rate_lines(result),
        *(line for t in budgets for line in budget_lines(result, t)),
        *time_lines(result), *recall_lines(result)])


def make_table(args, tokenizer):
    result = {stage: gathered(args.folder, stage)
              for stage in ("rates", "train", "grade", "recall")}
    times = gathered(args.folder, "time")
    result |= dict(time=times[0] if times else {}, shrink=args.shrink,
                   commands=[f"python benchmarks/mechanisms.py {stage}"
                             for stage in STAGES])
    result["comparisons"] = comparisons(result)
    result["equal_time"] = equal_time(result)
    result = json.loads(json.dumps(result))
    write_whole(args.out / "mechanisms.json", [json.dumps(result), "\n"])
    write_whole(args.out / "mechanisms.md", [to_markdown(result)])


STAGES = dict(rates=find_rates, train=train_all, grade=grade_all,
              recall=recall_all, time=time_all, table=make_table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--only", nargs="+", default=[""],
                        help="arms that begin so; = before a name: this one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(5)])
    parser.add_argument("--tokens", nargs="+", choices=STEPS, default=[*STEPS],
                        help="millions, for train and grade")
    parser.add_argument("--n", type=int, default=300, help="test problems")
    parser.add_argument("--rounds", type=int, default=9, help="of `time`")
    parser.add_argument("--shrink", type=int, default=1,
                        help="divide all steps, to try the script out")
    parser.add_argument("--folder", type=Path,
                        default=Path("_build/mechanisms"))
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    # beyond the limit a model would silently run uncompiled
    torch._dynamo.config.recompile_limit = 64
    args.steps = {k: max(2, v // args.shrink) for k, v in STEPS.items()}
    args.arms = [arm for arm in ARMS if any(
        arm == o[1:] if o[:1] == "=" else arm.startswith(o)
        for o in args.only)]
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    STAGES[args.stage](args, load_tokenizer(find_base("student")[0]))


if __name__ == "__main__": main()
