"""RWKV-7: the reference on more shapes, properties, hostile files."""
import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from tiny_reason.data import make_problems, prepare
from tiny_reason.demo import stream
from tiny_reason.eval import evaluate
from tiny_reason.lib.decode import generate_ids
from tiny_reason.lib.layers import loaded_bytes
from tiny_reason.memory import cache_bytes, peak_bytes, saved_bytes
from tiny_reason.model import (add_lora, load_base, load_tuned, memory_budget,
                               merge)
from tiny_reason.rwkv import (RWKV7Config, RWKV7ForCausalLM,
                              activation_bytes, bytes_to_train, chunked,
                              from_reference, recurrent, reference_names)
from tiny_reason.lib.state import adapter_activations, Memory
from tiny_reason.lib.trainer import RecipeTrainer
from tiny_reason.train import save_run, sft_config, train

torch.set_num_threads(1)


def setup_function(): torch.manual_seed(0)


@torch.no_grad()
def shaken(config, seed=0):
    "A model in which no weight is idle."
    torch.manual_seed(seed)
    model = RWKV7ForCausalLM(config).eval()
    for p in model.parameters():
        p += torch.randn_like(p) * (0.5 / p.shape[-1] ** 0.5 if p.ndim > 1
                                    else 0.05)
    return model


@pytest.fixture(scope="module")
def odd():
    return shaken(RWKV7Config(97, 64, 2, head_size=16))


# --- the reference package

@pytest.mark.parametrize("shape", [
    dict(vocab_size=50, hidden_size=64, num_hidden_layers=1),
    dict(vocab_size=1152, hidden_size=128, num_hidden_layers=4, head_size=32),
    dict(vocab_size=300, hidden_size=256, num_hidden_layers=2),
    dict(vocab_size=97, hidden_size=192, num_hidden_layers=3,
         intermediate_size=320, low_ranks=dict(w=5, a=7, v=3, g=11))],
    ids=lambda s: "x".join(str(s[k]) for k in (
        "vocab_size", "hidden_size", "num_hidden_layers")))
@torch.inference_mode()
def test_equals_the_reference(shape, tmp_path, monkeypatch):
    "Logits to 1e-4 and 256 of 256 greedy tokens, on the same weights."
    pytest.importorskip("rwkv", reason="the package rwkv is not installed "
                        "(pip install rwkv)")
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    from rwkv.model import RWKV
    source = shaken(RWKV7Config(**shape), seed=shape["hidden_size"])
    table = {name: t[None, None] if t.ndim == 1 and ".att." in name else t
             for name, t in reference_names(source).items()}
    for name in "v0", "v1", "v2": # in their files, and never used
        table[f"blocks.0.att.{name}"] = torch.ones(3)
    torch.save(table, tmp_path / "weights.pth")
    theirs = RWKV(model=str(tmp_path / "weights"), strategy="cpu fp32")
    ours = from_reference(tmp_path / "weights.pth")
    assert ours.config.to_dict() == source.config.to_dict() | {
        k: ours.config.to_dict()[k] for k in ("low_ranks", "architectures")
        if shape["num_hidden_layers"] == 1}
    prompt = torch.randint(shape["vocab_size"], (1, 70))
    scores, state = theirs.forward(prompt[0].tolist(), None, full_output=True)
    out = ours(prompt, use_cache=True)
    assert (out.logits[0] - scores).abs().max() < 1e-4
    for i, memory in enumerate(out.past_key_values.layers):
        assert torch.allclose(memory.values[0].mT, state[3 * i + 1], atol=1e-4)
    told, last = [], scores[-1]
    for _ in range(256):
        told.append(last.argmax().item())
        last, state = theirs.forward([told[-1]], state)
    new = ours.generate(prompt, attention_mask=torch.ones_like(prompt),
                        max_new_tokens=256, do_sample=False, pad_token_id=0)
    assert new[0, 70:].tolist() == told
    assert len({*told}) > 10 # or the agreement would say little


