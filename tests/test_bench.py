"The bench: killed runs, files in every state, models of every kind."
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from statsmodels.stats.multitest import multipletests

from tiny_reason import bench as b
from tiny_reason.lib import cells, folders, loading, show, stats
from tiny_reason.data import make_problems
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.model import add_lora, load_base
from tiny_reason.rwkv import RWKV7Config, RWKV7ForCausalLM

torch.set_num_threads(1)
SHORT = dict(n=3, max_new_tokens=4)


@pytest.fixture
def models(base, rwkv_folder):
    return b.load_models([str(base), str(rwkv_folder)], "cpu")


def layers(model, tokenizer):
    return {"layers": model.config.num_hidden_layers}


def cells_of(folder):
    return {(c["model"], c["task"]): c for c in (
        json.loads(p.read_text()) for p in Path(folder).glob("cells/*.json"))}


# Statistics

@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_statsmodels(ps):
    theirs = multipletests(ps, method="holm")[1]
    assert stats.holm(ps) == pytest.approx(list(theirs), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=2,
                max_size=4))
def test_every_pair_is_tested_once(verdicts):
    cells = {(i, t): dict(rows={"r": v}) for t in "xy"
             for i, v in enumerate(verdicts)}
    tests, k = b.paired_tests(cells), len(verdicts)
    assert len(tests) == 2 * k * (k - 1) // 2
    for t in tests:
        x, y = verdicts[t["a"]], verdicts[t["b"]]
        assert t["only_a"] - t["only_b"] == sum(x) - sum(y)
        assert t["p"] <= t["holm"] <= 1


def test_other_problems_are_not_paired():
    cells = {("a", "t"): dict(rows={"r": [True]}),
             ("b", "t"): dict(rows={"r": [True, False]}),
             ("c", "t"): dict(rows={"r": 0.5})}
    assert b.paired_tests(cells) == []


def test_a_ratio_is_taken_within_a_round():
    "Three rounds, each twice as slow as the one before: the ratio stands."
    fast = [dict(s={"1": x}) for x in (1, 2, 4)]
    slow = [dict(s={"1": 3 * x}) for x in (1, 2, 4)]
    cell = dict(rows=b.median_rows(slow), rounds=slow)
    found = b.figures(cell, "s", "1", dict(rounds=fast))
    assert found == dict(value=6, ratio=3)


# Models by name

def test_every_kind_of_folder(base, rwkv_folder, tokenizer, tmp_path):
    adapter = tmp_path / "adapter"
    model = add_lora(load_base(str(base), True, "cpu")[0], r=2)
    model.save_pretrained(adapter)
    (adapter / "experiment_config.yaml").write_text(
        "data: {style: instruction}\nmodel: {four_bit: true}\n")
    state, _, style, _ = loading.load_any(f"{rwkv_folder}:think",
                                          device="cpu")
    assert (state.config.model_type, style) == (folders.RWKV, "think")
    tuned = add_lora(state, r=2)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name: p += torch.randn_like(p)
    tuned.save_pretrained(tmp_path / "state adapter")
    (tmp_path / "state adapter" / "experiment_config.yaml").write_text(
        "model: {four_bit: false}\n")
    loaded = b.load_models([str(base), str(adapter), f"{adapter}:question",
                            str(tmp_path / "state adapter")], "cpu")
    assert [e[2] for e in loaded.values()] == [
        "question", "instruction", "question", "think"]
    plain = loading.load_any(str(rwkv_folder), device="cpu").model
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        logits = [m(ids).logits for m in (
            loaded[str(tmp_path / "state adapter")][0], tuned, plain)]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)
    report = b.bench(loaded, {"few": partial(b.accuracy, **SHORT)})
    assert report.failed == [] and len(report.tests) == 6


@pytest.mark.parametrize("text, words", [
    ('{"model_type"', "is damaged"), ("[]", "names no"), ("{}", "names no"),
    ("3", "names no"), ('{"model_type": "gpt9"}', "names no")])
def test_damaged_folders(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=words) as e:
        loading.load_any(str(tmp_path), device="cpu")
    assert str(tmp_path) in str(e.value)


def test_bad_lists_of_models(models):
    for names, words in (([], "no models"), (["x", "x"], "named twice")):
        with pytest.raises(ValueError, match=words): b.load_models(names)
    entry = next(iter(models.values()))
    for bad, words in (({}, "no models"), ([entry], "no models"),
                       ({"m": entry[:2]}, "expected"),
                       ({"m": (*entry[:2], "chat")}, "of styles")):
        with pytest.raises(ValueError, match=words):
            b.bench(bad, {"t": layers})


# What a cell depends on

