"""One pre-training run, looked at eight times; and once more by AdamW alone.

    python benchmarks/watched.py run [--folder _build/watched]
    python benchmarks/watched.py table

The student's shape, text, batch and rate, and 1,200 of its 4,000 steps. Both
runs read the same 9.8 million tokens; in the second one AdamW takes the place
of Muon, at the rate that 200 steps like best on held-out text: 1e-3, 2e-3 and
4e-3 are tried, and further ones while the best lies at an edge.

`run` keeps the weights of eight steps in `--folder` (6 MB each) and measures
each of them: loss on the tokens of questions and on those of solutions, sums,
familiar problems solved, one answer in full; how well words that come a second
time are copied, and the sum behind `<<`; how much attention each head gives to
the token that is to be copied, and what is lost without that head. The three
heads that look hardest are silenced together, and so are three others, twelve
times. A killed run goes on from its last checkpoint; what is measured is not
measured again. `table` writes watched.json and watched.md beside this file."""
import argparse
import json
import random
import re
from importlib.resources import files
from itertools import islice, product
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from copying import looked_back, PARTS
from spine import problems
from transformers import AutoModelForCausalLM, GenerationConfig

from tiny_reason.eval import elsewhere, evaluate
from tiny_reason.lib.device import machine
from tiny_reason.lib.disk import staged, write_whole
from tiny_reason.lib.folders import load_tokenizer
from tiny_reason.lib.heads import attention_of, silenced
from tiny_reason.lib.loop import (follow, identity, restore, State,
                                  step_batches, with_first)
from tiny_reason.lib.prompts import LAYOUTS
from tiny_reason.lib.show import as_table
from tiny_reason.lib.stats import wilson
from tiny_reason.pretrain import (as_function, documents, encoded,
                                  fresh_documents, held_out_loss, made_up,
                                  make_optimizers, new_model, Plan, rows,
                                  save_model, sums, take_steps, worked)

HERE = Path(__file__).parent
SEED = 3407 # of `pretrain_student`
LOOKS = 20, 60, 120, 200, 320, 500, 800, 1200 # steps of 1,200
RATES = 1e-3, 2e-3, 4e-3
RUNS = "Muon", "AdamW"
FIRST = re.compile(r"\d+[-+*/]\d+=<<(\d)")
ANSWER = LAYOUTS["question"].partition("{}")[2]


def optimizers_of(name, model, plan):
    "As shipped; or AdamW for the matrices too, with the decay they had."
    muon, adam = make_optimizers(model, plan)
    if name == "Muon": return [muon, adam]
    group = muon.param_groups[0]
    return [torch.optim.AdamW(group["params"], lr=plan.learning_rate,
                              betas=adam.defaults["betas"],
                              weight_decay=group["weight_decay"]), adam]


def kept(steps, looks, save, folder):
    "Pass the steps on; write the weights of some."
    for step, loss in steps:
        if step in looks:
            with staged(folder / "looks") as out: save(out / f"step-{step}")
        yield step, loss


def train(name, plan, folder, looks=(), save_every=100, compiled=True):
    "The log of one run; the second call goes on where the first was killed."
    done = folder / "log.json"
    if done.is_file(): return json.loads(done.read_text())
    tokenizer = load_tokenizer(files("tiny_reason") / "student")
    torch.manual_seed(SEED)
    model = new_model("student", tokenizer)
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 0], pad_token_id=0, do_sample=False)
    text, other = (encoded(documents(SEED + i), tokenizer) for i in (1, 2))
    held_out = list(islice(rows(other), 8))
    first, data = with_first(rows(text, plan.batch, plan.length), plan)
    state = State(folder, model, optimizers_of(name, model, plan),
                  identity(model, plan, first) | dict(optimizer=name), [])
    restore(state)
    model.train()
    steps = take_steps(state, as_function(model, compiled), step_batches(
        data, plan, state.done, "cpu"), plan)
    def save(out, dtype=None): save_model(model, tokenizer, out, dtype)
    follow(state, kept(steps, looks, lambda out: save(out, torch.bfloat16),
                       folder), plan.steps, save, save_every,
           lambda: held_out_loss(model, held_out))
    write_whole(done, [json.dumps(state.log)])
    return state.log


def sweep(plan, folder, compiled):
    "Held-out loss by AdamW's rate; the best is not at an edge."
    tried, todo = {}, [*RATES]
    while todo:
        rate = todo.pop()
        plan.learning_rate = rate
        log = train("AdamW", plan, folder / f"rate-{rate:g}", (), plan.steps,
                    compiled)
        tried[rate] = log[-1]["held_out"]
        best = min(tried, key=tried.get)
        if not todo and best == min(tried): todo.append(best / 2)
        elif not todo and best == max(tried): todo.append(best * 2)
    return dict(sorted(tried.items()))