# --- loop and chunks

def vectors(rows, heads, tokens, size, seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    def x(): return torch.randn(rows, heads, tokens, size, generator=draw,
                                dtype=dtype)
    key, rate = F.normalize(x(), dim=-1), x().sigmoid()
    return [x(), -0.6065 * (4 * x()).sigmoid(), x() * rate, x(), -key,
            key * rate], torch.randn(rows, heads, size, size, generator=draw,
                                     dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70),
       st.sampled_from([1, 2, 8, 17]), st.sampled_from([1, 2, 7, 32, 64]),
       st.integers(0, 10**6), st.sampled_from([None, 0.02, 0.3, 1.0]))
def test_chunks_are_the_loop(rows, heads, tokens, size, chunk, seed, often):
    parts, memory = vectors(rows, heads, tokens, size, seed)
    starts = None if often is None else torch.rand(
        rows, tokens, generator=torch.Generator().manual_seed(seed)) < often
    for ours, theirs in zip(chunked(*parts, memory, starts, chunk),
                            recurrent(*parts, memory, starts)):
        scale = max(1, theirs.abs().max().item())
        assert (ours - theirs).abs().max() < 1e-5 * scale


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.data(), st.integers(0, 10**6))
def test_a_text_can_be_read_in_parts(tokens, data, seed):
    cut = data.draw(st.integers(1, tokens - 1))
    parts, memory = vectors(2, 2, tokens, 8, seed)
    starts = torch.rand(2, tokens,
                        generator=torch.Generator().manual_seed(seed)) < 0.1
    whole, end = chunked(*parts, memory, starts, 16)
    first, middle = chunked(*(p[:, :, :cut] for p in parts), memory,
                            starts[:, :cut], 16)
    second, last = chunked(*(p[:, :, cut:] for p in parts), middle,
                           starts[:, cut:], 16)
    assert torch.allclose(torch.cat([first, second], 2), whole, atol=1e-4)
    assert torch.allclose(last, end, atol=1e-4)


def test_gradients_are_those_of_the_function():
    parts, memory = vectors(1, 2, 7, 3, 0, torch.float64)
    starts = torch.tensor([[False, False, False, True, False, False, False]])
    inputs = [p.requires_grad_() for p in (*parts, memory)]
    assert torch.autograd.gradcheck(
        lambda *x: chunked(*x, starts, chunk=3), inputs)


def test_the_fiercest_decay_does_not_overflow():
    "Every channel at the bound, over the longest chunk that is offered."
    parts, memory = vectors(1, 1, 256, 64, 1)
    parts[1] = torch.full_like(parts[1], -0.60653)
    y, end = chunked(*parts, memory, chunk=64)
    theirs, _ = recurrent(*parts, memory)
    assert (y - theirs).abs().max() < 1e-5 * theirs.abs().max()


# --- rows

class ManyEnds: # a tokenizer; the ends are in the generation config
    eos_token_id = 0
    def get_vocab(self): return {}


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9),
       st.integers(1, 5), st.integers(0, 99))
def test_answers_do_not_depend_on_their_company(odd, lengths, slots, seed):
    "Rows end at different steps, and others take their slots."
    model = copy.deepcopy(odd).double() # what differs is then no rounding
    model.generation_config.eos_token_id = list(range(12))
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 97, (n,), generator=draw).tolist()
               for n in lengths]
    together = generate_ids(model, ManyEnds(), prompts, 16, slots)
    assert together == [generate_ids(model, ManyEnds(), [p], 16)[0]
                        for p in prompts]


def test_answers_that_end_early_make_room(odd, monkeypatch):
    "The same with rows that are known to join a running batch."
    joined, take = [], Memory.take
    def counted(self, rows, width, others):
        joined.append(len(others))
        take(self, rows, width, others)
    monkeypatch.setattr(Memory, "take", counted)
    model = copy.deepcopy(odd).double()
    model.generation_config.eos_token_id = list(range(12))
    prompts = [torch.randint(1, 97, (3 + i,)).tolist() for i in range(12)]
    together = generate_ids(model, ManyEnds(), prompts, 16, 3)
    assert len({len(ids) for ids in together}) > 2 and sum(joined) > 4
    assert together == [generate_ids(model, ManyEnds(), [p], 16)[0]
                        for p in prompts]


