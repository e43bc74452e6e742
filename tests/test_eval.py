"""Decoding and records: what 03_eval cannot show in a cell."""
import json
import math
import random
import signal
import subprocess
import sys
import time
import types
from itertools import islice

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tiny_reason import eval as ev
from tiny_reason.lib import costs, decode, fast, journal, show
from tiny_reason.data import build_prompt, load_problems
from tiny_reason.lib.prompts import encode_text
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.lib.stats import ratio_interval
from tiny_reason.model import load_base, merge
from tiny_reason.pretrain import documents, fresh_documents, narrative, sums
from tiny_reason.rwkv import RWKV7Config, RWKV7ForCausalLM

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
    stops = decode.end_ids(model, tokenizer)
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
        top_p=0.8, eos_token_id=decode.end_ids(model, tokenizer))
    ours = decode.generate_ids(model, tokenizer, prompts, limit)
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
    one, eight, many = (decode.generate_ids(model, tokenizer, prompts, 24,
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
        greedy = decode.chooser()
        alone = [decode.decode_batch(model, [p], stops, limit, greedy)[0]
                 for p in prompts]
        together = decode.decode_batch(model, prompts, stops, limit, greedy,
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
        ids = decode.decode_batch(model, prompts, stops, 60, decode.chooser(), 8)
    hook.remove()
    batches = [max(map(len, ids[i:i + 8])) for i in range(0, 32, 8)]
    assert len(calls) < sum(batches)


def test_the_cache_holds_no_more_than_was_counted(unsure, monkeypatch):
    "Rows as there are slots; positions as in the longest, and 64 to spare."
    model, _ = unsure
    prompts, stops, limit = prompts_of(40), list(range(0, 1152, 12)), 90
    most, update = [0, 0], decode.RoomyLayer.update
    def seen(self, *args, **kwargs):
        found = update(self, *args, **kwargs)
        most[:] = map(max, most, self.buffers[0].shape[::2])
        return found
    monkeypatch.setattr(decode.RoomyLayer, "update", seen)
    with torch.inference_mode():
        ids = decode.decode_batch(model, prompts, stops, limit, decode.chooser(), 6)
    longest = max(len(p) + len(i) for p, i in zip(prompts, ids))
    assert most[0] == 6 and most[1] <= longest + 64 < 40 + limit + 64


def test_nothing_of_onednn_stays_on_a_model(student):
    "Not after an error either; and what is no plain layer is left alone."
    model, tokenizer = student
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    strange = layers[0]
    strange.forward = strange.forward # as a library would that wraps layers
    kept = vars(strange)["forward"]
    try:
        with pytest.raises(KeyError), fast.onednn(model):
            assert vars(strange)["forward"] is kept
            raise KeyError
        assert vars(strange)["forward"] is kept
    finally: del strange.forward
    assert not any("forward" in vars(m) for m in layers)
    base, _ = load_base("student", four_bit=True, device="cpu")
    with fast.onednn(base):
        assert not any("forward" in vars(m) for m in base.modules()
                       if "4bit" in type(m).__name__)


def test_a_prompt_is_needed_and_no_tokens_are_fine(unsure):
    model, tokenizer = unsure
    with pytest.raises(ValueError, match="empty"):
        decode.generate_ids(model, tokenizer, [[]])
    assert decode.generate_ids(model, tokenizer, []) == []
    assert decode.generate_ids(model, tokenizer, [[30]], 0) == [[]]


def small(kind, **more):
    "An untrained model of some architecture of transformers."
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, vocab_size=64, **more)).eval()


def test_rows_are_counted_by_what_a_model_remembers(student):
    "On a CPU a gigabyte for all rows; a recurrent row costs what it costs."
    transformer, rwkv = student[0], RWKV7ForCausalLM(RWKV7Config(
        64, 128, 2)).eval()
    each = 2 * 4 * 2 * 64 * 4 # K and V, layers, heads, width, bytes
    assert decode.rows_that_fit(transformer, 500) == 128
    assert decode.rows_that_fit(transformer, 10**5) == 10**9 // (each * 10**5)
    assert decode.rows_that_fit(rwkv, 10**5) == decode.rows_that_fit(rwkv, 10**9) == 128


@pytest.mark.parametrize("kind, heads, shape", [
    ("gpt2", 4, dict(n_embd=32, n_layer=2, n_head=4)),
    ("falcon", 1, dict(hidden_size=32, num_hidden_layers=2, # one key and value
                       num_attention_heads=4, multi_query=True))]) # for all
def test_rows_of_models_that_name_their_sizes_differently(kind, heads, shape):
    each = 2 * 2 * heads * 8 * 4 # K and V, layers, heads, width, bytes
    assert decode.rows_that_fit(small(kind, **shape), 10**5) == min(
        128, 10**9 // (each * 10**5))


def test_what_torch_holds_idle_is_room_for_rows(student, monkeypatch):
    "The driver says 1 GB is free; torch keeps 7 more, of which 6 are idle."
    model, positions, cuda = student[0], 10**5, torch.device("cuda")
    one = 10**9 // decode.rows_that_fit(model, positions)
    seen = types.SimpleNamespace(device=cuda, dtype=model.dtype,
                                 config=model.config)
    monkeypatch.setattr(decode, "row_bytes", lambda *_: one)
    for name, gigabytes in (("reserved", 7), ("allocated", 1)):
        monkeypatch.setattr(torch.cuda, f"memory_{name}",
                            lambda _, n=gigabytes: n * 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info",
                        lambda _: (10**9, 16 * 10**9))
    assert decode.rows_that_fit(seen, positions) == 7 * 10**9 // 2 // one


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_an_error(unsure, broken):
    "Their largest would be token 0, and the accuracy 0 %."
    model, tokenizer = unsure
    kept = model.model.norm.weight.detach().clone()
    with torch.no_grad(): model.model.norm.weight[3] = broken
    problems = load_problems("arithmetic", split="validation", n=3)
    try:
        with pytest.raises(FloatingPointError, match="3 of 3 .* float64 .*cpu"):
            ev.evaluate(model, tokenizer, problems, max_new_tokens=2)
    finally:
        with torch.no_grad(): model.model.norm.weight.copy_(kept)


def scripted(monkeypatch, tokenizer, text, stop):
    "Whatever the model thinks, every answer is `text`, and then the end."
    ids, step = [*encode_text(text, tokenizer), stop], [-1]
    def choose(scores):
        step[0] += 1
        return torch.full_like(scores[:, 0], ids[step[0]], dtype=torch.long)
    monkeypatch.setattr(decode, "chooser", lambda *_: choose)
    return ids


@pytest.mark.parametrize("style, heading", [
    ("question", "### Question:"), ("instruction", "### Instruction:")])
@pytest.mark.parametrize("answer", [
    "2+3=5 apples.\n#### 5", "So it is \\boxed{5}", "The answer is 5."])
def test_the_next_question_ends_an_answer(student, monkeypatch, style, heading,
                                          answer):
    "As a base goes on: with a question of its own, and a wrong number."
    model, tokenizer = student
    said = f"{answer}\n\n{heading}\nAnd 7?\n\n### Answer:\n#### 7"
    ids = scripted(monkeypatch, tokenizer, said, 2)
    problem = dict(question="2 + 3?", answer="#### 5")
    report = ev.evaluate(model, tokenizer, [problem], style, batch_size=1)
    record, = report.records
    assert record["completion"].strip() == answer
    assert record["finished"] and record["correct"]
    assert record["tokens"] < len(ids) - 8
    assert record["value"] == ev.record_of(problem, said, style)["value"]


def test_a_heading_ends_nothing_where_it_is_not_the_next(student, monkeypatch):
    "Not at the very start, not in another style, not without being asked."
    model, tokenizer = student
    for said in ("### Question:\n7", "5\n### Instruction:\n7"):
        for style in ("question", "think"):
            scripted(monkeypatch, tokenizer, said, 2)
            text = decode.generate(model, tokenizer, ["2 + 3?"], 64, 1,
                               ends=decode.headings(style))
            assert text == [said]
    scripted(monkeypatch, tokenizer, "5\n### Question:\n7", 2)
    assert "Question" in decode.generate(model, tokenizer, ["2 + 3?"], 64, 1)[0]


def test_a_report_says_how_many_answers_were_cut_off(student):
    problems = load_problems("arithmetic", split="validation", n=12)
    report = ev.evaluate(*student, problems, "question", max_new_tokens=60)
    cut = [r for r in report.records if not r["finished"]]
    assert 0 < len(cut) < 12 and all(r["tokens"] == 60 for r in cut)
    assert report.summary()["cut_off"] == len(cut) / 12
    assert ev.Report([]).cut_off is None


@pytest.mark.parametrize("four_bit", [False, True])
def test_one_changed_value_makes_another_model(tmp_path, four_bit):
    "Its answers are not kept; those of the same weights are."
    base, tokenizer = load_base("student", four_bit=four_bit, device="cpu")
    problems = load_problems("arithmetic", split="validation", n=2)
    path, kept = tmp_path / "records.jsonl", []
    def again():
        ev.evaluate(base, tokenizer, problems, max_new_tokens=2, records=path,
                    resume=True)
        kept.append({r["model_hash"] for r in journal.read_records(path)})
    again(); again()
    layer = base.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        if four_bit: layer.quant_state.absmax[7] += 1
        else: layer[5, 7] += 1e-3
    again()
    assert kept[0] == kept[1] and not kept[0] & kept[2]


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
    for _ in range(6000):
        if path.is_file() and path.read_text().count("\n") >= 5: break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) != 0
    kept = journal.read_records(path)
    assert 5 <= len(kept) < 60
    problems = load_problems("arithmetic", split="validation", n=60)
    how = dict(max_new_tokens=120, style="question")
    seen = []
    def count(*args, **kwargs):
        seen.append(len(args[2]))
        return real(*args, **kwargs)
    real, ev.completions = ev.completions, count
    try: resumed = ev.evaluate(*student, problems, records=path, resume=True,
                               **how)
    finally: ev.completions = real
    assert seen == [60 - len(kept)]
    fresh = ev.evaluate(*student, problems, **how)
    assert [r["completion"] for r in resumed.records] == [
        r["completion"] for r in fresh.records]
    assert resumed.correct == fresh.correct
    assert [r["question"] for r in journal.read_records(path)] == [
        *problems["question"]]


def record(question, correct, **more):
    return dict(dict(question=question, correct=correct, formatted=True,
                     tokens=3, finished=True, value="1", steps=[],
                     completion="", extracted="1", gold="1", reason=""), **more)


def test_a_bad_line_is_named_and_a_torn_one_left_out(tmp_path):
    path = tmp_path / "r.jsonl"
    good = json.dumps(record("q", True))
    path.write_text(good + "\n" + good[:20])
    assert len(journal.read_records(path)) == 1
    path.write_text("[1]\n" + good + "\n")
    with pytest.raises(ValueError, match="line 1"): journal.read_records(path)


def test_two_evaluations_do_not_share_a_file(tmp_path, student):
    path = tmp_path / "records.jsonl"
    problems = load_problems("arithmetic", split="validation", n=1)
    with journal.alone(path, "records"):
        with pytest.raises(BlockingIOError, match="another process"):
            ev.evaluate(*student, problems, max_new_tokens=1, records=path)
    ev.evaluate(*student, problems, max_new_tokens=1, records=path)
    assert [*tmp_path.iterdir()] == [path]


def test_compare_pairs_by_question():
    a = ev.Report([record(q, q != "x") for q in "xyz"])
    b = ev.Report([record(q, True) for q in "zyxw"])
    rows = ev.compare({"a": a, "b": b})
    assert [(r["n"], r["right"]) for r in rows] == [(3, 2), (3, 3)]
    assert rows[0]["p"] == 1.0 and rows[1]["p"] is None
    assert show.to_markdown(rows).count("\n") == 3
    assert show.plot_runs(rows).axes


def test_outcomes_of_traces():
    wrong = [["1 + 1 = 3", False]]
    assert [ev.outcome_of(r) for r in (
        record("q", True), record("q", True, steps=wrong),
        record("q", False, steps=wrong), record("q", False),
        record("q", False, value=None),
        record("q", False, finished=False))] == list(ev.OUTCOMES)
    text = ev.show_examples([record("<b>", False, completion="<script>")],
                            ev.taxonomy([record("<b>", False)]))
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_majority_ignores_what_has_no_value():
    votes = [dict(value=v, tokens=2) for v in (None, None, None, "5", "4", "4")]
    won = ev.majority(votes)
    assert (won["value"], won["votes"], won["tokens"]) == ("4", 2, 12)
    assert ev.majority(votes[:3])["value"] is None


def test_an_answer_fills_the_context_and_no_more(unsure, monkeypatch):
    "512 tokens asked for, less left: cut off there, alone and together."
    model, tokenizer = unsure
    monkeypatch.setattr(model.config, "max_position_embeddings", 50)
    monkeypatch.setattr(decode, "end_ids", lambda *_: [1151]) # never likeliest
    prompts = [prompts_of(1)[0] * 50 for _ in range(3)]
    prompts = [p[:n] for p, n in zip(prompts, (10, 49, 45))]
    told = decode.completions(model, tokenizer, prompts) # 512 by default
    assert [(c.tokens, c.finished) for c in told] == [
        (40, False), (1, False), (5, False)]
    alone = [decode.generate_ids(model, tokenizer, [p])[0] for p in prompts]
    assert alone == decode.generate_ids(model, tokenizer, prompts, batch_size=2)
    assert alone == [theirs(model, tokenizer, p, 50 - len(p)) for p in prompts]
    short = decode.completions(model, tokenizer, prompts, 3)
    assert [c.tokens for c in short] == [3, 1, 3]
    with pytest.raises(ValueError, match="has 50 tokens.*context is 50 tokens"):
        decode.completions(model, tokenizer, [prompts[0] * 5, *prompts])


def test_defaults_fit_the_student(student):
    "`evaluate` asks for 512 tokens, which is all of the student's context."
    model, tokenizer = student
    room = model.config.max_position_embeddings
    question = " 7" * 200 # nothing to answer: it writes until it is cut off
    long = [dict(question=question + " 8" * n, answer="#### 1")
            for n in range(2)]
    report = ev.evaluate(model, tokenizer, long, "question")
    voted = ev.self_consistency(model, tokenizer, long[:1], k=2)[0]
    for r, style in [*zip(report.records, ["question"] * 2),
                     *zip(voted, ["think"] * 2)]:
        prompt = ev.prompt_for(r["question"], tokenizer, style)
        assert len(prompt) + r["tokens"] <= room
        if not r["finished"]: assert len(prompt) + r["tokens"] == room


def test_perplexity_of_a_uniform_model(unsure):
    model, tokenizer = unsure
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad(): model.lm_head.weight.zero_()
    assert ev.perplexity(model, tokenizer, ["Some text."]) == pytest.approx(
        model.config.vocab_size, rel=1e-4)
    with torch.no_grad(): model.lm_head.weight.copy_(weight)
    with pytest.raises(ValueError): ev.perplexity(model, tokenizer, [""])


# What tuning costs elsewhere

def test_sums_are_right_and_asked_once():
    from tiny_reason.lib.arithmetic import calculate
    asked = sums(500, seed=1)
    assert asked == sums(500, seed=1) != sums(500, seed=2)
    lefts = [p["question"].rpartition("\n")[2] for p in asked]
    assert len({*lefts}) == 500
    assert {op for left in lefts for op in "+-*/" if op in left} == {*"+-*/"}
    for p in asked:
        *solved, last = (p["question"] + p["answer"]).split("\n")
        assert len(solved) == 7 and last not in solved
        assert p["question"].endswith("=")
        for line in (*solved, last):
            left, result = line.split("=")
            assert calculate(left) == int(result) and 0 < int(result) <= 200
    with pytest.raises(ValueError, match="10,000"): sums(10_001)


def test_fresh_documents_hold_no_control_tokens(student):
    _, tokenizer = student
    texts = fresh_documents(narrative, 200)
    assert len({*texts}) == 200
    assert not any(c in text for c in tokenizer.all_special_tokens
                   for text in texts)
    assert {*texts}.isdisjoint(t.removesuffix("<|endoftext|>") for t in
                               islice(documents(3408), 3000))


@pytest.mark.parametrize("said, right", [
    ("122\n1+1=2", True), (" 122", True), ("122", True), ("", False),
    ("\n122", False), ("1220", False), ("122 apples\n", False),
    ("-122\n", False)])
def test_a_sum_is_read_to_the_end_of_its_line(said, right, monkeypatch):
    monkeypatch.setattr(costs, "completions", lambda *_: [
        decode.Completion(said, 8, False, 0.0)])
    record, = ev.elsewhere(None, None, {}, [dict(question="37+85=",
                                                 answer="122")])
    assert record["correct"] is right and record["task"] == "sums"


def test_losses_are_those_of_transformers(student):
    model, tokenizer = student
    texts = ["", "a", *fresh_documents(narrative, 5)]
    found = ev.text_losses(model, tokenizer, texts)
    assert found[0] == (0.0, 0)
    for text, (nats, tokens) in zip(texts[2:], found[2:]):
        ids = torch.tensor([encode_text(text, tokenizer)])
        with torch.no_grad(): loss = model(input_ids=ids, labels=ids).loss
        assert tokens == ids.numel() - 1
        assert nats / tokens == pytest.approx(loss.item(), rel=1e-5)


def test_the_cost_is_paired(student):
    model, tokenizer = student
    tasks = dict(texts=dict(told=fresh_documents(narrative, 6)),
                 problems=sums(12))
    before = ev.elsewhere(model, tokenizer, **tasks)
    told, asked = ev.cost_elsewhere(before, before)
    assert told["change"] == (1, 1, 1) and told["before"] == told["after"]
    assert (told["texts"], asked["n"], asked["p"]) == (6, 12, 1)
    assert told["before"][0] == pytest.approx(ev.perplexity(
        model, tokenizer, tasks["texts"]["told"]))
    alone, _ = ev.cost_elsewhere(before)
    assert alone["before"] == told["before"] and "after" not in alone
    # half a nat more on each token: dearer by e**0.5, and no doubt about it
    worse = [r | dict(nats=r["nats"] + r["tokens"] / 2) if "nats" in r
             else r | dict(correct=False) for r in before]
    told, asked = ev.cost_elsewhere(before, worse)
    assert told["change"] == pytest.approx((math.exp(0.5),) * 3)
    assert asked["after"][0] == 0 and asked["p"] < 0.05
    for other in (before[1:], before[::-1], [dict(before[0], tokens=3),
                                             *before[1:]]):
        with pytest.raises(ValueError, match="not the same"):
            ev.cost_elsewhere(before, other)


def test_the_interval_of_a_ratio():
    import numpy as np
    from scipy.stats import ttest_1samp
    x = [0.3, -0.1, 0.4, 0.2, 0.7]
    theirs = ttest_1samp(x, 0).confidence_interval(0.95)
    assert ratio_interval([7 * v for v in x], [7] * 5) == pytest.approx(
        (sum(x) / 5, theirs.low, theirs.high))
    with pytest.raises(ValueError, match="two"): ratio_interval([1.0], [3])
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400): # texts of unequal length; the true rate is 2
        counts = rng.integers(20, 200, size=40)
        nats = 2 * counts + rng.normal(0, np.sqrt(counts) * 3)
        _, low, high = ratio_interval(list(nats), list(counts))
        hits += low <= 2 <= high
    assert 360 <= hits <= 396 # 95 % of 400 are 380
