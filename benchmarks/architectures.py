"""A transformer and RWKV-7 at equal parameters and equal training tokens.

    python benchmarks/architectures.py rates    # which learning rate
    python benchmarks/architectures.py train [--only rwkv] [--seeds 0 1 2]
    python benchmarks/architectures.py grade
    python benchmarks/architectures.py time     # on quiet cores

Both are four layers of 192, and the transformer's feed-forward is as wide as it
takes to reach RWKV-7's number of parameters. Both read the same worked problems
of the generator, once, in the same order, with the same plan; the transformer
does so a second time with the short problems first. `train` leaves its models
in `--folder` and goes on where it was stopped. Every stage writes its part of
architectures.json, and architectures.md is written from that. On one core that
is free, `rates` takes half an hour, `train` an hour, the others a few minutes."""
import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import datasets
import torch
import transformers
from ladder import cell, p_text
from spine import problems
from transformers import Qwen2Config, Qwen2ForCausalLM

from tiny_reason import rwkv
from tiny_reason.bench import memory, some_text
from tiny_reason.lib.device import machine
from tiny_reason.data import GROUPS, prepare
from tiny_reason.eval import evaluate
from tiny_reason.lib.decode import Batch, chooser
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.model import load_base
from tiny_reason.pretrain import (Plan, as_function, easy_first,
                                  make_optimizers, pretrain, rows, train_step)

HERE = Path(__file__).parent
PLAN = Plan(steps=600, batch=16, length=256)
RATES = (4e-3, 8e-3)
BEST = dict(transformer=4e-3, rwkv=4e-3) # of RATES, by `rates`
CONTEXTS = (128, 512, 1024, 2048, 4096, 16_384)
ARMS = ("transformer", "transformer, easy first", "rwkv")


def new_model(arm, tokenizer, seed):
    "About 2.41 million random weights."
    torch.manual_seed(seed)
    ids = dict(pad_token_id=tokenizer.pad_token_id,
               eos_token_id=tokenizer.eos_token_id)
    if arm == "rwkv":
        return rwkv.RWKV7ForCausalLM(rwkv.RWKV7Config(
            len(tokenizer), hidden_size=192, num_hidden_layers=4, **ids))
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=1, intermediate_size=776,
        max_position_embeddings=CONTEXTS[-1], rope_theta=10_000.0,
        tie_word_embeddings=True))
    model.config.update(ids) # not before, as in tiny_reason's new_model
    model.generation_config.update(**ids)
    return model


def text(tokenizer, seed, plan):
    "Worked problems as lists of ids, and held-out rows."
    kept, held, _ = prepare("arithmetic", 25_000, 0.02, seed, tokenizer,
                            style="question")
    if sum(map(len, kept["input_ids"])) <= plan.tokens:
        raise ValueError("more problems are needed than were drawn")
    return list(kept["input_ids"]), list(rows(held["input_ids"], 16, 256))


def train_one(arm, seed, tokenizer, folder, plan=None):
    "Folder and log of a run; a finished one is not repeated."
    plan = plan or replace(PLAN, learning_rate=BEST[arm.partition(",")[0]])
    out = folder / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    log = out / "pretrain_log.jsonl"
    if not log.is_file():
        print(out, flush=True)
        documents, held = text(tokenizer, seed, plan)
        if "easy first" in arm: documents = easy_first(documents, plan.tokens)
        pretrain(new_model(arm, tokenizer, seed), tokenizer, documents, out,
                 plan, held, save_every=150, resume=True)
    return out, [json.loads(line) for line in log.read_text().splitlines()]


def find_rates(tokenizer, folder, only, **_):
    "Held-out loss at each rate, on one seed that is not used again."
    found = {}
    for arm in filter(only, BEST):
        for rate in RATES:
            plan = replace(PLAN, learning_rate=rate)
            _, log = train_one(arm, 9, tokenizer, folder / f"rate-{rate}",
                               plan)
            found[f"{arm}, {rate}"] = log[-1]["held_out"]
    return dict(rates=found)