def test_documents_in_one_row_train_as_if_alone(odd):
    model = copy.deepcopy(odd).double().train()
    lengths = (1, 33, 8, 50)
    texts = [torch.randint(97, (1, n)) for n in lengths]
    def gradients(loss):
        model.zero_grad(); loss.backward()
        return [p.grad.clone() for p in model.parameters()]
    alone = gradients(sum(model(t).logits.square().sum() for t in texts))
    row = model(torch.cat(texts, 1), position_ids=torch.cat(
        [torch.arange(n) for n in lengths])[None]).logits
    for ours, theirs in zip(gradients(row.square().sum()), alone):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)


def test_right_padding_changes_nothing_before_it(odd):
    ids = torch.randint(1, 97, (2, 30))
    mask = (torch.arange(45) < 30).long().expand(2, -1)
    with torch.no_grad():
        padded = odd(F.pad(ids, (0, 15)), attention_mask=mask).logits[:, :30]
        assert torch.allclose(padded, odd(ids).logits, atol=1e-5)


def test_an_attention_mask_of_another_shape_is_refused(odd):
    with pytest.raises(ValueError, match=r"rows × tokens.*\(1, 1, 4, 4\)"):
        odd(torch.zeros(1, 4, dtype=torch.long),
            attention_mask=torch.ones(1, 1, 4, 4))


def test_beam_search_reorders_memories(odd):
    ids = torch.randint(1, 97, (1, 9))
    beams = odd.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3,
                         max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        def score(row):
            logp = odd(row[None]).logits[0, :-1].log_softmax(-1)
            return logp.gather(1, row[1:, None])[8:].sum()
        greedy = odd.generate(ids, attention_mask=torch.ones_like(ids),
                              max_new_tokens=8, do_sample=False,
                              pad_token_id=0)
        assert score(beams[0]) >= score(greedy[0]) - 1e-4


def test_a_cache_that_was_used_can_be_reset(odd):
    ids = torch.randint(1, 97, (1, 9))
    with torch.no_grad():
        out = odd(ids, use_cache=True)
        cache = out.past_key_values
        assert cache.get_seq_length() == 9
        assert all(isinstance(m, Memory) for m in cache.layers)
        cache.reset()
        again = odd(ids, past_key_values=cache).logits
    assert torch.equal(again, out.logits)


def test_a_transformers_cache_is_refused(odd):
    from transformers import DynamicCache
    cache, ids = DynamicCache(), torch.randint(1, 97, (1, 3))
    odd(ids, past_key_values=cache) # an empty one will do
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="keys and values of a transformer"):
        odd(ids, past_key_values=cache)


# --- training

def test_checkpointing_gives_the_same_gradients(odd):
    model, ids = copy.deepcopy(odd).train(), torch.randint(97, (2, 40))
    found = []
    for on in (False, True):
        (model.gradient_checkpointing_enable if on else
         model.gradient_checkpointing_disable)()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found): assert torch.allclose(a, b, atol=1e-6)


def test_checkpointing_does_not_count_a_token_twice(odd):
    model, ids = copy.deepcopy(odd).train(), torch.randint(97, (2, 40))
    model.gradient_checkpointing_enable()
    out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert out.past_key_values.get_seq_length() in (0, 40)


def test_peak_of_a_step_is_what_the_formula_says():
    torch.manual_seed(0)
    config = RWKV7Config(1152, 128, 4)
    model, ids = RWKV7ForCausalLM(config), torch.randint(1152, (4, 256))
    def step(): model(ids, labels=ids).loss.backward()
    predicted = bytes_to_train(config, ids.numel())
    predicted = sum(predicted[k] for k in ("gradients", "activations",
                                           "logits"))
    assert abs(peak_bytes(step) / predicted - 1) < 0.15