@torch.no_grad()
def losses(model, tokenizer, texts, part):
    "Nats a token of the questions, or of the solutions, of worked problems."
    nats = []
    for text in texts:
        cut = text.index(ANSWER)
        low, high = {"question": (len("### Question:\n"), cut),
                     "solution": (cut + len(ANSWER), len(text))}[part]
        batch = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor(batch["input_ids"])
        loss = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:],
                               reduction="none")
        nats += [x for x, (a, _) in zip(
            loss.tolist(), batch["offset_mapping"][1:]) if low <= a < high]
    return sum(nats) / len(nats)


def repeated_words(tokenizer, n, words=12):
    "Lines of made-up words, each line a second time: ids of both, one after."
    rng = random.Random(f"{SEED} repeated")
    lines = (" ".join(made_up(rng) for _ in range(words)) + "\n"
             for _ in range(n))
    return [2 * tokenizer(line)["input_ids"] for line in lines]


@torch.no_grad()
def words_copied(model, lines):
    """Of tokens that come a second time (but the first of a line): how many
    are the likeliest, and the mean of their probability."""
    right, chance = [], []
    for line in lines:
        ids, half = torch.tensor(line), len(line) // 2
        scores = model(ids[None]).logits[0, half:-1]
        right += (scores.argmax(-1) == ids[half + 1:]).tolist()
        chance += scores.softmax(-1).gather(-1, ids[half + 1:, None]).tolist()
    return dict(n=len(right), right=sum(right) / len(right),
                chance=sum(x for x, in chance) / len(chance))


def looked_at(model, lines):
    """Mean attention that each head (row: layer) gives to the token that is to
    be copied, and to the one before; over the same places as `words_copied`."""
    found, n = {"copy": 0, "previous": 0}, 0
    for line in lines:
        heads, half = attention_of(model, torch.tensor([line])), len(line) // 2
        asked = torch.arange(half, len(line) - 1)
        found["copy"] += heads[:, :, asked, asked - half + 1].sum(-1)
        found["previous"] += heads[:, :, asked, asked - 1].sum(-1)
        n += len(asked)
    return {k: [[round(x, 4) for x in row] for row in (v / n).tolist()]
            for k, v in found.items()}


@torch.no_grad()
def sums_copied(model, tokenizer, traces):
    "Mean probability of the right first digit behind `<<`."
    chance = []
    for trace in traces:
        text = LAYOUTS["question"].format(trace["question"]) + trace["answer"]
        batch = tokenizer(text, return_offsets_mapping=True)
        at = {a: i for i, (a, _) in enumerate(batch["offset_mapping"])}
        ids = torch.tensor(batch["input_ids"])
        p = model(ids[None]).logits[0].softmax(-1)
        places = [at[m.start(1)] for m in FIRST.finditer(text)]
        chance += [p[i - 1, ids[i]].item() for i in places]
    return sum(chance) / len(chance)


def measure(folder, test, n):
    "All that is asked of one checkpoint."
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    texts = fresh_documents(worked, n, SEED)
    lines = repeated_words(tokenizer, n)
    traces = problems("validation", n, groups=("familiar",))
    def without(heads):
        with silenced(model, heads):
            return dict(heads=heads, solution=losses(model, tokenizer, texts,
                                                     "solution"),
                        words=words_copied(model, lines)["chance"],
                        sums=sums_copied(model, tokenizer, traces))
    seen = looked_at(model, lines)
    heads = [*product(range(len(seen["copy"])), range(len(seen["copy"][0])))]
    heads.sort(key=lambda x: -seen["copy"][x[0]][x[1]])
    rng = random.Random(SEED)
    others = [sorted(rng.sample(heads[3:], 3)) for _ in range(12)]
    said = evaluate(model, tokenizer, test, "question", max_new_tokens=160)
    calculated = elsewhere(model, tokenizer, {}, sums(300))
    return dict(
        question=losses(model, tokenizer, texts, "question"),
        solution=losses(model, tokenizer, texts, "solution"),
        sums=[r["correct"] for r in calculated],
        familiar=[r["correct"] for r in said.records],
        sample=dict(question=test[0]["question"],
                    answer=said.records[0]["completion"]),
        words=words_copied(model, lines),
        annotated=looked_back(model, tokenizer, traces), attention=seen,
        silenced=dict(none=without([]), each=[without([h]) for h in heads],
                      strongest=without(heads[:3]),
                      others=[without(some) for some in others]))


