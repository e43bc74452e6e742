"""Whose reasoning should the student learn from? Sources at equal tokens.

    python benchmarks/ladder.py [--seeds 0 1 2] [--n 300]

For each seed: 600 training problems, 200 of each group; the traces of each
source for them; one adapter a source, of equal training tokens; 900 test
problems, greedy. Every verdict goes to ladder.json, and ladder.md is written
from it. About an hour and a half on one core."""
import json
import random
import tempfile
from pathlib import Path
from time import perf_counter

from spine import arguments, problems

from tiny_reason.data import GROUPS, build_prompt, load_problems, prepare
from tiny_reason.distill import filter_traces, generate_traces, local_teacher
from tiny_reason.lib.journal import read_traces
from tiny_reason.eval import (evaluate, majority, mcnemar, self_consistency,
                              wilson)
from tiny_reason.model import add_lora, load_base, merge
from tiny_reason.train import sft_config, train

BUDGET = 300_000 # training tokens of each adapter, prompts included
LIMIT = 200      # tokens of an answer
SAMPLING = dict(k=4, temperature=1.0, max_new_tokens=LIMIT)
VOTES = 8        # of the base, about the work of training on its own traces
HERE = Path(__file__).parent


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def repeated(rows, seed, budget=BUDGET):
    "Rows in random order, again and again, until they hold enough tokens."
    order, chosen, tokens = random.Random(seed), [], 0
    while True:
        for i in order.sample(range(len(rows)), len(rows)):
            if tokens >= budget: return rows.select(chosen), tokens
            chosen.append(i)
            tokens += len(rows[i]["input_ids"])


