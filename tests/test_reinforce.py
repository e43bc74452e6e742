"Learning from verdicts: what a notebook cannot reach, and many inputs."
import json
import math
import signal
import subprocess
import sys
import time
from itertools import combinations

import pytest
import torch
import yaml
from hypothesis import given, strategies as st

from tiny_reason import cli
from tiny_reason.lib.checkpoints import last_checkpoint
from tiny_reason.lib.journal import read_rollouts
from tiny_reason.reinforce import (ADVANTAGES, dead_share, group_advantages,
                                   LOSSES, pass_at_k, token_weights)

FLAGS = ["reinforce", "--data.style", "question", "--data.subset", "taught",
         "--num_samples", "60", "--prompts", "4", "--num_generations", "4",
         "--max_new_tokens", "120", "--save_steps", "1"]
numbers = st.floats(-2, 2, width=32)


@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1,
                max_size=5), st.floats(-3, 3, width=32))
def test_what_is_added_to_all_of_a_group_does_not_count(groups, more):
    r = torch.tensor(groups)
    for kind in ADVANTAGES[2:]:
        a = group_advantages(r, 4, kind)
        assert a.shape == r.shape
        assert a.sum(1).abs().max() < 1e-3
        if kind != "grpo": assert (a - group_advantages(
            r + more, 4, kind)).abs().max() < 1e-4
    mine = group_advantages(r.flatten(), 4, "rloo").view_as(r)
    for i in range(4): # the mean of the others, literally
        others = r[:, [j for j in range(4) if j != i]].mean(1)
        assert (mine[:, i] - (r[:, i] - others)).abs().max() < 1e-5


@given(st.lists(st.tuples(st.integers(0, 6), numbers), min_size=1, max_size=6),
       st.sampled_from(LOSSES))
def test_a_token_behind_the_end_weighs_nothing(rows, kind):
    mask = torch.tensor([[float(i < n) for i in range(6)] for n, _ in rows])
    a = torch.tensor([a for _, a in rows])
    logp = torch.randn(mask.shape)
    weights, loss = token_weights(logp, logp, a, mask, kind)
    assert not weights[mask == 0].any() and math.isfinite(loss)
    inside = weights[mask == 1]
    assert (inside.sign() == a.repeat_interleave(
        mask.sum(1).long()).sign()).all()


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = [*combinations(range(n), k)]
    expected = sum(min(choice) < c for choice in choices) / len(choices)
    assert abs(pass_at_k(n, c, k) - expected) < 1e-12


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 20))
def test_the_mean_hides_dead_groups(ps, group):
    mean = sum(ps) / len(ps)
    assert dead_share([mean], group) <= dead_share(ps, group) + 1e-9


def test_reinforce_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    flags = [*FLAGS, "--max_steps", "2", "--output_dir", str(out)]
    assert cli.main(flags) == 0
    said = capsys.readouterr().out
    assert "problems: 60; 2 steps of 4 × 4 attempts" in said
    assert "reinforced: 2 steps" in said and "tiny_reason evaluate" in said
    tries = read_rollouts(out / "rollouts.jsonl")
    assert [r["step"] for r in tries] == [1] * 16 + [2] * 16
    assert {*tries[0]} == {"step", "question", "completion", "reward",
                           "advantage", "tokens", "finished"}
    assert yaml.safe_load((out / "config.yaml").read_text())["data"][
        "style"] == "question"
    assert cli.main(flags) == 1
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["evaluate", "--config", str(out / "config.yaml"),
                     "--limit", "5", "--max_new_tokens", "60"]) == 0
    # and on from there: the adapter is the start of another run
    assert cli.main([*FLAGS, "--max_steps", "1", "--start", str(out),
                     "--output_dir", str(tmp_path / "on")]) == 0


@pytest.mark.parametrize("more, code, words", [
    (["--num_generations", "1"], 2, "2 or more"),
    (["--temperature", "0"], 2, "temperature"),
    (["--advantage", "gpro"], 2, "did you mean 'grpo'"),
    (["--training.optim", "sgd"], 2, "no use for training.optim"),
    (["--start", "nowhere"], 1, "holds no adapter_config.json"),
    (["--max_new_tokens", "3"], 1, "nothing to learn from")])
def test_reinforce_refuses(more, code, words, tmp_path, capsys):
    assert cli.main([*FLAGS, "--num_samples", "8", "--max_steps", "3",
                     "--output_dir", str(tmp_path), *more]) == code
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_problems_without_answers_are_told_before_any_is_tried(tmp_path,
                                                               capsys):
    rows = tmp_path / "own.jsonl"
    rows.write_text(json.dumps(dict(question="How many?", answer="")) + "\n")
    assert cli.main([*FLAGS, "--data.source", str(rows), "--data.subset",
                     "main", "--output_dir", str(tmp_path / "out")]) == 1
    assert "answer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "rollouts.jsonl").exists()


def test_reinforce_interrupted_and_gone_on_with(tmp_path, capsys):
    flags = [*FLAGS, "--max_steps", "3"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "tiny_reason.cli", *flags, "--output_dir",
         str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True)
    try:
        until = time.time() + 90
        while not [*broken.glob("checkpoint-*")]:
            assert process.poll() is None and time.time() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally: process.kill()
    assert process.returncode == 143 and "Traceback" not in said
    assert "To go on: the same command with --resume" in said
    assert last_checkpoint(broken) in said
    for out, more in (broken, ["--resume"]), (whole, []):
        assert cli.main([*flags, "--output_dir", str(out), *more]) == 0
    for name in "adapter_model.safetensors", "rollouts.jsonl":
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