def train_all(tokenizer, folder, seeds, only, **_):
    for seed in seeds:
        for arm in filter(only, ARMS): train_one(arm, seed, tokenizer, folder)
    return {}


def grade_all(tokenizer, folder, seeds, n, **_):
    "Verdicts of every model, and its log."
    test, runs = problems("test", n), {}
    for seed in seeds:
        for arm in ARMS:
            out, log = train_one(arm, seed, tokenizer, folder)
            model, words = load_base(str(out), four_bit=False)
            report = evaluate(model, words, test, "question",
                              max_new_tokens=200)
            print(arm, seed, report.accuracy, flush=True)
            runs[f"{arm}, seed {seed}"] = dict(
                log=log, parameters=sum(p.numel() for p in model.parameters()),
                right="".join(str(int(r["correct"])) for r in report.records))
    return dict(runs=runs, plan=vars(PLAN), tokens=PLAN.tokens, n=n)


def training_speed(tokenizer, rounds):
    "Tokens a second of whole training steps, in turn."
    x, y = next(rows(text(tokenizer, 0, PLAN)[0], PLAN.batch, PLAN.length))
    jobs = {}
    for arm in BEST:
        for way in ("plain", "compiled"):
            model = new_model(arm, tokenizer, 0)
            forward = as_function(model, way == "compiled")
            optimizers = make_optimizers(model, PLAN)

            def step(forward=forward, optimizers=optimizers):
                train_step(forward, [(x, y)])
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            jobs[f"{arm}, {way}"] = step
    for job in jobs.values(): job() # compiles
    taken = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = perf_counter()
            job()
            taken[name].append(perf_counter() - start)
    return {name: x.numel() / median(t) for name, t in taken.items()}


@torch.inference_mode()
def token_ms(model, tokenizer, warm=16, new=48):
    """Milliseconds of each of the last `new` tokens of every context.

    The contexts take turns, token by token and in random order, so that other
    programs disturb all alike. The first steps after a long prompt are left
    out: they pay for freeing what reading it took."""
    batches = {c: Batch(model, [some_text(tokenizer, c - warm - new)], 0)
               for c in CONTEXTS}
    taken = {c: [] for c in CONTEXTS}
    for turn in range(1 + warm + new):
        for c in random.Random(turn).sample(CONTEXTS, len(CONTEXTS)):
            start = perf_counter()
            batches[c].step(model, chooser())
            if turn > warm: taken[c].append(1000 * (perf_counter() - start))
    return taken


def time_all(tokenizer, folder, rounds, **_):
    "Training and decoding speed; bytes remembered against context."
    torch.set_num_threads(1)
    models = {arm: load_base(str(folder / f"{arm}-0"), False) for arm in BEST}
    ms = {arm: {c: [] for c in CONTEXTS} for arm in models}
    for _ in range(rounds):
        for arm, (model, words) in models.items():
            for c, taken in token_ms(model, words).items(): ms[arm][c] += taken
    held = {arm: memory(model, words, CONTEXTS, seconds=1e9)
            for arm, (model, words) in models.items()}
    return dict(
        training=training_speed(tokenizer, rounds), machine=machine(),
        ms={arm: {c: median(t) for c, t in row.items()}
            for arm, row in ms.items()},
        held={arm: {"predicted": m["bytes remembered, predicted"],
                    "held": m["bytes remembered"]} for arm, m in held.items()})


def crossings(result):
    "Tokens of context from which RWKV-7 is the cheaper one: how -> tokens."
    a, b = (result["ms"][arm] for arm in ("transformer", "rwkv"))
    gaps = [(int(c), a[c] - b[c]) for c in a]
    dear = max((i for i, (_, gap) in enumerate(gaps) if gap <= 0), default=None)
    measured = gaps[0][0]
    if dear is not None: # a straight line between the two points around it
        (c, low), (after, high) = gaps[dear:dear + 2]
        measured = c - low * (after - c) / (high - low)
    return {"bytes, predicted: 66 · 192 / (2 · 64)": 66 * 192 / (2 * 64),
            "arithmetic, predicted: 9 · 64 / 4": 9 * 64 / 4,
            "ms a token, measured": measured}