def tune(path, seed, folder, style="question", calculator="strip",
         r=8, dropout=0.05):
    "An adapter on traces of `path`: (merged model, what went in)."
    model, tokenizer = load_base("student")
    rows, held, report = prepare(str(path), None, seed=seed, style=style,
                                 tokenizer=tokenizer, calculator=calculator)
    distinct = len(set(rows["question"]))
    rows, tokens = repeated(rows, seed)
    steps = len(rows) // 8
    args = sft_config(folder, learning_rate=4e-3, seed=seed, max_steps=steps,
                      eval_steps=steps // 4, save_steps=steps // 4)
    tuned = add_lora(model, r=r, alpha=2 * r, dropout=dropout, seed=seed)
    run = train(tuned, tokenizer, rows, held.select(range(min(64, len(held)))),
                args)
    return merge(tuned), dict(problems=distinct, steps=run.steps,
                              trained=run.tokens, **report)


def sources(base, tokenizer, seed, folder):
    "(name, path of traces, tokens of a model's forward passes, settings)."
    pool = problems("train", 200, seed)
    asked = sum(len(build_prompt(p["question"], tokenizer, "question"))
                for p in pool) * SAMPLING["k"]

    def have(model, style, name):
        out = folder / f"{name}.jsonl"
        generate_traces(local_teacher(model, tokenizer, style), pool,
                        out=out, **SAMPLING, seed=seed)
        traces = read_traces(out)
        kept, report = filter_traces(traces)
        cost = asked + sum(t["tokens"] for t in traces)
        return out, write(folder / f"{name}.kept.jsonl", kept), cost, report

    written = write(folder / "written.jsonl", pool)
    yield "written, annotated", written, 0, dict(calculator="keep"), None
    yield "written, stripped", written, 0, {}, None
    lesson = write(folder / "lesson.jsonl",
                   list(load_problems("arithmetic", n=2000, seed=seed + 9999)))
    teacher, _ = tune(lesson, seed, folder / "teacher", "think", r=16,
                      dropout=0.0)
    raw, kept, cost, report = have(teacher, "think", "teacher")
    yield "teacher, unfiltered", raw, cost, {}, report
    yield "teacher, filtered", kept, cost, {}, report
    raw, kept, cost, report = have(base, "question", "self")
    first = yield "self, filtered, 1 round", kept, cost, {}, report
    raw, kept, more, report = have(first, "question", "again")
    yield ("self, filtered, 2 rounds", kept, cost + more + 2 * BUDGET, {},
           report)


def verdicts(report): return "".join("01"[r["correct"]] for r in report.records)


def climb(seed, test, base, tokenizer):
    "Every rung of one seed: name -> verdicts, work, what went in."
    read = sum(len(build_prompt(p["question"], tokenizer, "question"))
               for p in test)

    def ask(model):
        return evaluate(model, tokenizer, test, "question",
                        max_new_tokens=LIMIT)

    def rung(right, answering, before=0, **more):
        n = len(right) // 3
        print(seed, [right[i:i + n].count("1") for i in (0, n, 2 * n)], more,
              flush=True)
        return dict(right=right, answering=answering, before=before, **more)

    alone = ask(base)
    answering = read + sum(r["tokens"] for r in alone.records)
    rungs = {"base": rung(verdicts(alone), answering)}
    samples = self_consistency(base, tokenizer, test, VOTES, 1.0, LIMIT, seed,
                               "question")
    rungs[f"base, {VOTES} votes"] = rung(
        "".join("01"[majority(s)["correct"]] for s in samples),
        VOTES * read + sum(r["tokens"] for s in samples for r in s))
    with tempfile.TemporaryDirectory() as folder:
        steps, model = sources(base, tokenizer, seed, Path(folder)), None
        while True:
            try: name, path, cost, how, report = steps.send(model)
            except StopIteration: return rungs
            model, put_in = tune(path, seed, Path(folder, "run"), **how)
            answers = ask(model)
            rungs[name] = rung(
                verdicts(answers),
                read + sum(r["tokens"] for r in answers.records),
                cost + 2 * put_in["trained"], **put_in, filtered=report)


def cell(right):
    low, high = wilson(right.count("1"), len(right))
    return f"{right.count('1') / len(right):.1%} [{low:.1%}, {high:.1%}]"


def p_text(a, b):
    p = mcnemar([x == "1" for x in a], [x == "1" for x in b])
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"


def table(result):
    n, seeds = result["n"], result["seeds"]
    part = {g: slice(i * n, (i + 1) * n) for i, g in enumerate(GROUPS)}
    lines = ["| source | seed | " + " | ".join(GROUPS)
             + " | p, combined, against base | against written, stripped "
             "| problems taught | work |", "|---" * 9 + "|"]
    for name in seeds[0]["rungs"]:
        for s in seeds:
            rung, reference = s["rungs"][name], s["rungs"]["written, stripped"]
            base = s["rungs"]["base"]
            c = part["combined"]
            lines.append(
                f"| {name} | {s['seed']} | "
                + " | ".join(cell(rung["right"][part[g]]) for g in GROUPS)
                + f" | {p_text(rung['right'][c], base['right'][c])}"
                + f" | {p_text(rung['right'][c], reference['right'][c])}"
                + f" | {rung.get('problems', '')} | "
                + f"{(rung['answering'] + rung['before']) / 1e3:,.0f} |")
    return lines


def page(result):
    "The lines of ladder.md, from what ladder.json holds."
    return [
        "# The ladder: sources of reasoning at equal training tokens", "",
        f"{result['budget']:,} training tokens an adapter, prompts included "
        "(r=8, alpha=16, dropout 0.05, style `question`; the best of four "
        "checkpoints by validation loss on the same source). 600 training "
        "problems a seed, 200 of each group; "
        f"{SAMPLING['k']} samples a problem at temperature "
        f"{SAMPLING['temperature']:g} where a model writes; unfiltered: every "
        "trace that states an answer, exact repeats once. "
        f"{result['n']} test "
        "problems a group, the same for all, greedy; brackets: Wilson's 95 % "
        "interval; p: exact McNemar on the *combined* problems, same seed. "
        "Work: thousands of tokens through the model until all test questions "
        "are answered; a training token counts twice (forward, backward); "
        "the teacher's own training is not counted.", "",
        *table(result), "",
        f"{result['minutes']:.0f} minutes on one core of an Intel Xeon "
        "(Sapphire Rapids class, AMX), no GPU, beside other programs: `python "
        "benchmarks/ladder.py`.", ""]


def main():
    args = arguments(__doc__)
    base, tokenizer = load_base("student")
    base, test = merge(base), problems("test", args.n, 0)
    result, start = dict(n=args.n, budget=BUDGET, seeds=[]), perf_counter()
    for seed in args.seeds:
        result["seeds"].append(dict(seed=seed, rungs=climb(
            seed, test, base, tokenizer)))
        result["minutes"] = (perf_counter() - start) / 60
        (HERE / "ladder.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "ladder.md").write_text("\n".join(page(result)))
    print((HERE / "ladder.md").read_text())


if __name__ == "__main__": main()