def run(args):
    plan = Plan(steps=args.steps, batch=args.batch, length=args.length)
    trial = Plan(steps=max(args.steps // 6, 1), batch=args.batch,
                 length=args.length, warmup=30)
    looks = [max(1, round(step * args.steps / 1200)) for step in LOOKS]
    test = problems("test", args.n, groups=("familiar",))
    for name in RUNS:
        folder = args.folder / name
        if name == "AdamW":
            tried = sweep(trial, args.folder, args.compiled)
            plan.learning_rate = min(tried, key=tried.get)
            print("held-out loss by rate:", tried, flush=True)
            write_whole(args.folder / "rates.json", [json.dumps(
                dict(steps=trial.steps, held_out=tried))])
        log = train(name, plan, folder, looks, args.save_every, args.compiled)
        print(name, plan.learning_rate, log[-1], flush=True)
        for step in looks:
            there = folder / "looks" / f"step-{step}"
            found = there.with_suffix(".json")
            if found.is_file(): continue
            write_whole(found, [json.dumps(dict(
                step=step, tokens=step * plan.batch * plan.length,
                **measure(there, test, args.texts)))])
            print(name, step, flush=True)
        (folder / "plan.json").write_text(json.dumps(vars(plan)))


def gathered(folder):
    runs = {}
    for name in RUNS:
        looks = [json.loads(p.read_text())
                 for p in (folder / name / "looks").glob("*.json")]
        for look in looks:
            for kind in ("sums", "familiar"):
                look[kind] = "".join(str(int(x)) for x in look[kind])
        runs[name] = dict(
            plan=json.loads((folder / name / "plan.json").read_text()),
            log=json.loads((folder / name / "log.json").read_text()),
            looks=sorted(looks, key=lambda look: look["step"]))
    return dict(rates=json.loads((folder / "rates.json").read_text()),
                runs=runs)


def share(flags):
    low, high = wilson(flags.count("1"), len(flags))
    return f"{flags.count('1') / len(flags):.0%} [{low:.0%}, {high:.0%}]"


def line_of(look):
    seen = look["attention"]["copy"]
    at = max(product(range(len(seen)), range(len(seen[0]))),
             key=lambda x: seen[x[0]][x[1]])
    all_, three = look["silenced"]["none"], look["silenced"]["strongest"]
    others = [o["words"] for o in look["silenced"]["others"]]
    return [f"{look['step']:,}", f"{look['tokens']:,}",
            f"{look['question']:.3f}", f"{look['solution']:.3f}",
            share(look["sums"]), share(look["familiar"]),
            f"{look['words']['right']:.1%}",
            "{:.0%}, {:.0%}, {:.0%}".format(*(
                s["right"] / s["n"] for s in look["annotated"].values())),
            f"{seen[at[0]][at[1]]:.0%} in {at[0]}.{at[1]}",
            f"{all_['words']:.2f} → {three['words']:.2f} "
            f"({min(others):.2f} to {max(others):.2f})",
            f"{all_['solution']:.2f} → {three['solution']:.2f}"]


def page(result):
    first, second = (result["runs"][name] for name in RUNS)
    rates = result["rates"]
    parts = [
        "# One pre-training run, looked at eight times",
        "What is asked of each checkpoint stands in the head of `watched.py`. "
        "*Question* and *solution*: nats a token. *Words*: tokens of a line of "
        "made-up words that are copied when it comes again. *Behind <<*: the "
        f"first token of each part ({', '.join(PARTS)}) is the likeliest. "
        "*Hardest*: the attention that one head (layer.head) gives to the "
        "token to be copied. *Three silenced*: mean probability of that token "
        "before and without the three heads that look hardest (in brackets: "
        "without three others, twelve draws), and loss on solutions. One seed."]
    for name in RUNS:
        r = result["runs"][name]
        parts += [f"## {name}, rate {r['plan']['learning_rate']:g}", as_table(
            ["step", "tokens", "question", "solution", "sums", "familiar",
             "words", "behind <<", "hardest", "three silenced: words",
             "solutions"], [line_of(look) for look in r["looks"]])]
    held = {name: {h["step"]: h["held_out"] for h in r["log"]
                   if "held_out" in h} for name, r in result["runs"].items()}
    parts += ["## Equal tokens: held-out loss", as_table(
        ["step", *RUNS], [[f"{s:,}", *(f"{held[name][s]:.3f}" for name in RUNS)]
                          for s in held["Muon"]])]
    ends = [f"{v:.3f} ({float(k):g})" for k, v in rates["held_out"].items()]
    parts += [f"AdamW's rate: {rates['steps']} steps each ended at "
              f"{', '.join(ends)}.",
        f"{first['log'][-1]['seconds'] / 60:.0f} and "
        f"{second['log'][-1]['seconds'] / 60:.0f} minutes of training. "
        f"{machine()}. `python benchmarks/watched.py run`, then `python "
        "benchmarks/watched.py table`.\n"]
    return "\n\n".join(parts)


def table(args):
    result = gathered(args.folder)
    write_whole(args.out / "watched.json", [json.dumps(result), "\n"])
    write_whole(args.out / "watched.md", [page(result)])
    print(page(result))


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("run", "table"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--save_every", type=int, default=100)
    parser.add_argument("--n", type=int, default=100, help="test problems")
    parser.add_argument("--texts", type=int, default=24,
                        help="worked problems, lines and traces to look at")
    parser.add_argument("--no_compile", dest="compiled", action="store_false")
    parser.add_argument("--folder", type=Path, default=Path("_build/watched"))
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(words)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    {"run": run, "table": table}[args.stage](args)


if __name__ == "__main__": main()
