"""Whose reasoning should the student learn from? Sources at equal tokens.

    python benchmarks/ladder.py run [--seeds 0 1 2 3 4] [--only RUNG ...]
    python benchmarks/ladder.py table

`run` measures every rung on every seed. What is finished is a file below
--folder, and is not done again; a run that was killed goes on with the traces
that it had, and trains at most one adapter twice. Processes can share the
work by seeds; what has no seed is measured by the one that has seed 0.
`table` writes ladder.json and ladder.md from what is there. A folder belongs
to one student and one set of sizes: others are refused, never mixed in.

A seed draws 600 training problems (200 each of familiar, taught, combined),
the traces, the adapters and the batches. Each adapter is trained on 300,000
tokens, prompts included, of the rows that its rung is given, again and again
in random order; the best of four checkpoints by validation loss on the same
source is kept. All answer the same test problems, greedily.

Which rows a rung is given, so that a comparison differs in one thing:

* unfiltered: every sample that states an answer, exact repeats once. Right
  traces repeat and wrong ones vary, so more of these *rows* are wrong than of
  the samples. Not a fair control of the filter; here because it is what one
  gets without thinking.
* unfiltered, one a problem: one sample of each problem, by chance. Nothing
  can repeat: as many rows are wrong as samples.
* filtered: what `filter_traces` keeps, at most 4 a problem.
* filtered, one a problem: one of them by chance. Against the rung before, the
  whole filter is tested at one row a problem: it also drops problems.
* random selection: for each problem that the filter kept traces of, as many
  of its samples by chance, without repeats. Against *filtered*, the same
  problems and the same number of rows a problem: only who chooses differs.
  (The control of rlhf-book, code/rejection_sampling, `random_per_prompt`.)
* written, 2,000 problems: a superset of the 600, at the same tokens.
* soft: rows, order and held-out rows of *teacher, unfiltered*; the loss is
  the KL divergence from the teacher's distribution instead of the loss of its
  tokens. At temperature 1 both are the same lesson on average over draws.

The teacher is the student, tuned on the written traces of 2,000 other
problems, familiar and taught ones."""
import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from time import process_time

import datasets
import transformers

from tiny_reason.data import prepare, reason_to_drop
from tiny_reason.distill import (distil_logits, filter_traces,
                                 generate_traces, local_teacher,
                                 random_selection)
from tiny_reason.eval import evaluate, majority, self_consistency
from tiny_reason.lib.answers import is_correct
from tiny_reason.lib.device import machine
from tiny_reason.lib.disk import file_hash, staged, write_whole
from tiny_reason.lib.folders import find_base
from tiny_reason.lib.journal import read_traces
from tiny_reason.lib.loading import load_base, load_tuned, merge
from tiny_reason.lib.problems import load_problems
from tiny_reason.lib.prompts import build_prompt
from tiny_reason.lib.stats import mcnemar, paired_difference, wilson
from tiny_reason.lib.stories import GROUPS
from tiny_reason.model import add_lora
from tiny_reason.train import row_order, sft_config, train

HERE = Path(__file__).parent
LEARNT = "familiar", "taught", "combined" # groups of the training problems
LIMIT = 200                # tokens of an answer
LIMITS = {"longer": 320}   # of a group whose answers are longer
STYLE = "question"         # of all prompts, the teacher's too
SAMPLING = dict(k=4, temperature=1.0, max_new_tokens=LIMIT)
VOTES = 8                  # of the base, once
RATE = 4e-3
ONCE = "base", f"base, {VOTES} votes" # these have no seed
RUNGS = (*ONCE, "written, annotated", "written, stripped",
         "written, 2,000 problems", "teacher, unfiltered",
         "teacher, unfiltered, one a problem", "teacher, filtered",
         "teacher, filtered, one a problem", "teacher, random selection",
         "teacher, soft", "self, unfiltered", "self, random selection",
         "self, filtered, 1 round", "self, filtered, 2 rounds")
