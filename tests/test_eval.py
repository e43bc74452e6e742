"""Decoding and records: what 03_eval cannot show in a cell."""
import json
import random
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tiny_reason import eval as ev
from tiny_reason.data import build_prompt, load_problems
from tiny_reason.files import find_base, load_tokenizer
from tiny_reason.model import load_base, merge

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def unsure():
    """A model of random weights: its answers ramble, and none is alike.

    Its choices are close calls, so it computes in fp64: what differs is then
    a mistake and no rounding."""
    folder = find_base("student")[0]
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    config.initializer_range = 0.08
    torch.manual_seed(0)
    return (AutoModelForCausalLM.from_config(config).double().eval(),
            load_tokenizer(folder))


@pytest.fixture(scope="module")
def student():
    base, tokenizer = load_base("student", four_bit=False, device="cpu")
    return merge(base), tokenizer


def prompts_of(n, length=40):
    rng = random.Random(n)
    return [[rng.randrange(20, 1000) for _ in range(rng.randint(1, length))]
            for _ in range(n)]


def theirs(model, tokenizer, prompt, limit, **config):
    ids = torch.tensor([prompt])
    stops = ev.end_ids(model, tokenizer)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=limit, do_sample=False, eos_token_id=stops,
            pad_token_id=stops[0], **config))
    return out[0, len(prompt):].tolist()


def test_greedy_means_greedy(unsure):
    model, tokenizer = unsure
    prompts, limit = prompts_of(8), 30
    before = model.generation_config
    model.generation_config = GenerationConfig(
        repetition_penalty=1.1, do_sample=True, temperature=0.7, top_k=20,
        top_p=0.8, eos_token_id=ev.end_ids(model, tokenizer))
    ours = ev.generate_ids(model, tokenizer, prompts, limit)
    model.generation_config = before
    plain = [theirs(model, tokenizer, p, limit) for p in prompts]
    penalised = [theirs(model, tokenizer, p, limit, repetition_penalty=1.1)
                 for p in prompts]
    assert ours == plain
    assert sum(a != b for a, b in zip(plain, penalised)) > 3


def test_tokens_do_not_depend_on_the_slots(student):
    model, tokenizer = student
    problems = load_problems("arithmetic", split="validation", n=66)
    prompts = [build_prompt(q, tokenizer, style=s) for q, s in zip(
        problems["question"], ["question", "think"] * 33)]
    one, eight, many = (ev.generate_ids(model, tokenizer, prompts, 24,
                                        batch_size=size)
                        for size in (1, 8, 64))
    assert one == eight == many


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 16), st.integers(1, 9), st.integers(1, 16))
def test_refilled_slots_give_each_prompt_its_own_answer(
        unsure, n, slots, limit):
    "With answers of very different lengths: some tokens are made to stop."
    model, _ = unsure
    prompts, stops = prompts_of(n), list(range(0, 1152, 12))
    ended = {}
    def done(i, ids, seconds):
        assert i not in ended and seconds >= 0
        ended[i] = list(ids)
    with torch.inference_mode():
        greedy = ev.chooser()
        alone = [ev.decode_batch(model, [p], stops, limit, greedy)[0]
                 for p in prompts]
        together = ev.decode_batch(model, prompts, stops, limit, greedy,
                                   slots, done)
    assert together == alone
    assert ended == dict(enumerate(together))
    for ids in together:
        assert 1 <= len(ids) <= limit and not set(ids[:-1]) & set(stops)


def test_refilling_takes_fewer_steps_than_waiting(unsure):
    model, _ = unsure
    calls, prompts = [], prompts_of(32)
    stops = list(range(0, 1152, 12))
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        ids = ev.decode_batch(model, prompts, stops, 60, ev.chooser(), 8)
    hook.remove()
    batches = [max(map(len, ids[i:i + 8])) for i in range(0, 32, 8)]
    assert len(calls) < sum(batches)


def test_a_prompt_is_needed_and_no_tokens_are_fine(unsure):
    model, tokenizer = unsure
    with pytest.raises(ValueError, match="empty"):
        ev.generate_ids(model, tokenizer, [[]])
    assert ev.generate_ids(model, tokenizer, []) == []
    assert ev.generate_ids(model, tokenizer, [[30]], 0) == [[]]


