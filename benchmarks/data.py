"""Rows a second from GSM8K to masked token ids: the plain way and ours.

Needs GSM8K and a tokenizer (default: Qwen2.5's) from the hub or its cache."""
import argparse
import re
import statistics
import time

from datasets import load_dataset
from transformers import AutoTokenizer

from tiny_reason.data import (SYSTEM_PROMPT, encode_problems, make_problems,
                              prepare)
from tiny_reason.lib.prompts import encode_texts


def plain(tokenizer):
    "One row at a time through the chat template, prompt and whole record."
    rows = []
    for row in load_dataset("openai/gsm8k", "main", split="train"):
        reasoning, final = row["answer"].split("####")
        reasoning = re.sub(r"<<[^<>]*>>", "", reasoning).strip()
        content = (f"<think>\n{reasoning}\n</think>\n\n"
                   f"**Final Answer:** {final.strip().replace(',', '')}")
        prompt = [dict(role="system", content=SYSTEM_PROMPT),
                  dict(role="user", content=row["question"])]
        whole = [*prompt, dict(role="assistant", content=content)]
        head = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        mask = [0] * len(head) + [1] * (len(ids) - len(head))
        rows.append(dict(input_ids=ids[:-1], completion_mask=mask[:-1]))
    return rows


def ours(tokenizer):
    "Loaded, checked, deduplicated, encoded, masked, split."
    train, validation, _ = prepare(n=None, tokenizer=tokenizer)
    return [*validation, *train]


def encoding(tokenizer, rows):
    "`encode_problems` alone."
    return encode_problems(rows, tokenizer)


def tokenizer_alone(tokenizer, rows):
    "The tokenizer on the same texts: what no Python can be faster than."
    return encode_texts([t for row in rows for t in row.values()], tokenizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", default="Qwen/Qwen2.5-1.5B-Instruct")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    data = load_dataset("openai/gsm8k", "main", split="train").to_list()
    ways = {"plain: row by row": lambda: plain(tokenizer),
            "ours: `prepare`": lambda: ours(tokenizer),
            "ours: `encode_problems`": lambda: encoding(tokenizer, data),
            "the tokenizer's calls alone": lambda: tokenizer_alone(
                tokenizer, data)}
    assert (sorted(r["input_ids"] for r in plain(tokenizer))
            == sorted(r["input_ids"] for r in ours(tokenizer)))
    seconds = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    slowest = median["plain: row by row"]
    print("| way | seconds | rows/s | times plain |\n|---|---|---|---|")
    for name, s in median.items():
        print(f"| {name} | {s:.2f} | {len(data) / s:,.0f} "
              f"| {slowest / s:.1f} |")
    start = time.perf_counter()
    make_problems(10_000)
    print(f"\n10,000 generated problems: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
