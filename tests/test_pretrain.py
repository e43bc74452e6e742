"""Pre-training: every preset's loop, resuming, and what must be refused."""
import copy
import json
import math
import random
import shutil
import signal
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from tiny_reason import pretrain as p, rwkv
from tiny_reason.bench import accuracy, bench, memory, speed
from tiny_reason.data import load_problems, prepare
from tiny_reason.eval import evaluate, generate, perplexity
from tiny_reason.lib.folders import find_base, read_config
from tiny_reason.model import add_lora, load_base, load_tuned
from tiny_reason.lib.checkpoints import (Stopped, checkpoints,
                                         last_checkpoint)
from tiny_reason.lib.loop import averages
from tiny_reason.train import sft_config, train
from tiny_reason.transformer import preset_config

torch.set_num_threads(1)
PLAN = p.Plan(steps=6, batch=2, length=32, warmup=2)
KINDS = ("transformer", "rwkv", "adapters")


def text(tokenizer): return p.encoded(p.documents(0), tokenizer)


def model(kind, tokenizer, seed=0):
    torch.manual_seed(seed)
    if kind == "rwkv":
        return rwkv.RWKV7ForCausalLM(rwkv.RWKV7Config(len(tokenizer), 64, 2))
    if kind == "adapters":
        return add_lora(load_base("student", False, "cpu")[0], r=2, alpha=4)
    return Qwen2ForCausalLM(preset_config(
        "micro", len(tokenizer), hidden_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=96))


def run(kind, tokenizer, out, plan=PLAN, documents=None, **more):
    built = model(kind, tokenizer)
    log = p.pretrain(built, tokenizer, documents or text(tokenizer), out, plan,
                     compiled=False, **more)
    return built, log


def same(a, b):
    return all(x.equal(y) for x, y in zip(a.parameters(), b.parameters()))


def test_fp16_is_refused(tokenizer, tmp_path):
    "On a T4 an unscaled loss loses four tenths of such gradients."
    half = add_lora(load_base("student", device="cpu", dtype=torch.float16)[0])
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        p.pretrain(half, tokenizer, text(tokenizer), tmp_path, PLAN)