def test_a_vllm_engine_takes_the_same_call(unsure, monkeypatch):
    asked, tokenizer = {}, unsure[1]
    def params(**kwargs): asked.update(kwargs); return kwargs
    monkeypatch.setitem(sys.modules, "vllm",
                        types.SimpleNamespace(SamplingParams=params))
    class LLM:
        def generate(self, prompts, params):
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(
                token_ids=p["prompt_token_ids"][::-1])]) for p in prompts]
    LLM.__module__ = "vllm.entrypoints.llm"
    assert ev.generate_ids(LLM(), tokenizer, [[30, 31], [32]], 5) == [
        [31, 30], [32]]
    assert asked["temperature"] == 0 and asked["repetition_penalty"] == 1


CHILD = """
import sys
from tiny_reason.data import load_problems
from tiny_reason.eval import evaluate
from tiny_reason.model import load_base, merge
base, tokenizer = load_base("student", four_bit=False, device="cpu")
problems = load_problems("arithmetic", split="validation", n=60)
evaluate(merge(base), tokenizer, problems, max_new_tokens=120, batch_size=2,
         style="question", records=sys.argv[1], resume=True)
"""


def test_ctrl_c_keeps_what_is_done(tmp_path, student):
    path = tmp_path / "records.jsonl"
    child = subprocess.Popen([sys.executable, "-c", CHILD, path],
                             stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if path.is_file() and path.read_text().count("\n") >= 5: break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) != 0
    kept = ev.read_records(path)
    assert 5 <= len(kept) < 60
    problems = load_problems("arithmetic", split="validation", n=60)
    how = dict(max_new_tokens=120, style="question")
    seen = []
    def count(*args, **kwargs):
        seen.append(len(args[2]))
        return real(*args, **kwargs)
    real, ev.generate_ids = ev.generate_ids, count
    try: resumed = ev.evaluate(*student, problems, records=path, resume=True,
                               **how)
    finally: ev.generate_ids = real
    assert seen == [60 - len(kept)]
    fresh = ev.evaluate(*student, problems, **how)
    assert [r["completion"] for r in resumed.records] == [
        r["completion"] for r in fresh.records]
    assert resumed.correct == fresh.correct
    assert [r["question"] for r in ev.read_records(path)] == [
        *problems["question"]]


def record(question, correct, **more):
    return dict(dict(question=question, correct=correct, formatted=True,
                     tokens=3, finished=True, value="1", steps=[],
                     completion="", extracted="1", gold="1", reason=""), **more)


def test_a_bad_line_is_named_and_a_torn_one_left_out(tmp_path):
    path = tmp_path / "r.jsonl"
    good = json.dumps(record("q", True))
    path.write_text(good + "\n" + good[:20])
    assert len(ev.read_records(path)) == 1
    path.write_text("[1]\n" + good + "\n")
    with pytest.raises(ValueError, match="line 1"): ev.read_records(path)


def test_compare_pairs_by_question():
    a = ev.Report([record(q, q != "x") for q in "xyz"])
    b = ev.Report([record(q, True) for q in "zyxw"])
    rows = ev.compare({"a": a, "b": b})
    assert [(r["n"], r["right"]) for r in rows] == [(3, 2), (3, 3)]
    assert rows[0]["p"] == 1.0 and rows[1]["p"] is None
    assert ev.to_markdown(rows).count("\n") == 3
    assert ev.plot_runs(rows).axes


def test_kinds_of_traces():
    wrong = [["1 + 1 = 3", False]]
    assert [ev.kind_of(r) for r in (
        record("q", True), record("q", True, steps=wrong),
        record("q", False, steps=wrong), record("q", False),
        record("q", False, value=None),
        record("q", False, finished=False))] == list(ev.KINDS)
    text = ev.show_examples([record("<b>", False, completion="<script>")],
                            ev.taxonomy([record("<b>", False)]))
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_majority_ignores_what_has_no_value():
    votes = [dict(value=v, tokens=2) for v in (None, None, None, "5", "4", "4")]
    won = ev.majority(votes)
    assert (won["value"], won["votes"], won["tokens"]) == ("4", 2, 12)
    assert ev.majority(votes[:3])["value"] is None


def test_perplexity_of_a_uniform_model(unsure):
    model, tokenizer = unsure
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad(): model.lm_head.weight.zero_()
    assert ev.perplexity(model, tokenizer, ["Some text."]) == pytest.approx(
        model.config.vocab_size, rel=1e-4)
    with torch.no_grad(): model.lm_head.weight.copy_(weight)
    with pytest.raises(ValueError): ev.perplexity(model, tokenizer, [""])