@pytest.mark.parametrize("width, layers", [(128, 4), (128, 8)])
def test_the_budget_knows_of_checkpointing(width, layers):
    torch.manual_seed(0)
    config = RWKV7Config(1152, width, layers)
    model, ids = RWKV7ForCausalLM(config).train(), torch.randint(1152, (4, 256))
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    def step(): model(ids, labels=ids, use_cache=False).loss.backward()
    predicted = bytes_to_train(config, ids.numel(), checkpointing=True)
    predicted = sum(predicted[k] for k in ("gradients", "activations",
                                           "logits"))
    assert 0.7 < peak_bytes(step) / predicted <= 1


@pytest.mark.parametrize("four_bit", [True, False])
def test_rows_of_the_budget_are_exact(four_bit, rwkv_folder):
    model, _ = load_base(rwkv_folder, four_bit, "cpu")
    tuned = add_lora(model, r=5)
    budget = memory_budget(RWKV7Config(1152, 64, 2), r=5, batch_tokens=1,
                           four_bit=four_bit, dtype=torch.float32)
    for row, size in loaded_bytes(tuned).items():
        assert budget.get(row, 0) == size, row
    with pytest.raises(ValueError, match="no KV cache"):
        cache_bytes(model.config, 10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_and_peak_with_lora(dtype, checkpointing, tokenizer,
                                        tmp_path):
    "Rows of their own, and the same documents side by side in one row."
    config = RWKV7Config(1152, 128, 3, head_size=32, intermediate_size=640)
    RWKV7ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_base(tmp_path, True, "cpu", dtype)
    tuned, ids = add_lora(model).train(), torch.arange(512).view(4, 128)
    if checkpointing: tuned.activation_checkpointing_enable()
    tuned.enable_input_require_grads()
    places = torch.arange(128).repeat(4)[None]
    for given in (dict(input_ids=ids, labels=ids), dict(
            input_ids=ids.view(1, -1), labels=ids.view(1, -1),
            position_ids=places)):
        def step():
            with torch.autocast("cpu", enabled=dtype.itemsize == 2):
                output = tuned(**given)
            output.loss.backward()
        step()
        budget = memory_budget(
            config, batch_tokens=512, dtype=dtype,
            checkpointing=checkpointing,
            padded_to=128 if "position_ids" in given else None)
        assert peak_bytes(step) == pytest.approx(sum(budget[row] for row in (
            "activations", "logits", "backward of a layer",
            "adapter copies")), rel=0.05)


def test_out_of_memory_is_explained(rwkv_folder, tmp_path, monkeypatch):
    "Training asks for the budget of this architecture, in 4 bits or not."
    def starved(self, model, inputs): raise torch.OutOfMemoryError("fake")
    monkeypatch.setattr(RecipeTrainer, "summed_loss", starved)
    for four_bit in True, False:
        base, words = load_base(rwkv_folder, four_bit, "cpu")
        rows, held, _ = prepare("arithmetic", 44, tokenizer=words)
        with pytest.raises(MemoryError, match="1 sequence.*activations"):
            train(add_lora(base, r=4), words, rows, held, sft_config(
                str(tmp_path), "cpu", per_device_train_batch_size=1))


def test_the_whole_path(rwkv_folder, tmp_path):
    "Load, adapt, train, save, load, merge, evaluate, stream: as any model."
    base, words = load_base(rwkv_folder, device="cpu")
    tuned, (rows, held, _) = add_lora(base, r=4), prepare(
        "arithmetic", 44, tokenizer=words)
    args = sft_config(str(tmp_path / "run"), "cpu", max_steps=3, eval_steps=3,
                      save_steps=3, per_device_train_batch_size=4,
                      learning_rate=1e-2, warmup_steps=0)
    run = train(tuned, words, rows, held, args)
    assert run.steps == 3
    saved = save_run(run, tuned, words, rows, args, str(tmp_path / "saved"))
    again, words = load_tuned(saved, device="cpu")
    prompts = [words(t)["input_ids"] for t in ("Amy has 12.", "7+5=")]
    written = generate_ids(again, words, prompts, 6)
    assert again.peft_config["default"].base_model_name_or_path == str(rwkv_folder)
    assert written == generate_ids(tuned.eval(), words, prompts, 6)
    merged = merge(again)
    assert type(merged) is RWKV7ForCausalLM
    assert written == [generate_ids(merged, words, [p], 6)[0] for p in prompts]
    problems = make_problems(2)
    report = evaluate(merged, words, problems, max_new_tokens=4)
    assert report.n == 2
    text = "".join(stream(merged, words, problems[0]["question"], 4, 0))
    assert report.records[0]["completion"].startswith(text)


# --- files

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


def test_a_hostile_pth_is_refused_and_not_run(tmp_path, odd):
    sprung, file = tmp_path / "sprung", tmp_path / "evil.pth"
    for evil in ({"emb.weight": Trap(sprung)}, Trap(sprung), odd,
                 reference_names(odd) | {"more": Trap(sprung)}):
        torch.save(evil, file)
        for legacy in (False, True):
            if legacy: torch.save(evil, file,
                                  _use_new_zipfile_serialization=False)
            with pytest.raises(ValueError, match="nothing in it was run"):
                from_reference(file)
    assert not sprung.exists()


def test_what_is_no_checkpoint_is_named(tmp_path, odd):
    file, good = tmp_path / "w.pth", reference_names(odd)
    for content in b"", b"not a checkpoint", b"PK\x03\x04" + bytes(50):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"): from_reference(file)
    torch.save(good, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="damaged"): from_reference(file)
    less = {n: t for n, t in good.items() if n != "blocks.1.ffn.x_k"}
    wide = good | {"ln_out.bias": torch.zeros(65)}
    other = {"model.embed_tokens.weight": torch.ones(2, 2)}
    nan = good | {"head.weight": good["head.weight"] * float("nan")}
    for table, says in (
            ([1, 2], "not a table"), ({}, "not a table"),
            (torch.ones(2), "not a table"), ({"a": 3}, "not a table"),
            (other, "no emb.weight; it has model.embed_tokens.weight"),
            (less, "blocks.1.ffn.x_k is missing in it"),
            (good | {"blocks.0.ffn.s_emb.weight": torch.ones(3)},
             r"s_emb.weight is torch.Size\(\[3\]\) in it and missing here"),
            (wide, r"ln_out.bias is torch.Size\(\[65\]\) in it"),
            (nan, "6,208 of the 6,208 numbers of head.weight in .*w.pth are NaN")):
        torch.save(table, file)
        with pytest.raises(ValueError, match=says): from_reference(file)
    with pytest.raises(FileNotFoundError): from_reference(tmp_path / "none.pth")


def test_half_precision_weights_are_read_as_fp32(tmp_path, odd):
    half = {n: t.bfloat16() for n, t in reference_names(odd).items()}
    torch.save(half, tmp_path / "w.pth")
    ours = from_reference(tmp_path / "w.pth").state_dict()
    assert all(torch.equal(ours[n], t.bfloat16().float())
               for n, t in odd.state_dict().items())


def test_a_saved_folder_must_be_whole(rwkv_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(rwkv_folder, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    table, whole = load_file(weights), weights.read_bytes()
    name = "model.blocks.0.att.w1"
    for wrong, says in (
            ({n: t for n, t in table.items() if n != name}, "1 missing"),
            (table | {name: torch.zeros(64, 3)}, "1 of another shape"),
            (table | {"model.blocks.0.att.w11": torch.zeros(3)},
             "1 not asked for"),
            (table | {name: table[name] / 0}, "2,048 of the 2,048 numbers")):
        save_file(wrong, weights, {"format": "pt"})
        for four_bit in True, False:
            with pytest.raises(ValueError, match=f"{says}.*att.w1"):
                load_base(tmp_path / "m", four_bit, "cpu")
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole"):
        load_base(tmp_path / "m", device="cpu")
    weights.write_bytes(whole)
    config = tmp_path / "m" / "config.json"
    told = json.loads(config.read_text())
    for text, says in (("{", "config.json cannot be read: it is damaged"),
                       (json.dumps(told | dict(hidden_size=65)),
                        "no RWKV-7's: A width of 65 cannot be cut into heads")):
        config.write_text(text)
        with pytest.raises(ValueError, match=says):
            load_base(tmp_path / "m", device="cpu")


def test_other_kinds_and_vocabularies_are_told_apart(rwkv_folder, base, tmp_path):
    "Each sentence names both sides."
    def load(name): return load_base(tmp_path / name, device="cpu")
    shutil.copytree(rwkv_folder, tmp_path / "claims")
    shutil.copy(base / "config.json", tmp_path / "claims")
    with pytest.raises(ValueError, match="asks for qwen2: 15 missing, the "
                       "first lm_head.weight; .*not asked for, the first head"):
        load("claims")
    shutil.copytree(rwkv_folder, tmp_path / "holds")
    shutil.copy(base / "model.safetensors", tmp_path / "holds")
    with pytest.raises(ValueError, match="asks for rwkv7-tiny_reason: .* "
                       "missing.*not asked for, the first model.embed"):
        load("holds")
    for size in 1151, 1153:
        shutil.copytree(rwkv_folder, tmp_path / str(size))
        RWKV7ForCausalLM(RWKV7Config(size, 64, 1)).save_pretrained(
            tmp_path / str(size))
        with pytest.raises(ValueError, match=f"rows for {size:,} tokens and "
                           "the tokenizer has 1,152"): load(str(size))
    adapter = tmp_path / "adapter"
    add_lora(load_base(rwkv_folder, device="cpu")[0], r=2).save_pretrained(adapter)
    told = json.loads((adapter / "adapter_config.json").read_text())
    told["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="does not fit .*is .2, .* in the "
                       "adapter and missing in the base"):
        load_tuned(adapter, device="cpu")


def test_only_an_rwkv_imports_rwkv(rwkv_folder):
    script = """if True:
        import sys
        from tiny_reason.model import load_base
        for name in "student", sys.argv[1]:
            load_base(name, False, "cpu")
            print("tiny_reason.rwkv" in sys.modules)"""
    seen = subprocess.run([sys.executable, "-c", script, str(rwkv_folder)],
                          capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["False", "True"]


def kept(model, rows): # bytes of the forward pass of rows of 128 tokens
    ids = torch.zeros(rows, 128, dtype=torch.long)
    return saved_bytes(model, lambda: model.get_decoder()(ids))


def test_what_a_layer_keeps_is_counted_to_the_byte():
    shapes = [RWKV7Config(64, 192, layers) for layers in (2, 3)]
    two, three = (kept(RWKV7ForCausalLM(shape), 2) for shape in shapes)
    once = 4 * 64 * 64 # who sees whom in a chunk: once a layer
    assert three - two == 256 * activation_bytes(shapes[0]) + once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lora_keeps_of_a_layer_is_counted_to_the_byte(dtype):
    def bytes_of(layers, rows):
        frozen = RWKV7ForCausalLM(RWKV7Config(64, 192, layers)).to(dtype)
        tuned, ids = add_lora(frozen, r=4), torch.zeros(rows, 128).long()
        with torch.autocast("cpu", enabled=dtype.itemsize == 2):
            return saved_bytes(tuned, lambda: frozen.model(ids))
    # what does not depend on the number of tokens or layers drops out
    a, b, c, d = (bytes_of(layers, rows)
                  for layers in (2, 3) for rows in (2, 4))
    parts = adapter_activations(RWKV7Config(64, 192), 4, dtype.itemsize)
    assert (d - c) - (b - a) == 256 * sum(parts.values())