@pytest.mark.parametrize("capability, dtype", [
    ((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_adapters_on_a_t4_start_from_fp32(monkeypatch, capability, dtype):
    from tiny_reason import model
    from tiny_reason.app import fit, flags
    _, asked = flags.parse(["pretrain", "--use_lora", "--model.name",
                             "student"])
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda device=None: capability)
    monkeypatch.setattr(fit, "chosen_device", lambda settings: "cuda")
    monkeypatch.setattr(model, "load_base", lambda *args: args)
    assert fit.beginning(asked) == ("student", False, "cuda", dtype)


def cut(tokenizer, tokens):
    "The same text, and then the machine dies."
    for one in text(tokenizer):
        if tokens < 0: raise SystemError("dead")
        tokens -= len(one)
        yield one


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_in_the_same_bits(kind, eight_bit, tokenizer, tmp_path):
    plan = p.Plan(steps=6, batch=1, length=64, accumulation=2, warmup=2,
                  eight_bit=eight_bit)
    whole, log = run(kind, tokenizer, tmp_path / "whole", plan)
    with pytest.raises(SystemError):
        run(kind, tokenizer, tmp_path / "halves", plan, save_every=2,
            documents=cut(tokenizer, 64 * 2 * 5))
    assert [c.name for c in checkpoints(tmp_path / "halves")] == [
        "checkpoint-4"]
    halves, resumed = run(kind, tokenizer, tmp_path / "halves", plan, resume=True)
    assert same(whole, halves)
    assert resumed[-1]["loss"] == log[-1]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_and_answers(kind, tokenizer, tmp_path):
    built, _ = run(kind, tokenizer, tmp_path)
    load = load_tuned if kind == "adapters" else load_base
    loaded, tokenizer = load(str(tmp_path), four_bit=False, device="cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        mine, theirs = built(ids).logits, loaded(ids).logits
    assert torch.allclose(mine, theirs, atol=1e-4)
    problems = list(load_problems("arithmetic", n=2))
    assert evaluate(loaded, tokenizer, problems, "question",
                    max_new_tokens=4).n == 2


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers_are_not_saved(kind, tokenizer, tmp_path):
    built = model(kind, tokenizer)
    name, weight = list(p.trained(built).items())[-1]
    with torch.no_grad(): weight[0] = math.inf
    with pytest.raises(FloatingPointError, match=f"of {name} in the model"):
        p.save_model(built, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_older_readers_find_the_base_of_the_angles(tokenizer, tmp_path):
    "transformers 5 writes it one level down, where others do not look."
    model = p.new_model("student", tokenizer)
    folders = [find_base("student")[0], p.save_model(model, tokenizer, tmp_path)]
    for folder in folders:
        config = json.loads(Path(folder, "config.json").read_text())
        assert config["rope_theta"] == 10_000
        assert read_config(folder).rope_parameters == config["rope_parameters"]


@pytest.mark.parametrize("kind", ("transformer", "rwkv"))
def test_checkpointed_activations_change_no_gradient(kind, tokenizer):
    x, y = next(p.rows(text(tokenizer), 2, 32))
    found = []
    for checkpointing in (False, True):
        built, calls = model(kind, tokenizer), []
        if checkpointing:
            built.gradient_checkpointing_enable(dict(use_reentrant=False))
        first = (built.model.blocks[0].ffn if kind == "rwkv" else
                 built.model.layers[0].mlp)
        first.register_forward_pre_hook(lambda *_: calls.append(1))
        p.train_step(p.as_function(built), [(x, y)])
        assert len(calls) == 1 + checkpointing
        found.append([q.grad for q in built.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


@pytest.mark.parametrize("eight_bit,most", [(False, 8), (True, 2.5)])
def test_bytes_of_the_averages(eight_bit, most, tokenizer):
    torch.manual_seed(0)
    built = p.new_model("student", tokenizer)
    plan = p.Plan(eight_bit=eight_bit, batch=1, length=16)
    optimizers = p.make_optimizers(built, plan)
    p.train_step(p.as_function(built), [next(p.rows(text(tokenizer), 1, 16))])
    for optimizer in optimizers: optimizer.step()
    size = sum(t.nbytes for t in averages(optimizers).values())
    numbers = sum(q.numel() for q in built.parameters())
    assert size < most * numbers
    if not eight_bit: # 4 bytes with Muon, 8 with AdamW
        table = built.model.embed_tokens.weight.numel()
        assert size > 4 * numbers + 4 * table


def test_muon_has_the_matrices_of_the_layers_and_nothing_else(tokenizer):
    for kind in ("transformer", "rwkv"):
        built = model(kind, tokenizer)
        muon, adam = p.make_optimizers(built, p.Plan())
        names = {q: n for n, q in built.named_parameters()}
        of = lambda o: {names[q] for g in o.param_groups for q in g["params"]}
        assert len(of(muon)) + len(of(adam)) == len(names)
        assert not any("emb" in n or "head" in n or ".w1" in n
                       for n in of(muon))
        assert all(names_ in of(muon) for names_ in names.values()
                   if "mlp" in names_ and "proj" in names_)


def test_the_schedule_ends_at_the_last_step_whatever_the_accumulation():
    for steps in (1, 7, 250, 4000):
        rates = [p.rate_at(s, steps) for s in range(steps)]
        assert all(0 < r <= 1 for r in rates)
        assert rates[-1] <= 1 / (0.3 * steps) + 1e-9
        assert p.rate_at(steps, steps) == 0


def test_every_step_has_its_own_rate(tokenizer, tmp_path, monkeypatch):
    plan = p.Plan(steps=5, batch=1, accumulation=2, length=32, warmup=2)
    rates, make = [], p.make_optimizers

    def watched(*args):
        optimizers = make(*args)
        for o in optimizers:
            o.register_step_pre_hook(lambda o, *_: rates.append(
                o.param_groups[0]["lr"]))
        return optimizers
    monkeypatch.setattr(p, "make_optimizers", watched)
    run("transformer", tokenizer, tmp_path, plan)
    assert rates == [plan.learning_rate * p.rate_at(s, 5, 2)
                     for s in range(5) for _ in ("Muon", "AdamW")]
    assert len(set(rates)) > 2


def test_steps_are_steps_of_the_optimiser(tokenizer, tmp_path):
    counted = []
    def counting():
        for one in text(tokenizer):
            counted.append(len(one))
            yield one
    plan = p.Plan(steps=3, batch=2, accumulation=4, length=32, warmup=1)
    built, log = run("transformer", tokenizer, tmp_path, plan, counting())
    assert log[-1]["step"] == 3 and plan.tokens == 3 * 8 * 32
    assert plan.tokens < sum(counted) < plan.tokens + 2000


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30),
                min_size=1, max_size=40),
       st.integers(1, 3), st.integers(1, 7))
def test_rows_hold_the_text_in_order(documents, batch, length):
    flat = [i for d in documents for i in d]
    blocks = list(p.rows(documents, batch, length))
    seen = [i for x, _ in blocks for i in x.flatten().tolist()]
    after = [i for _, y in blocks for i in y.flatten().tolist()]
    assert seen == flat[:len(seen)] and after == flat[1:len(seen) + 1]
    assert len(flat) - len(seen) <= batch * length


@given(st.lists(st.lists(st.just(1), min_size=1, max_size=9), min_size=1),
       st.integers(1, 100))
def test_easy_first_only_sorts(documents, tokens):
    drawn = p.easy_first(iter(documents), tokens)
    assert [len(d) for d in drawn] == sorted(
        len(d) for d in documents[:len(drawn)])
    total = sum(map(len, drawn))
    assert total > tokens or len(drawn) == len(documents)


def test_the_other_architectures_checkpoint_is_refused(tokenizer, tmp_path):
    run("rwkv", tokenizer, tmp_path)
    with pytest.raises(ValueError, match="another model: rwkv7.*not qwen2"):
        run("transformer", tokenizer, tmp_path, resume=True)


def test_adapters_of_another_scale_or_base_are_refused(tokenizer, tmp_path):
    run("adapters", tokenizer, tmp_path)
    other = add_lora(load_base("student", False, "cpu")[0], r=2, alpha=8)
    for change in (dict(), dict(base_model_name_or_path="elsewhere")):
        if change: other = model("adapters", tokenizer)
        for key, value in change.items():
            setattr(other.peft_config["default"], key, value)
        with pytest.raises(ValueError, match="another model"):
            p.pretrain(other, tokenizer, text(tokenizer), tmp_path, PLAN,
                       compiled=False, resume=True)


@pytest.mark.parametrize("change", [
    dict(steps=7), dict(batch=1), dict(accumulation=2), dict(eight_bit=True),
    dict(learning_rate=1e-3), dict(warmup=3)])
def test_another_plan_is_refused(change, tokenizer, tmp_path):
    run("transformer", tokenizer, tmp_path)
    key, = change
    other = p.Plan(**{**vars(PLAN), **change})
    with pytest.raises(ValueError, match=f"another {key}"):
        run("transformer", tokenizer, tmp_path, other, resume=True)


def test_other_text_is_refused(tokenizer, tmp_path):
    run("transformer", tokenizer, tmp_path)
    other = p.encoded(p.documents(1), tokenizer)
    with pytest.raises(ValueError, match="another text"):
        run("transformer", tokenizer, tmp_path, documents=other, resume=True)


def test_too_little_text_is_said(tokenizer, tmp_path):
    few = list(islice(text(tokenizer), 3))
    with pytest.raises(ValueError, match="shorter than one batch, 2 rows of"):
        run("transformer", tokenizer, tmp_path,
            p.Plan(steps=6, batch=2, length=2000), few)
    with pytest.raises(ValueError, match="ended after . of 600 steps"):
        run("transformer", tokenizer, tmp_path, p.Plan(600, 2, length=32), few)


def test_rows_beyond_the_context_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="rows of 4,096 .* context of 2,048"):
        run("transformer", tokenizer, tmp_path, p.Plan(2, 1, length=4096))
    run("rwkv", tokenizer, tmp_path, p.Plan(1, 1, length=2100)) # it has no limit


def test_a_loaded_model_checkpoints_its_activations(tokenizer, tmp_path):
    built = load_base("student", False, "cpu")[0] # in evaluation mode
    built.gradient_checkpointing_enable(dict(use_reentrant=False))
    calls, first = [], built.model.layers[0]
    first.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    p.pretrain(built, tokenizer, text(tokenizer), tmp_path, p.Plan(1, 1, length=32),
               compiled=False)
    assert len(calls) == 2 # forward, and again going back


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: "
                 "can't allocate memory: you tried to allocate 4 bytes.")])
