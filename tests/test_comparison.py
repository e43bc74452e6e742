"The arms, and benchmarks/mechanisms.py on narrow ones: kills, rates, tests."
import importlib.util
import json
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_rel
from tiny_reason import comparison, pretrain, rwkv
from tiny_reason.comparison import new_arm
from tiny_reason.lib.decode import Batch
from tiny_reason.pretrain import (as_function, make_optimizers, Plan,
                                  train_step)

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mechanisms.py"


def load():
    "The script as a module; its arms are 64 wide and train a few steps."
    spec = importlib.util.spec_from_file_location("mechanisms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def small(arm, seed, size=None, **more):
        torch.manual_seed(seed)
        return comparison.build(arm, 64, **(dict(width=64, layers=1) | more))
    module.new_arm = small
    module.STEPS = {"0.6": 8, "2.5": 16, "10": 24}
    module.PROBLEMS = dict(validation=30, test=30)
    module.RECALL_STEPS = 4
    return module


@pytest.fixture
def script():
    threads = torch.get_num_threads()
    yield load()
    torch.set_num_threads(threads)


@pytest.fixture
def ask(script, tmp_path):
    "Run a stage in a folder. `--shrink 1` would compile the arms."
    def run(*words, folder=tmp_path):
        script.main([*words, "--shrink", "2", "--n", "2", "--folder",
                     str(folder), "--out", str(folder)])
    return run


def written(script, ask, stage, name, **record):
    "A result as the script would have written it with the flags of `ask`."
    def pretend(args): script.once(args, stage, name, lambda: record)
    script.STAGES["time"], before = pretend, script.STAGES["time"]
    ask("time")
    script.STAGES["time"] = before


def all_rates(script, ask, arms):
    for arm, (rate, loss) in product(arms, ((1e-3, 2), (2e-3, 1), (4e-3, 2))):
        written(script, ask, "rates", script.slug(arm, rate), arm=arm,
                rate=rate, loss=loss)


# Killed runs

KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_comparison import load
from tiny_reason import pretrain
script, steps, real = load(), [], pretrain.train_step
def train_step(*args):
    steps.append(1)
    if len(steps) == 7: os.kill(os.getpid(), {number})
    return real(*args)
pretrain.train_step = train_step
script.main({words!r})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_ends_the_same(script, ask, tmp_path, number,
                                                monkeypatch):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in killed, whole:
        all_rates(script, lambda *w: ask(*w, folder=folder), ["transformer"])
    words = ["train", "--tokens", "2.5", "--seeds", "0", "--only",
             "=transformer"]
    flags = ["--shrink", "2", "--n", "2", "--folder", str(killed)]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED.format(
            tests=str(Path(__file__).parent), number=int(number),
            words=words + flags)],
        capture_output=True, text=True)
    if number == signal.SIGKILL: assert ended.returncode == -number
    else: assert ended.returncode == 1 and (
        "the same command goes on" in ended.stderr), ended.stderr
    assert not [*(killed / "train").glob("*.json")]

    taken, real = [], pretrain.train_step
    monkeypatch.setattr(pretrain, "train_step",
                        lambda *a: taken.append(1) or real(*a))
    ask(*words, folder=killed)
    assert len(taken) == {signal.SIGKILL: 2, signal.SIGINT: 1}[number]
    ask(*words, folder=whole)
    a, b = (json.loads((f / "train" / "transformer_2.5_0.json").read_text())
            for f in (killed, whole))
    assert a["test"] == b["test"] and a["validation"] == b["validation"]
    one, other = ((f / "runs" / "transformer_2.5_0" / "weights"
                   / "model.safetensors").read_bytes() for f in (killed, whole))
    assert one == other
    before = len(taken)
    ask(*words, folder=whole) # a finished one is not repeated
    assert len(taken) == before


def test_a_killed_grading_is_repeated_alone(script, tmp_path):
    "What was written stays; the one that was not is asked again."
    args = script.arguments(["grade", "--folder", str(tmp_path)])
    args.text_hash, seen = "", []
    def die(): raise KeyboardInterrupt
    script.once(args, "grade", "a", lambda: dict(right="1"))
    with pytest.raises(KeyboardInterrupt): script.once(args, "grade", "b", die)
    for name in "ab": script.once(args, "grade", name,
                                  lambda: seen.append(name) or {})
    assert seen == ["b"]


# Rates