PAIRS = [("teacher, filtered", "teacher, random selection"),
         ("teacher, filtered, one a problem",
          "teacher, unfiltered, one a problem"),
         ("teacher, filtered", "teacher, unfiltered"),
         ("teacher, filtered", "written, stripped"),
         ("written, 2,000 problems", "written, stripped"),
         ("teacher, soft", "teacher, unfiltered"),
         ("self, filtered, 1 round", "self, random selection"),
         ("self, filtered, 1 round", "self, unfiltered"),
         ("self, unfiltered", "base"),
         ("self, filtered, 1 round", "base"),
         ("self, filtered, 2 rounds", "self, filtered, 1 round")]


# What a rung is given.

def problems(split, counts, seed):
    "Problems of each group: {group: how many}."
    return [dict(p) for group, n in counts.items() for p in load_problems(
        "arithmetic", group, split, n, 3407 + seed)]


def shared(n): # {group: how many}
    return {g: n // 3 + (i < n % 3) for i, g in enumerate(LEARNT)}


def write(path, rows):
    return write_whole(path, [json.dumps(r) + "\n" for r in rows])


def teachable(traces):
    return [t for t in traces if not reason_to_drop(t, "strip", STYLE)]


def one_each(traces, seed):
    "One trace of each problem, by chance."
    found, rng = {}, random.Random(seed)
    for t in traces: found.setdefault(t["question"], []).append(t)
    return [rng.choice(some) for some in found.values()]


def repeated(rows, seed, budget):
    "Rows in random order, again and again, until they hold enough tokens."
    order, chosen, tokens = random.Random(seed), [], 0
    while True:
        for i in order.sample(range(len(rows)), len(rows)):
            if tokens >= budget: return rows.select(chosen)
            chosen.append(i)
            tokens += len(rows[i]["input_ids"])


# A seed's models and traces: each is made once, and then read.

class Seed:
    "One seed of a student, in a folder of its own."
    def __init__(self, seed, args):
        self.seed, self.args = seed, args
        self.base, self.tokenizer = args.base, args.tokenizer
        self.folder = args.folder / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def written(self, n):
        path = self.folder / f"written-{n}.jsonl"
        if path.exists(): return path
        return write(path, problems("train", shared(n), self.seed))

    def traces(self, name, model):
        "Samples of a model for the 600 problems, and what they cost."
        out = self.folder / f"{name}.jsonl"
        pool = [json.loads(line) for line in self.written(
            self.args.pool).read_text().splitlines()]
        if not (self.folder / f"{name}.done").exists():
            generate_traces(local_teacher(model(), self.tokenizer, STYLE),
                            pool, out=out, **SAMPLING, seed=self.seed)
            (self.folder / f"{name}.done").touch()
        found = read_traces(out)
        asked = sum(len(build_prompt(p["question"], self.tokenizer, STYLE))
                    for p in pool) * SAMPLING["k"]
        return found, asked + sum(t["tokens"] for t in found)

    def tune(self, name, path, calculator="strip", teacher=None, **lora):
        "The folder of an adapter on the traces of `path`; run.json is last."
        folder = self.folder / name
        if (folder / "run.json").exists(): return folder
        model, tokenizer = load_base(self.args.student)
        rows, held, report = prepare(str(path), None, seed=self.seed,
                                     style=STYLE, tokenizer=tokenizer,
                                     calculator=calculator)
        told = dict(rows=len(rows), problems=len({*rows["question"]}),
                    right_rows=right_rows(rows, path), **report)
        rows = repeated(rows, self.seed, self.args.budget)
        held = held.select(range(min(64, len(held))))
        steps = len(rows) // 8
        tuned = add_lora(model, seed=self.seed, **lora)
        if teacher is not None:
            lengths = [len(ids) for ids in rows["input_ids"]]
            rows = rows.select(row_order(lengths, steps, 8, self.seed))
            distil_logits(tuned, teacher, rows, held, self.args.temperature,
                          RATE, seed=self.seed)
            trained = sum(map(len, rows["input_ids"]))
        else:
            with tempfile.TemporaryDirectory() as scratch:
                # torch's AdamW, as in `distil_logits`
                trained = train(tuned, tokenizer, rows, held, sft_config(
                    scratch, learning_rate=RATE, seed=self.seed,
                    max_steps=steps, optim="adamw_torch",
                    eval_steps=max(1, steps // 4),
                    save_steps=max(1, steps // 4))).tokens
        with staged(folder) as place:
            tuned.save_pretrained(place)
            write_whole(place / "run.json", [json.dumps(
                dict(told, steps=steps, trained=trained))])
        return folder

    def teacher(self):
        lesson = self.folder / "lesson.jsonl"
        if not lesson.exists():
            write(lesson, map(dict, load_problems(
                "arithmetic", n=self.args.lesson, seed=self.seed + 9999)))
        return self.model(self.tune("the teacher", lesson, r=16, alpha=32))

    def model(self, folder): return merge(load_tuned(folder)[0])

    def first_round(self): return self.model(self.rung(
        "self, filtered, 1 round")[0])

    def rung(self, name):
        "(folder of the adapter, tokens that were spent before training)."
        who, _, how = name.partition(", ")
        small = dict(r=8, alpha=16, dropout=0.05)
        if who == "written":
            n = 2000 if "2,000" in how else self.args.pool
            calculator = "keep" if how == "annotated" else "strip"
            return self.tune(name, self.written(n), calculator, **small), 0
        again, more = how == "filtered, 2 rounds", 0
        if again:
            _, more = self.traces("self", lambda: self.base)
            more += 2 * self.args.budget
        source = "again" if again else who
        traces, cost = self.traces(source, {
            "teacher": self.teacher, "self": lambda: self.base,
            "again": self.first_round}[source])
        able, kept = teachable(traces), filter_traces(traces)[0]
        chosen = (random_selection(able, kept, self.seed)
                  if how == "random selection" else
                  kept if how.startswith("filtered") else able)
        if "one a problem" in how: chosen = one_each(chosen, self.seed)
        path = write(self.folder / f"{name}.jsonl", chosen)
        soft = self.teacher() if how == "soft" else None
        folder = self.tune(name, path, teacher=soft, **small)
        if soft is not None: # it reads each token once
            more += json.loads((folder / "run.json").read_text())["trained"]
        return folder, cost + more


def right_rows(rows, path): # share; written traces are right
    gold = {t["question"]: t.get("gold") for t in map(
        json.loads, Path(path).read_text().splitlines())}
    known = [(r["answer"], gold[r["question"]]) for r in rows
             if gold[r["question"]] is not None]
    return sum(is_correct(a, g) for a, g in known) / len(known) if known else 1


# Verdicts.

def answers(model, args):
    "Verdicts by group, and tokens through the model."
    right, work = {}, 0
    for group, some in args.test.items():
        report = evaluate(model, args.tokenizer, some, STYLE,
                          max_new_tokens=LIMITS.get(group, LIMIT))
        right[group] = "".join("01"[r["correct"]] for r in report.records)
        work += sum(r["tokens"] for r in report.records)
    return right, work + args.read


def votes(args):
    right, work = {}, VOTES * args.read
    for group, some in args.test.items():
        asked = self_consistency(args.base, args.tokenizer, some, VOTES, 1.0,
                                 LIMITS.get(group, LIMIT), 0, STYLE)
        right[group] = "".join("01"[majority(s)["correct"]] for s in asked)
        work += sum(r["tokens"] for s in asked for r in s)
    return right, work


def measure(name, seed, args):
    "What a rung's file holds, core-minutes too; seed: None for those without."
    start = process_time()
    told, spent = {}, 0
    if name == "base": right, work = answers(args.base, args)
    elif name in ONCE: right, work = votes(args)
    else:
        state = Seed(seed, args)
        folder, spent = state.rung(name)
        told = json.loads((folder / "run.json").read_text())
        spent += 2 * told["trained"]
        right, work = answers(state.model(folder), args)
    return dict(rung=name, seed=seed, right=right, answering=work,
                before=spent, minutes=(process_time() - start) / 60, **told)


def settings(args): # what results must share to stand in one table
    return dict(student=args.hash, n=args.n, groups=[*GROUPS], pool=args.pool,
                budget=args.budget, lesson=args.lesson,
                temperature=args.temperature)


def check_same(folder, wanted):
    "ValueError if the folder was begun with another student or other sizes."
    for path in sorted(folder.glob("*/settings.json")):
        there = json.loads(path.read_text())
        for key, value in wanted.items():
            if there.get(key) != value: raise ValueError(
                f"{path.parent} was measured with {key} {there.get(key)!r}, "
                f"this run has {value!r}: choose another --folder")


def run(args):
    wanted = settings(args)
    check_same(args.folder, wanted)
    args.base, args.tokenizer = load_base(args.student)
    args.base = merge(args.base)
    args.test = {g: problems("test", {g: args.n}, 0) for g in GROUPS}
    args.read = sum(len(build_prompt(p["question"], args.tokenizer, STYLE))
                    for some in args.test.values() for p in some)
    asked = [(seed if r not in ONCE else None, r) for seed in args.seeds
             for r in RUNGS if r in args.only and (r not in ONCE or not seed)]
    for seed, name in asked:
        place = args.folder / ("once" if seed is None else f"seed-{seed}")
        if (place / f"{name}.json").exists(): continue
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / "settings.json", [json.dumps(wanted)])
        found = measure(name, seed, args) | dict(
            command=args.command, machine=machine())
        write_whole(place / f"{name}.json", [json.dumps(found, indent=1)])
        print(seed, name, {g: r.count("1") for g, r in found["right"].items()},
              f"{found['minutes']:.1f} min", flush=True)


# The page.

def cell(right):
    low, high = wilson(right.count("1"), len(right))
    return f"{right.count('1') / len(right):.1%} [{low:.1%}, {high:.1%}]"


def p_text(a, b):
    p = mcnemar([x == "1" for x in a], [x == "1" for x in b])
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"


def gathered(folder):
    "The verdicts of a folder as one value; `ValueError` if they do not match."
    places = sorted(folder.glob("*/settings.json"))
    if not places: raise ValueError(f"{folder} holds no results: run first")
    common = json.loads(places[0].read_text())
    check_same(folder, common)
    runs = [json.loads(path.read_text()) | given(path.with_suffix(".jsonl"))
            for place in places for path in place.parent.glob("*.json")
            if path.stem in RUNGS]
    runs.sort(key=lambda r: (RUNGS.index(r["rung"]), r["seed"] or 0))
    made = dict(minutes=round(sum(r.pop("minutes") for r in runs)),
                commands=sorted({r.pop("command") for r in runs}),
                machines=sorted({r.pop("machine") for r in runs}))
    return dict(**common, **made, seeds=sorted({
        r["seed"] for r in runs if r["seed"] is not None}), runs=runs)


def given(path): # {} where a rung has no traces of its own
    "Distinct traces of each group of problems, and how many are right."
    if not path.exists(): return {}
    traces = {(t["question"], t["answer"]): t for t in read_traces(path)
              if t["answer"]}.values()
    flags = {g: [is_correct(t["answer"], t["gold"]) for t in traces
                 if t["group"] == g] for g in LEARNT}
    return dict(given={g: (sum(x), len(x)) for g, x in flags.items()})


def of_seeds(result, name): # {seed: run}; the same one for each if it has none
    found = {r["seed"]: r for r in result["runs"] if r["rung"] == name}
    if None in found: return dict.fromkeys(result["seeds"], found[None])
    return found


def share(text): return text.count("1") / len(text)


def compared(result, group):
    "Rows of paired differences over runs, beside McNemar within each seed."
    for one, other in PAIRS:
        a, b = of_seeds(result, one), of_seeds(result, other)
        both = sorted(a.keys() & b.keys())
        if len(both) < 2: continue
        x, y = ([r[s]["right"][group] for s in both] for r in (a, b))
        mean, low, high, p = paired_difference(*([share(t) for t in way]
                                         for way in (x, y)))
        gaps = " ".join(f"{100 * (share(s) - share(t)):+.0f}"
                        for s, t in zip(x, y))
        within = ", ".join(map(p_text, x, y))
        yield (f"| {group} | {one} − {other} | {gaps} | {100 * mean:+.1f} "
               f"[{100 * low:+.1f}, {100 * high:+.1f}] | {p:.3f} | {within} |")


def page(result):
    "The lines of ladder.md, from what ladder.json holds."
    groups = [*result["runs"][0]["right"]]
    lines = [
        "# The ladder: sources of reasoning at equal training tokens", "",
        f"{result['budget']:,} training tokens an adapter, prompts included "
        "(r=8, alpha=16, dropout 0.05, style `question`; the best of four "
        "checkpoints by validation loss on the same source). "
        f"{result['pool']} training problems a seed, as many of familiar, "
        f"taught and combined; {SAMPLING['k']} samples a problem at "
        f"temperature {SAMPLING['temperature']:g} where a model writes. "
        f"{result['n']} test problems a group, the same for all, greedy; "
        "brackets: Wilson's 95 % interval. What each rung is given stands at "
        "the top of ladder.py. Rows: distinct ones, and how many of them "
        "state the right answer. Work: thousands of tokens through the model "
        "until all test questions are answered; a training token counts twice "
        "(forward, backward); the teacher's own training is not counted.", "",
        "| source | seed | " + " | ".join(groups)
        + " | problems taught | rows | of them right | work |",
        "|---" * (len(groups) + 6) + "|"]
    for r in result["runs"]:
        right = (f"{r['right_rows']:.0%}" if "right_rows" in r else "")
        lines.append(
            f"| {r['rung']} | {'' if r['seed'] is None else r['seed']} | "
            + " | ".join(cell(r["right"][g]) for g in groups)
            + f" | {r.get('problems', '')} | {r.get('rows', '')} | {right} | "
            + f"{(r['answering'] + r['before']) / 1e3:,.0f} |")
    lines += ["", "## Tests", "",
              "Points of difference, seed by seed; their mean with the 95 % "
              "interval of a paired t test over runs, and its p; beside it, "
              "exact McNemar over problems within each seed. No p is corrected "
              "for their number. What is said of a source follows the weaker "
              "of the two.", "",
              "| group | difference | seeds | mean, points | p over runs "
              "| p over problems, seed by seed |", "|---" * 6 + "|"]
    for group in groups: lines += compared(result, group)
    return [*lines, "", f"{result['minutes']} core-minutes on "
            f"{'; '.join(result['machines'])}. The student's weights: "
            f"{result['student'][:16]}. "
            + "; ".join(f"`{c}`" for c in result["commands"]) + ".", ""]


def table(args):
    result = gathered(args.folder)
    write_whole(args.to / "ladder.json", [json.dumps(result, indent=1), "\n"])
    write_whole(args.to / "ladder.md", ["\n".join(page(result))])
    print((args.to / "ladder.md").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(5)])
    parser.add_argument("--only", nargs="+", choices=RUNGS, default=RUNGS)
    parser.add_argument("--student", default="student",
                        help="preset or folder of the model to be taught")
    parser.add_argument("--folder", type=Path, default=Path("_build/ladder"))
    parser.add_argument("--to", type=Path, default=HERE,
                        help="where the table is written")
    for name, value, text in (
            ("--n", 300, "test problems a group"),
            ("--pool", 600, "training problems of each seed"),
            ("--budget", 300_000, "training tokens of an adapter"),
            ("--lesson", 2000, "problems that the teacher is taught")):
        parser.add_argument(name, type=int, default=value, help=text)
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="of the soft targets")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.stage == "table": return table(args)
    args.command = " ".join(["python benchmarks/ladder.py", *sys.argv[1:]])
    source = Path(find_base(args.student)[0])
    args.hash = file_hash(source / "model.safetensors")
    run(args)


if __name__ == "__main__": main()