def test_what_to_cut_is_said_where_memory_ends(error, tokenizer, tmp_path,
                                               monkeypatch):
    def full(*args): raise error
    monkeypatch.setattr(p, "train_step", full)
    with pytest.raises(MemoryError, match="2 rows of 32 tokens at once.*--batch"
                       "_size.*--row_length.*gradient_checkpointing"):
        run("transformer", tokenizer, tmp_path)
    error = RuntimeError("another one")
    with pytest.raises(RuntimeError, match="another one"):
        run("transformer", tokenizer, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_a_model(kind, tokenizer, tmp_path):
    "In the middle of a run somebody loads it for a look."
    with pytest.raises(SystemError):
        run(kind, tokenizer, tmp_path, save_every=2,
            documents=cut(tokenizer, 64 * 5))
    load = load_tuned if kind == "adapters" else load_base
    folder = last_checkpoint(tmp_path)
    looked, words = load(folder, four_bit=False, device="cpu")
    assert len(words) == len(tokenizer)
    assert evaluate(looked, words, list(load_problems("arithmetic", n=1)),
                    "question", max_new_tokens=2).n == 1


@pytest.mark.parametrize("where", ["weights", "rate"])
def test_nan_ends_the_run_before_it_touches_a_weight(where, tokenizer, tmp_path):
    built = model("transformer", tokenizer)
    plan = PLAN
    if where == "weights":
        with torch.no_grad(): built.model.layers[0].mlp.up_proj.weight[0] = (
            float("nan"))
    else: plan = p.Plan(steps=60, batch=2, length=32, warmup=1,
                        learning_rate=1e9)
    before = copy.deepcopy(built.state_dict())
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        p.pretrain(built, tokenizer, text(tokenizer), tmp_path, plan, compiled=False)
    if where == "weights":
        for name, tensor in built.state_dict().items():
            assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
    assert not (tmp_path / "model.safetensors").exists()


def test_ctrl_c_saves_and_says_where(tokenizer, tmp_path):
    def interrupted(): # while the fortieth document is read
        for i, document in enumerate(text(tokenizer)):
            if i == 40: signal.raise_signal(signal.SIGINT)
            yield document
    with pytest.raises(Stopped, match="checkpoint-.* is saved") as stopped:
        run("transformer", tokenizer, tmp_path, p.Plan(100_000, 2, length=32),
            interrupted())
    assert stopped.value.signal == signal.SIGINT
    state = json.loads((tmp_path / last_checkpoint(tmp_path).split("/")[-1]
                        / "trainer_state.json").read_text())
    assert state["log"][-1]["step"] > 0


def test_a_full_disk_is_said_and_leaves_nothing_torn(tokenizer, tmp_path,
                                                     monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda _: type("Disk", (), dict(free=10)))
    with pytest.raises(OSError, match="the disk of .* is full"):
        run("transformer", tokenizer, tmp_path)
    assert not checkpoints(tmp_path)


def test_no_pickle_is_written(tokenizer, tmp_path):
    run("rwkv", tokenizer, tmp_path)
    endings = {f.suffix for f in tmp_path.rglob("*") if f.is_file()}
    assert endings <= {".json", ".jsonl", ".safetensors", ".jinja"}
    load_file(next(tmp_path.glob("checkpoint-*/optimizer.safetensors")))


def test_a_preset_that_does_not_exist(tokenizer):
    with pytest.raises(ValueError, match="'micor'; did you mean 'micro'"):
        p.new_model("micor", tokenizer)
    with pytest.raises(ValueError, match="did you mean 'tiny-rwkv'"):
        p.new_model("tiny-rwvk", tokenizer)


PROMPTS = ["One and one are", "Two and two are", "Three"]


def two_steps(built, tokenizer, out):
    rows, held, _ = prepare("arithmetic", 8, 0.25, tokenizer=tokenizer)
    args = sft_config(out, device="cpu", max_steps=2, eval_steps=2,
                      save_steps=2, warmup_steps=1)
    return train(add_lora(built, r=2, alpha=4), tokenizer, rows, held, args)


@pytest.mark.parametrize("use", [
    lambda m, t, _: len(generate(m, t, PROMPTS, 3, batch_size=2)) == 3,
    lambda m, t, _: evaluate(m, t, load_problems("arithmetic", n=2),
                             "question", max_new_tokens=2).n == 2,
    lambda m, t, _: perplexity(m, t, PROMPTS) == pytest.approx(len(t), rel=0.2),
    lambda m, t, _: not bench(
        {"new": (m, t, "question")}, {"few": partial(
            accuracy, n=2, max_new_tokens=2), "bytes": partial(
            memory, contexts=(32,)), "pace": partial(speed, contexts=(64,)),
         }, rounds=1).failed,
    lambda m, t, _: add_lora(m, r=2, alpha=4)(torch.tensor([[5, 6]])).logits
        .shape == (1, 2, len(t)),
    lambda m, t, out: two_steps(m, t, out).steps == 2,
    ], ids=["generate", "evaluate", "perplexity", "bench", "add_lora", "train"])
def test_a_new_model_can_be_used_before_it_is_saved(use, tokenizer, tmp_path):
    torch.manual_seed(0)
    assert use(p.new_model("micro", tokenizer), tokenizer, tmp_path)


def test_a_preset_pads_with_a_token_that_learns(tokenizer):
    "It ends texts too; given at the start it would get no gradient as input."
    built = p.new_model("micro", tokenizer)
    for config in (built.config, built.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id == 0
    hidden, = built.model(torch.tensor([[0, 5]]), use_cache=False,
                          return_dict=False)
    hidden.sum().backward() # without the head, which shares the table
    table = built.get_input_embeddings().weight
    assert table[0].any() and table.grad[0].any()


@pytest.mark.parametrize("kind", ["transformer", "rwkv"])
def test_random_weights_are_known_by_their_guesses(kind, tokenizer):
    few = list(islice(p.rows(text(tokenizer), 2, 64), 2))
    with pytest.raises(ValueError, match="never trained.*blind guessing"):
        p.check_trained(model(kind, tokenizer), few)
    found = p.check_trained(load_base("student", False, "cpu")[0], few)
    assert found < 0.5 * math.log(len(tokenizer))