@pytest.mark.parametrize("best", [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
def test_the_sweep_ends_with_a_worse_rate_on_both_sides(script, best):
    tried = script.sweep(lambda rate: max(rate / best, best / rate))
    assert min(tried, key=tried.get) == best
    assert {best / 2, best * 2} <= {*tried} and len(tried) <= 5


def test_a_rate_at_the_edge_is_not_taken(script, ask):
    def train(): ask("train", "--tokens", "0.6", "--only", "=rwkv", "--seeds",
                     "0")
    for rate, loss in (2e-3, 3), (4e-3, 2), (8e-3, 1):
        written(script, ask, "rates", f"{rate}", arm="rwkv", rate=rate,
                loss=loss)
        with pytest.raises(SystemExit, match="'rwkv' is not found"): train()
    written(script, ask, "rates", "0.016", arm="rwkv", rate=1.6e-2, loss=2)
    args, script.run = [], lambda *told, **more: args.append(told) or {}
    train()
    assert args[0][1:5] == ("rwkv", 0, 4, 8e-3)


def test_rates_read_no_test_problem_and_a_broken_run_loses(script, ask,
                                                           tmp_path):
    splits, real, run = set(), script.load_problems, script.run
    def noted(source, group, split, *rest):
        splits.add(split)
        return real(source, group, split, *rest)
    def fragile(args, arm, seed, steps, rate, *rest, **more):
        if rate > 4e-3: raise FloatingPointError("no number")
        return run(args, arm, seed, steps, rate, *rest, **more)
    script.load_problems, script.run = noted, fragile
    script.RATES = 4e-3, 8e-3
    ask("rates", "--only", "=transformer")
    found = {r["rate"]: r for r in (json.loads(p.read_text()) for p in (
        tmp_path / "rates").glob("*.json"))}
    assert splits == {"train", "validation"}
    assert found[8e-3]["failed"] == "no number"
    assert min(found, key=lambda r: found[r]["loss"]) < 8e-3
    assert not any("test" in r for r in found.values())


# Shares of the work

def test_two_processes_share_the_work_and_no_file(script, tmp_path):
    script.most_missed = lambda args: "rwkv - shift"
    def files(*words):
        args = script.arguments(["train", *words])
        return {script.slug(arm, size, seed) for size in args.tokens
                for arm, seed in script.wanted(args, size)}
    a, b = files("--only", "=transformer", "+"), files("--only", "rwkv")
    assert not a & b and a | b == files()
    a, b = files("--seeds", "0", "1"), files("--seeds", "2", "3", "4")
    assert not a & b and a | b == files()
    assert len(files("--tokens", "0.6")) == 8 * 5 + 5 * 3
    with pytest.raises(SystemExit): script.arguments(
        ["train", "--only", "transfomer"])


def test_the_plan_runs_nothing(script, ask, tmp_path, capsys):
    all_rates(script, ask, script.ARMS)
    capsys.readouterr()
    ask("train", "--tokens", "0.6", "--plan")
    said = capsys.readouterr().out
    assert "55 of 55 runs to do" in said and "core-minutes" in said
    assert not (tmp_path / "train").exists()


# The table

def test_the_unit_of_a_test_is_the_run(script):
    "Three hundred problems of two runs are two observations, not 600."
    def grade(arm, seed, right): return dict(
        arm=arm, seed=seed, size="2.5", right="1" * right + "0" * (300 - right))
    def train(arm, seed, loss): return dict(
        arm=arm, seed=seed, size="2.5", test=dict(all=loss, solution=loss))
    def recall(arm, seed, right): return dict(
        arm=arm, seed=seed, recalled={str(script.PAIRS[-1]): [right, 2000]})
    result = dict(
        recall=[recall(arm, seed, 10 * seed + right) for seed in range(3)
                for arm, right in dict(rwkv=500, transformer=900).items()],
        grade=[grade("rwkv", 0, 280), grade("rwkv", 1, 180),
               grade("transformer", 0, 100), grade("transformer", 1, 100)],
        train=[train(arm, seed, loss) for arm, losses in dict(
            rwkv=(0.4, 0.5, 0.43), transformer=(0.6, 0.5, 0.7)).items()
            for seed, loss in enumerate(losses)])
    answers = script.answers(result)["2.5"]["rwkv, against transformer"]
    assert answers["runs"] == 2 and answers["p"] > 0.1
    assert max(answers["problems"]) < 1e-9
    assert answers["low"] < 0 < answers["high"]
    losses = script.comparisons(result)["2.5"]["rwkv, against transformer"]
    theirs = ttest_rel((0.4, 0.5, 0.43), (0.6, 0.5, 0.7))
    assert losses["p"] == pytest.approx(theirs.pvalue)
    assert [losses["low"], losses["high"]] == pytest.approx(
        [*theirs.confidence_interval(0.95)])
    [(name, found)] = script.recall_tests(result).items()
    assert name == "transformer, against rwkv" and found["runs"] == 3
    assert found["mean"] == pytest.approx(0.2)


def test_the_table_refuses_to_mix(script, ask, tmp_path):
    all_rates(script, ask, ["rwkv"])
    written(script, ask, "train", "rwkv_0.6_0", arm="rwkv", seed=0, size="0.6",
            rate=2e-3, tokens=1, parameters=1, feed_forward=1,
            test=dict(all=1, solution=1))
    ask("table")
    page = (tmp_path / "mechanisms.md").read_text()
    assert "| rwkv | 1 | 1 | 0.002 |" in page
    path = tmp_path / "train" / "rwkv_0.6_0.json"
    kept = json.loads(path.read_text())
    for key, value in (("tokenizer", "another"), ("steps", {"0.6": 5})):
        path.write_text(json.dumps(
            kept | dict(settings=kept["settings"] | {key: value})))
        with pytest.raises(SystemExit, match=f"was made with {key}"):
            ask("table")
    path.write_text(json.dumps(kept | dict(rate=1e-3)))
    with pytest.raises(SystemExit, match="the best rate is 0.002"):
        ask("table")


def test_arms_of_recall_have_one_size_and_less_room_than_pairs(script):
    small = script.SMALL
    size = comparison.parameters(comparison.build("rwkv", 256, **small))
    for arm in script.RECALL:
        model = comparison.new_arm(arm, 0, size, **small)
        assert abs(comparison.parameters(model) / size - 1) < 0.01
    assert max(script.PAIRS) > 64 * small["layers"] * small["width"] // 64
    ids, targets = script.recall_row(160, torch.Generator().manual_seed(0))
    known = dict(ids[:320].view(-1, 2).tolist())
    assert len(known) == 160
    asked = targets >= 0
    assert asked.sum() == (script.ROW - 320) // 2
    assert [known[k] for k in ids[asked].tolist()] == targets[asked].tolist()


# The arms themselves.

@torch.no_grad()
def stirred(arm):
    "An arm whose trained weights are not at their start, on a seed."
    model = new_arm(arm, 0).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("arm", ["+ shift", "+ norm"])
def test_cache_neighbours_and_padding_change_nothing(arm):
    model = stirred(arm)
    ids = torch.randint(1152, (2, 48), generator=torch.manual_seed(0))
    texts, seen = [ids[0].tolist(), ids[1, :30].tolist()], []
    def look(scores): return seen.append(scores) or scores.argmax(-1)
    with torch.inference_mode():
        alone = [model(torch.tensor([t])).logits[0] for t in texts]
        batch = Batch(model, [t[:20] for t in texts], 0)
        for i in range(20, 30): # both in step, through the cache
            batch.step(model, look)
            batch.ids = torch.tensor([[t[i]] for t in texts])
        Batch(model, texts, 0).step(model, look) # the second is padded
    for i, scores in enumerate(seen[:-1]):
        for row, whole in zip(scores, alone):
            assert (row - whole[19 + i]).abs().max() < 1e-4
    for row, whole in zip(seen[-1], alone):
        assert (row - whole[-1]).abs().max() < 1e-4


@torch.no_grad()
def attended(arm, before=True, first=0.0, look=None):
    "What a layer of RWKV-7 gives; `look` sees what goes into its memory."
    att = stirred(arm).model.blocks[1].att
    x = torch.randn(1, 6, 192, generator=torch.manual_seed(2))
    kept = rwkv.remember
    def remember(r, w, k, v, taken, *rest):
        if look is not None: look.update(decay=w.exp()[0], taken=taken[0])
        return kept(r, w, k, v, taken, *rest)
    rwkv.remember = remember
    try: return att(x, rwkv.shifted(x) if before else x,
                    torch.full_like(x, first))[0]
    finally: rwkv.remember = kept


@pytest.mark.parametrize("arm, change", [
    ("rwkv - shift", dict(before=False)), ("rwkv - values", dict(first=1.0))])
def test_what_is_taken_away_does_not_matter(arm, change):
    assert torch.equal(attended(arm), attended(arm, **change))
    assert (attended("rwkv") - attended("rwkv", **change)).abs().max() > 0.01


@pytest.mark.parametrize("arm", ["rwkv", "rwkv - decay", "rwkv - delta"])
def test_what_is_taken_away_of_the_memory(arm):
    seen = {}
    attended(arm, look=seen)
    assert (seen["decay"].std(0).max() < 1e-6) == (arm == "rwkv - decay")
    assert (seen["taken"].abs().max() == 0) == (arm == "rwkv - delta")


def test_a_tied_head_and_a_norm_that_is_gone():
    tied = new_arm("rwkv - head", 0)
    assert tied.head.weight is tied.model.emb.weight
    assert not hasattr(new_arm("rwkv - norm", 0).model.blocks[0], "ln0")


@pytest.mark.parametrize("arm", ["+ norm", "rwkv - head", "rwkv - delta"])
def test_every_trained_parameter_moves(arm):
    plan = Plan(steps=3, batch=2, length=32, warmup=1)
    model = new_arm(arm, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers, text = make_optimizers(model, plan), torch.randint(
        1152, (2, 33), generator=torch.manual_seed(0))
    for _ in range(plan.steps): # outputs of zero pass nothing on at the first
        train_step(as_function(model), [(text[:, :-1], text[:, 1:])])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    still = {n.rpartition(".")[2] for n, p in model.named_parameters()
             if torch.equal(p, before[n])}
    assert still == ({"k_k"} if "delta" in arm else set())
