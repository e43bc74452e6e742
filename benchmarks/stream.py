"""Speed of one answer at batch 1; prints a table for benchmarks/stream.md.

Our `stream.stream` beside transformers' own TextIteratorStreamer, for the live NF4
model with an adapter and for the same model merged. The four take turns on each
question, so that a busy moment of the machine hits all of them. Each answer has
64 tokens exactly: the end tokens are forbidden to both.
"""
import argparse
import platform
import statistics
import threading
import time

import torch
from transformers import (GenerationConfig, LogitsProcessorList,
                          SuppressTokensLogitsProcessor,
                          TextIteratorStreamer)

from tiny_reason.lib import decode, stream
from tiny_reason.data import build_prompt, make_problems
from tiny_reason.lib.decode import end_ids
from tiny_reason.model import add_lora, load_base, load_tuned, merge

TOKENS = 64


def ours(model, tokenizer, question):
    "(seconds to the first token, tokens a second after it, seconds, text)"
    pace, start = {}, time.perf_counter()
    text = "".join(stream.stream(model, tokenizer, question, TOKENS, 0,
                               pace=pace))
    assert pace["tokens"] == TOKENS
    rate = (TOKENS - 1) / (pace["seconds"] - pace["first"])
    return pace["first"], rate, time.perf_counter() - start, text


class Stamps(TextIteratorStreamer):
    "Notes when each token arrives; the prompt comes first and is no token."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())
        super().put(value)


def theirs(model, tokenizer, question):
    prompt = torch.tensor([build_prompt(question, tokenizer)],
                          device=model.device)
    streamer = Stamps(tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False,
                              eos_token_id=None,
                              pad_token_id=end_ids(model, tokenizer)[0])
    banned = LogitsProcessorList([SuppressTokensLogitsProcessor(
        end_ids(model, tokenizer), device=model.device)])
    start = time.perf_counter()
    worker = threading.Thread(target=model.generate, kwargs=dict(
        input_ids=prompt, attention_mask=torch.ones_like(prompt),
        generation_config=config, streamer=streamer, logits_processor=banned))
    worker.start()
    text = "".join(streamer)
    worker.join()
    _, first, *_, last = streamer.times
    return (first - start, (TOKENS - 1) / (last - first),
            time.perf_counter() - start, text)


def without_end(model, tokenizer):
    "Forbid the end tokens to our decoder, as `theirs` does to transformers."
    ends = torch.tensor(end_ids(model, tokenizer), device=model.device)
    usual = decode.chooser
    def chooser(*args):
        choose = usual(*args)
        return lambda scores: choose(scores.index_fill(1, ends, -torch.inf))
    decode.chooser = chooser


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="student")
    parser.add_argument("--adapter", help="default: a new one")
    parser.add_argument("--n", type=int, default=12, help="questions")
    parser.add_argument("--machine", default=platform.machine())
    args = parser.parse_args()
    if args.adapter: nf4, tokenizer = load_tuned(args.adapter)
    else:
        nf4, tokenizer = load_base(args.name)
        nf4 = add_lora(nf4)
    models = {"NF4 + adapter": nf4.eval(), "merged": merge(nf4)}
    without_end(nf4, tokenizer)
    questions = make_problems(args.n, split="validation")["question"]
    rows, same = {}, {name: 0 for name in models}
    for turn, question in enumerate([questions[0], *questions]):
        for name, model in models.items():
            texts = []
            for how in ours, theirs:
                *figures, text = how(model, tokenizer, question)
                texts.append(text)
                if turn: rows.setdefault((name, how), []).append(figures)
            same[name] += bool(turn) and texts[0] == texts[1]
    report(rows, same, nf4, args)


def report(rows, same, model, args):
    device = (torch.cuda.get_device_name() if torch.cuda.is_available()
              else f"{torch.get_num_threads()} thread(s)")
    print(f"# One answer at a time: {args.name}\n\n{args.machine}; {device}; "
          f"torch {torch.__version__}. {args.n} validation problems, {TOKENS} greedy "
          "tokens each, the four taking turns; medians, and the smallest and "
          "largest in brackets.\n")
    print("| model | streamer | first token, ms | tokens/s after it "
          "| same text |\n|---|---|---|---|---|")
    for (name, how), figures in rows.items():
        first, rate = ([row[i] for row in figures] for i in (0, 1))
        first = [1000 * x for x in first]
        def cell(xs): return (f"{statistics.median(xs):.0f} "
                              f"({min(xs):.0f}–{max(xs):.0f})")
        label = {ours: "`stream.stream`", theirs: "`TextIteratorStreamer`"}[how]
        print(f"| {name} | {label} | {cell(first)} | {cell(rate)} "
              f"| {same[name]} of {args.n} |")


if __name__ == "__main__": main()
