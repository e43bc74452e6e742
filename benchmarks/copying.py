"""Why do annotated traces ruin the first student? Three suspects, tried.

    python benchmarks/copying.py run --student PATH [--arms ...] [--seeds 0 1 2]
    python benchmarks/copying.py table

Fine-tuned on traces with `<<9*5=45>>` in them, the first student lost nearly
all that it knew. Its traces say how: the sum in the brackets is right, but it
is another sum than the one before the brackets. So it cannot copy what has just
been said. Which text would have taught it that? The first student is trained
further for 200 steps, at the same rate and length, on the text it had and on
three others, which differ in the copying documents alone (6 of 100):

    as before            lines of made-up words, and the same lines again
    digits copied        numbers and sums among these words
    echoes               half of them: each word at once again, between signs
    echoes and digits    both

Each is then fine-tuned on annotated traces, 120 steps of eight, and answers
test problems; so is the student without further training, and the second
student, which had echoes and digits from the start. On held-out traces it is
seen where the heads look when a part of the sum is to be copied. PATH is the
first student:
`git archive 834ad95 tiny_reason/student | tar x -C PATH --strip-components 2`.
A run that is finished is kept in `--folder`, and is not repeated. About 80
minutes on one core."""
import argparse
import json
import re
from functools import partial
from itertools import islice, product
from pathlib import Path

import datasets
import torch
import transformers
from spine import problems
from transformers import AutoModelForCausalLM

from tiny_reason.data import prepare
from tiny_reason.eval import evaluate
from tiny_reason.lib.arithmetic import calculate
from tiny_reason.lib.device import machine
from tiny_reason.lib.disk import file_hash, write_whole
from tiny_reason.lib.folders import load_tokenizer
from tiny_reason.lib.prompts import LAYOUTS
from tiny_reason.lib.show import as_table
from tiny_reason.lib.stats import paired_difference, wilson
from tiny_reason.model import add_lora, load_base, merge
from tiny_reason.pretrain import (arithmetic, BEFORE, direct, documents, echoes,
                                  encoded, MIXTURE, narrative, Plan, pretrain,
                                  rows, symbols, worked)
from tiny_reason.train import sft_config, train

HERE = Path(__file__).parent
KNOWN = ("familiar", "taught", "combined")
PLAN = Plan(steps=200, learning_rate=2e-3, warmup=20)
WORDS = partial(symbols, digits=False)
OTHERS = {worked: 40, direct: 24, narrative: 18, arithmetic: 12}
ARMS = {"no further training": None,
        "as before": BEFORE,
        "digits copied": OTHERS | {symbols: 6},
        "echoes": OTHERS | {WORDS: 3, partial(echoes, digits=False): 3},
        "echoes and digits": MIXTURE,
        "second student": None}
PARTS = "first number", "sign", "second number"
SUM = re.compile(r"(\d+)([-+*/])(\d+)=<<(\d+)([-+*/])(\d+)=(\d+)>>")


def further(start, mixture, seed, out):
    "The student after some more steps on text of a mixture."
    if mixture is None: return start
    if (out / "pretrain_log.jsonl").is_file(): return out
    tokenizer = load_tokenizer(start)
    model = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation="eager")
    text, other = (encoded(documents(1000 + 2 * seed + i, mixture), tokenizer)
                   for i in (0, 1))
    pretrain(model, tokenizer, text, out, PLAN, list(islice(rows(other), 4)),
             save_every=100, resume=True, dtype=torch.bfloat16)
    return out


def tune(base, traces, seed, folder):
    "An adapter on annotated traces: the merged model."
    model, tokenizer = load_base(str(base))
    kept, held, _ = prepare(str(traces), None, seed=seed, style="question",
                            tokenizer=tokenizer, calculator="keep")
    args = sft_config(folder, learning_rate=4e-3, seed=seed, max_steps=120,
                      eval_steps=40, save_steps=40)
    tuned = add_lora(model, r=8, alpha=16, dropout=0.05, seed=seed)
    train(tuned, tokenizer, kept, held, args)
    return merge(tuned), tokenizer


def copied(completions):
    "Of the sums before `<<`: which of their parts stand after it as well."
    found = [m for text in completions for m in SUM.findall(text)]
    same = [[a == b for a, b in zip(m[:3], m[3:6])] for m in found]
    return dict(sums=len(found), first=sum(s[0] for s in same),
                sign=sum(s[1] for s in same), second=sum(s[2] for s in same),
                whole=sum(map(all, same)), right=sum(
                    str(calculate("".join(m[3:6]))) == m[6] for m in found))


@torch.no_grad()
def looked_back(model, tokenizer, traces):
    """Each part of a sum, where it is said again: is its first token likeliest,
    and how much of its attention does a head give to the one to be copied?"""
    model.set_attn_implementation("eager")
    found = {part: dict(n=0, right=0, heads=0) for part in PARTS}
    for trace in traces:
        text = LAYOUTS["question"].format(trace["question"]) + trace["answer"]
        batch = tokenizer(text, return_offsets_mapping=True)
        at = {start: i for i, (start, _) in enumerate(batch["offset_mapping"])}
        ids = torch.tensor([batch["input_ids"]])
        said = model(input_ids=ids, output_attentions=True)
        heads = torch.cat(said.attentions).double() # layer, head, query, key
        for m, (i, part) in product(SUM.finditer(text), enumerate(PARTS, 1)):
            source, copy = at[m.start(i)], at[m.start(i + 3)]
            seen = found[part]
            seen["n"] += 1
            seen["right"] += bool(said.logits[0, copy - 1].argmax()
                                  == ids[0, copy])
            seen["heads"] += heads[:, :, copy - 1, source]
    for seen in found.values():
        seen["heads"] = [[round(x, 4) for x in row]
                         for row in (seen["heads"] / seen["n"]).tolist()]
    return found