def accuracy_lines(result):
    "Right answers by group, with a test against the transformer."
    runs, n = result["runs"], result["n"]
    lines = ["| run | " + " | ".join(GROUPS) + " | held-out loss |",
             "|---" * (2 + len(GROUPS)) + "|"]
    for name, run in runs.items():
        seed = name.rpartition(", ")[2]
        base, cells = runs[f"transformer, {seed}"]["right"], []
        for i in range(len(GROUPS)):
            part = slice(i * n, (i + 1) * n)
            p = "" if run["right"] == base else (
                ", p " + p_text(run["right"][part], base[part]))
            cells.append(cell(run["right"][part]) + p)
        loss = run["log"][-1]["held_out"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {loss:.3f} |")
    return lines


def speed_lines(result):
    "Training speed, and cost of a token against context."
    ms, held = result["ms"], result["held"]
    lines = ["| | " + " | ".join(result["training"]) + " |",
             "|---" * (1 + len(result["training"])) + "|",
             "| tokens/s | " + " | ".join(
                 f"{v:,.0f}" for v in result["training"].values()) + " |", "",
             "| context | " + " | ".join(
                 f"{arm}, ms a token | bytes predicted | bytes held"
                 for arm in ms) + " |", "|---" * (1 + 3 * len(ms)) + "|"]
    for c in ms["rwkv"]:
        cells = [f"{ms[arm][c]:.2f} | {held[arm]['predicted'][c]:,} | "
                 f"{held[arm]['held'][c]:,}" for arm in ms]
        lines.append(f"| {int(c):,} | " + " | ".join(cells) + " |")
    return lines + ["", "RWKV-7 is the cheaper one from this context on:", ""
                    ] + [f"- {how}: {n:,.0f} tokens"
                         for how, n in crossings(result).items()]


def to_markdown(result):
    sizes = {name.partition(",")[0]: run["parameters"]
             for name, run in result["runs"].items()}
    return "\n".join([
        "# A transformer and RWKV-7, at equal parameters and tokens", "",
        f"Transformer {sizes['transformer']:,} parameters, RWKV-7 "
        f"{sizes['rwkv']:,}; {result['tokens']:,} training tokens each, "
        f"the same worked problems in the same order. {result['n']} test "
        "problems a group, greedy; brackets: Wilson's 95 % interval; p: exact "
        "McNemar against the transformer of the same seed. `python benchmarks/"
        "architectures.py`, four stages.", "",
        "Held-out loss at two learning rates, on a seed of its own; the better "
        "one was taken: " + "; ".join(
            f"{name}: {loss:.3f}" for name, loss in result["rates"].items())
        + ".", "", *accuracy_lines(result), "",
        f"Times: {result['machine']}, medians, taken in turn.", "",
        *speed_lines(result), ""])


STAGES = dict(rates=find_rates, train=train_all, grade=grade_all, time=time_all)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--only", default="", help="arms that begin so")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=300,
                        help="test problems a group")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path,
                        default=Path("_build/architectures"))
    args = vars(parser.parse_args())
    stage, only = args.pop("stage"), args.pop("only")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    part = STAGES[stage](load_tokenizer(find_base("student")[0]),
                         only=lambda arm: arm.startswith(only), **args)
    if only or not part: return
    path = HERE / "architectures.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    result = json.loads(json.dumps(result | part))
    path.write_text(json.dumps(result, indent=1) + "\n")
    if {"rates", "runs", "ms"} <= {*result}:
        path.with_suffix(".md").write_text(to_markdown(result))


if __name__ == "__main__": main()