def test_every_part_of_the_identity_counts(models, tokenizer, tmp_path):
    name, (model, _, _) = next(iter(models.items()))
    told = cells.model_identity(model, tokenizer, "question")
    last = list(model.parameters())[-1]
    with torch.no_grad(): last[-1] += 1e-6
    assert cells.model_identity(model, tokenizer, "question") != told
    with torch.no_grad(): last[-1] -= 1e-6
    other = load_tokenizer(find_base("student")[0])
    other.chat_template = "{{ messages }}"
    assert cells.model_identity(model, other, "question") != told
    model.config.rope_parameters = dict(rope_theta=5, rope_type="default")
    assert cells.model_identity(model, tokenizer, "question") != told
    path = tmp_path / "p.jsonl"
    task = partial(b.accuracy, source=str(path))
    path.write_text("one"); first = cells.task_identity(task)
    path.write_text("two")
    assert cells.task_identity(task) != first
    def layers_(model, tokenizer, rows): return {"n": len(rows)}
    given, more = (partial(layers_, rows=make_problems(n)) for n in (3, 4))
    assert cells.task_identity(given) != cells.task_identity(more)
    def same_name(body):
        space = {}
        exec(f"def t(model, tokenizer): return {{'x': {body}}}", space)
        return cells.task_identity(space["t"])
    assert same_name("1") == same_name("1") != same_name("2")


def test_a_changed_grader_is_another_task(tmp_path, monkeypatch):
    "Whatever a task calls of this package is part of what it is."
    package = shutil.copytree(files("tiny_reason"), tmp_path / "package")
    monkeypatch.setattr(cells, "files", lambda name: package)
    told, own = (cells.task_identity(t) for t in (b.TASKS["taught"], layers))
    for name, was, now in (("lib/answers.py", "value == want",
                            "value != want"),
                           ("lib/prompts.py", "### Question", "## Question"),
                           ("stories.yaml", "buys", "gets")):
        text = (package / name).read_text()
        assert was in text
        (package / name).write_text(text.replace(was, now))
        assert cells.task_identity(b.TASKS["taught"]) != told
        assert cells.task_identity(layers) != own # which may call anything
        (package / name).write_text(text)
    assert cells.task_identity(b.TASKS["taught"]) == told


def test_only_what_changed_is_run_again(models, tmp_path):
    few = dict(few=partial(b.accuracy, **SHORT), layers=layers)
    b.bench(models, few, tmp_path / "b")
    before, (one, two) = cells_of(tmp_path / "b"), models
    few["few"] = partial(b.accuracy, **SHORT | dict(n=2))
    report = b.bench(models, few, tmp_path / "b", resume=True)
    after = cells_of(tmp_path / "b")
    assert {k[1] for k in before if before[k] != after[k]} == {"few"}
    assert report.notes == [f"{m}, few: run again; changed: settings"
                            for m in models]
    path = cells.cell_path(tmp_path / "b", one, "layers")
    for text in ("", "[]", "null", '{"identity": 3, "error": "", "rows": {}}'):
        path.write_text(text)
        report = b.bench(models, few, tmp_path / "b", resume=True)
        assert report.notes == [f"{one}, layers: run again; its file is "
                                "damaged"]
        assert cells_of(tmp_path / "b")[one, "layers"]["rows"] == after[
            one, "layers"]["rows"]
    assert not list((tmp_path / "b").rglob("*.part"))


def test_timings_are_taken_together_or_not_at_all(models, tmp_path):
    seen = []
    def tick(model, tokenizer):
        seen.append(model)
        return {"s": float(len(seen))}
    tick.timed = True
    one, two = models
    b.bench({one: models[one]}, {"tick": tick}, tmp_path / "b", rounds=2)
    report = b.bench(models, {"tick": tick}, tmp_path / "b", True, rounds=2)
    assert len(seen) == 3 + 6 and "timed again" in report.notes[0]
    report = b.bench(models, {"tick": tick}, tmp_path / "b", True, rounds=2)
    assert len(seen) == 9 and report.notes == []
    report = b.bench(models, {"tick": tick}, tmp_path / "b", True, rounds=1)
    assert len(seen) == 13 and "changed: rounds" in report.notes[0]


def test_a_failed_cell_is_tried_again(models, tmp_path):
    source = tmp_path / "p.jsonl"
    tasks = {"mine": partial(b.accuracy, source=str(source), **SHORT)}
    report = b.bench(models, tasks, tmp_path / "b")
    assert len(report.failed) == 2 and "missing" in report.failed[0]["error"]
    assert "Failed: " in (tmp_path / "b" / "bench.md").read_text()
    source.write_text("".join(json.dumps(p) + "\n"
                              for p in make_problems(3, split="test")))
    report = b.bench(models, tasks, tmp_path / "b", resume=True)
    assert report.failed == [] and len(report.tests) == 1
    source.write_text('{"question": "Why?"}\n')
    report = b.bench(models, tasks, tmp_path / "b", resume=True)
    assert "no answer to grade by" in report.failed[0]["error"]


