"""RWKV-7: the reference on more shapes, properties, hostile files."""
import copy
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from tiny_reason import model as spine
from tiny_reason import rwkv
from tiny_reason.data import prepare
from tiny_reason.eval import generate_ids
from tiny_reason.model import (add_lora, find_base, load_base, load_tokenizer,
                               merge, peak_bytes)
from tiny_reason.rwkv import (Memory, RWKV7Config, RWKV7ForCausalLM, chunked,
                              from_reference, load_rwkv, recurrent,
                              reference_names, training_bytes)
from tiny_reason.train import sft_config, train

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


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer(find_base("student")[0])


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
    predicted = training_bytes(config, ids.numel())
    predicted = sum(predicted[k] for k in ("gradients", "activations",
                                           "logits"))
    assert abs(peak_bytes(step) / predicted - 1) < 0.15


def test_it_goes_through_nf4_lora_and_train(tmp_path, tokenizer, monkeypatch):
    "The recipe of the spine, unchanged: quantise, adapt, train, merge, write."
    monkeypatch.setattr(spine, "CAUSAL_LMS", spine.CAUSAL_LMS | {
        RWKV7Config.model_type: "RWKV7ForCausalLM"})
    torch.manual_seed(0)
    RWKV7ForCausalLM(RWKV7Config(1152, 64, 2)).save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    base, words = load_base(str(tmp_path / "b"), device="cpu")
    tuned = add_lora(base, r=4)
    rows, held, _ = prepare("arithmetic", 44, tokenizer=words)
    run = train(tuned, words, rows, held, sft_config(
        str(tmp_path / "run"), "cpu", max_steps=3, eval_steps=3, save_steps=3,
        per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0))
    assert run.steps == 3
    merged = merge(tuned)
    prompts = [words(t)["input_ids"] for t in ("Amy has 12.", "7+5=")]
    assert generate_ids(merged, words, prompts, 6) == [
        generate_ids(merged, words, [p], 6)[0] for p in prompts]


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
            (nan, "6208 of the 6,208 numbers of head.weight are NaN")):
        torch.save(table, file)
        with pytest.raises(ValueError, match=says): from_reference(file)
    with pytest.raises(FileNotFoundError): from_reference(tmp_path / "none.pth")


def test_half_precision_weights_are_read_as_fp32(tmp_path, odd):
    half = {n: t.bfloat16() for n, t in reference_names(odd).items()}
    torch.save(half, tmp_path / "w.pth")
    ours = from_reference(tmp_path / "w.pth").state_dict()
    assert all(torch.equal(ours[n], t.bfloat16().float())
               for n, t in odd.state_dict().items())


def test_a_saved_folder_must_be_whole(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file
    model = RWKV7ForCausalLM(RWKV7Config(1152, 64, 1))
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_rwkv(tmp_path)
    model.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    load_rwkv(tmp_path)
    weights = tmp_path / "model.safetensors"
    table, whole = load_file(weights), weights.read_bytes()
    name = "model.blocks.0.att.w1"
    for wrong in ({n: t for n, t in table.items() if n != name},
                  table | {name: torch.zeros(64, 3)},
                  table | {"model.blocks.1.att.w1": torch.zeros(3)}):
        save_file(wrong, weights, {"format": "pt"})
        with pytest.raises(ValueError, match="att.w1"): load_rwkv(tmp_path)
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged"): load_rwkv(tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"): load_rwkv(tmp_path)