def run(student, second, arms, seeds, n, folder):
    test = problems("test", n, groups=KNOWN)
    held = problems("validation", n, groups=("familiar",))
    for seed in seeds:
        pool = folder / f"written-{seed}.jsonl"
        pool.write_text("".join(json.dumps(p) + "\n"
                                for p in problems(
                                    "train", 200, seed, KNOWN)))
        for arm in arms:
            name = f"{arm.replace(' ', '-')}-{seed}"
            done = folder / f"{name}.json"
            if done.is_file(): continue
            start = Path(second if arm == "second student" else student)
            base = further(start, ARMS[arm], seed, folder / name)
            model, tokenizer = tune(base, pool, seed, folder / f"{name}-tuned")
            report = evaluate(model, tokenizer, test, "question",
                              max_new_tokens=200)
            report.to_jsonl(folder / f"{name}.answers.jsonl")
            result = dict(
                arm=arm, seed=seed, student=file_hash(
                    start / "model.safetensors"),
                right={g: [r["correct"] for r in part.records]
                       for g, part in report.by_group().items()},
                copied=copied(r["completion"] for r in report.records),
                looked_back=looked_back(model, tokenizer, held))
            done.write_text(json.dumps(result, indent=1) + "\n")
            print(name, {g: sum(v) for g, v in result["right"].items()},
                  result["copied"], flush=True)


def gathered(folder):
    runs = []
    for path in folder.glob("*.json"):
        with path.with_suffix(".answers.jsonl").open() as answers:
            example = json.loads(next(answers))["completion"]
        runs.append(json.loads(path.read_text()) | dict(example=example))
    runs.sort(key=lambda r: ([*ARMS].index(r["arm"]), r["seed"]))
    first = {r["student"] for r in runs if r["arm"] != "second student"}
    second = {r["student"] for r in runs if r["arm"] == "second student"}
    if len(first) > 1 or len(second) > 1:
        raise SystemExit(f"{folder}: runs of several students; name another")
    for r in runs: r["right"] = {g: "".join(str(int(x)) for x in flags)
                                 for g, flags in r["right"].items()}
    return runs


def strongest(seen): # layer, head, share of attention
    return max(((layer, head, share)
                for layer, row in enumerate(seen["heads"])
                for head, share in enumerate(row)), key=lambda x: x[2])


def page(runs, n):
    "The table, and tests over runs."
    rows = []
    for r in runs:
        c = r["copied"]
        rows.append([r["arm"], r["seed"]] + [
            "{:.0%} [{:.0%}, {:.0%}]".format(sum(map(int, v)) / n, *wilson(
                sum(map(int, v)), n)) for v in r["right"].values()] + [
            c["sums"]] + [f"{c[k] / c['sums']:.1%}"
                          for k in ("first", "sign", "second", "right")] + [
            "{3:.0%}, {2:.0%} in {0}.{1}".format(
                *strongest(seen), seen["right"] / seen["n"])
            for seen in r["looked_back"].values()])
    by = {arm: {r["seed"]: sum(map(int, r["right"]["familiar"])) / n
                for r in runs if r["arm"] == arm} for arm in ARMS}
    tests = []
    for arm, other in (("as before", "no further training"),
                       ("digits copied", "as before"), ("echoes", "as before"),
                       ("echoes and digits", "as before"),
                       ("echoes and digits", "digits copied")):
        both = sorted({*by[arm]} & {*by[other]})
        if len(both) < 2: continue
        gap, low, high, p = paired_difference(
            [by[arm][s] for s in both], [by[other][s] for s in both])
        tests.append([f"{arm} − {other}", len(both), f"{100 * gap:+.1f} "
                      f"[{100 * low:+.1f}, {100 * high:+.1f}]", f"{p:.3f}"])
    return "\n\n".join([
        "# Who cannot copy: annotated traces and three suspects",
        f"Each arm in `copying.py`'s head. n = {n} test problems a group, "
        "greedy, brackets Wilson's 95 % interval. *Copied*: of the sums before "
        "`<<` in the answers, the share whose part stands after it as well; "
        "*sound*: whose result is right for what stands in the brackets. "
        "*Looked back*: on held-out traces, how often the first token of the "
        "part is the likeliest, and the largest share of attention that one "
        "head (layer.head) gives to the token to be copied.",
        as_table(["arm", "seed", *KNOWN, "sums",
                  *(f"copied: {x}" for x in PARTS), "sound",
                  *(f"looked back: {x}" for x in PARTS)], rows),
        "## Tests over runs, familiar", as_table(
            ["difference", "seeds", "points, 95 % interval", "p (paired t)"],
            tests),
        f"{machine()}. `python benchmarks/copying.py run --student PATH`, then "
        "`python benchmarks/copying.py table`.\n"])


def table(folder, n):
    runs = gathered(folder)
    write_whole(HERE / "copying.json", [json.dumps(dict(n=n, runs=runs)), "\n"])
    write_whole(HERE / "copying.md", [page(runs, n)])
    print((HERE / "copying.md").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("run", "table"))
    parser.add_argument("--student", help="folder of the first student")
    parser.add_argument("--second", default="tiny_reason/student")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=100,
                        help="test problems a group")
    parser.add_argument("--folder", type=Path, default=Path("_build/copying"))
    args = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.stage == "run":
        run(args.student, args.second, args.arms, args.seeds, args.n,
            args.folder)
    else: table(args.folder, args.n)


if __name__ == "__main__": main()