def test_a_failure_alone_is_reason_enough(models, tmp_path):
    broken = [True]
    def moody(model, tokenizer):
        if broken[0]: raise RuntimeError("no luck")
        return {"x": 1}
    b.bench(models, {"t": moody}, tmp_path)
    broken[0] = False
    report = b.bench(models, {"t": moody}, tmp_path, resume=True)
    assert report.failed == [] and len(report.notes) == 2
    assert "it had failed: RuntimeError: no luck" in report.notes[0]


def test_a_tokenizer_of_another_model(tokenizer):
    small = RWKV7ForCausalLM(RWKV7Config(1151, 64, 1))
    with pytest.raises(ValueError, match="^m: .* rows for 1,151 .* has 1,152"):
        b.bench({"m": (small, tokenizer, "question")}, {"t": layers})


@pytest.mark.parametrize("rows", [
    None, {}, [1], {"x": float("nan")}, {"x": float("inf")}, {"x": []},
    {"x": [True, None]}, {"x": "1"}, {"x": {}}, {"x": {"1": None}},
    {"x": torch.tensor(1.0)}])
def test_rows_that_are_none(rows, models):
    report = b.bench(models, {"bad": lambda model, tokenizer: rows})
    assert len(report.failed) == 2 and report.lines == []
    assert "task return" in report.failed[0]["error"]
    assert "Failed" in show.bench_markdown(report)


def test_a_context_beyond_the_model(base, tmp_path):
    model, tokenizer, style, _ = loading.load_any(str(base), device="cpu")
    model.config.max_position_embeddings = 32 # less than any prompt
    report = b.bench({"m": (model, tokenizer, style)}, b.named_tasks(
        ["familiar", "perplexity", "speed", "memory"], 2), tmp_path)
    assert [c["task"] for c in report.failed] == report.tasks
    assert all("context is 32" in c["error"] for c in report.failed)


def test_other_folders(models, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd").mkdir()
    for text in ("{}", "[]", '{"kind": "other", "models": [], "tasks": []}'):
        (tmp_path / "odd" / "bench.json").write_text(text)
        for place in tmp_path / "odd", tmp_path, tmp_path / "file":
            with pytest.raises(ValueError, match="not a bench"):
                b.bench(models, {"t": layers}, place, resume=True)
    assert (tmp_path / "file").read_text() == "x"


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
def test_any_name_gives_a_file_of_its_own(a, c):
    one, two = cells.cell_path("f", a, "t"), cells.cell_path("f", c, "t")
    assert one.parent == two.parent == Path("f/cells")
    assert (a == c) == (one == two)


def test_the_peak_and_the_state_in_16_bit(rwkv_folder):
    "The matrices stay fp32 where the rows are bf16; the formula knows."
    model, tokenizer, *_ = loading.load_any(str(rwkv_folder), device="cpu")
    rows = b.memory(model.bfloat16(), tokenizer, (32, 48))
    assert rows["bytes remembered"] == rows["bytes remembered, predicted"]
    assert rows["bytes at the peak"][48] > rows["bytes remembered"][48]


def test_answers_of_an_interrupted_cell_are_kept(models, tmp_path, monkeypatch):
    tasks = {"few": partial(b.accuracy, **SHORT)}
    b.bench(models, tasks, tmp_path)
    before = cells_of(tmp_path)
    one, _ = models
    cells.cell_path(tmp_path, one, "few").unlink() # killed before it was written
    def decode(model, prompts, *args):
        assert prompts == []
        return []
    monkeypatch.setattr("tiny_reason.lib.decode.decode_batch", decode)
    report = b.bench(models, tasks, tmp_path, resume=True)
    assert report.failed == []
    assert report.cells[one, "few"]["rows"] == before[one, "few"]["rows"]


KILLED = """
import sys
from functools import partial
from tiny_reason.bench import accuracy, bench, load_models
tasks = {t: partial(accuracy, n=n, max_new_tokens=m)
         for t, n, m in (("short", 2, 2), ("long", 128, 512))}
if __name__ == "__main__": print(bench(load_models([sys.argv[1]], "cpu"),
                                       tasks, sys.argv[2]).failed)
"""


def test_kill_9(base, tmp_path):
    script, folder = tmp_path / "killed.py", tmp_path / "b"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, base, folder])
    until = time.monotonic() + 120
    while not list(folder.glob("cells/*.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = cells_of(folder)
    assert {t for _, t in before} == {"short"}
    space = {"__name__": "again"}
    exec(KILLED, space)
    tasks = space["tasks"]
    tasks["long"] = partial(b.accuracy, n=2, max_new_tokens=2)
    report = b.bench(b.load_models([str(base)], "cpu"), tasks, folder, True)
    assert (report.failed, report.notes) == ([], [])
    after = cells_of(folder)
    assert {k: after[k] for k in before} == before and len(after) == 2
