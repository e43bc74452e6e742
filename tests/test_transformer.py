"""What 09_transformer cannot show on a page: many shapes, and bad folders.

The reference is always transformers' own model of the same weights."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, GPT2Config, LlamaConfig,
                          Qwen2Config, Qwen2ForCausalLM)

from tiny_reason import transformer as t
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.memory import peak_bytes, saved_bytes
from tiny_reason.model import load_base

STUDENT = Path(find_base("student")[0])
SMALL = dict(vocab_size=1152, hidden_size=64, intermediate_size=64,
             num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=128)


@st.composite
def configs(draw):
    "Any shape of the two families that can be built."
    groups = draw(st.integers(1, 3))
    heads, h = groups * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 8))
    theta = draw(st.sampled_from([100.0, 1e4, 1e6]))
    shape = dict(
        vocab_size=draw(st.integers(2, 60)), hidden_size=heads * h,
        num_attention_heads=heads, num_key_value_heads=groups,
        num_hidden_layers=draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 40)),
        tie_word_embeddings=draw(st.booleans()), max_position_embeddings=64,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_parameters=dict(rope_theta=theta, rope_type="default"))
    if draw(st.booleans()):
        return Qwen2Config(**shape)
    return LlamaConfig(**shape, attention_bias=draw(st.booleans()),
                       mlp_bias=draw(st.booleans()),
                       head_dim=draw(st.sampled_from([h, 2 * h])))


def pair(config, dtype=torch.float32, seed=0):
    "Their model with random weights, and ours with the same."
    torch.manual_seed(seed)
    other = AutoModelForCausalLM.from_config(config).eval()
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.3)
    mine = t.Transformer(config)
    mine.load_state_dict({n: p.detach() for n, p in other.named_parameters()})
    return other.to(dtype), mine.to(dtype)


def gap(a, b):
    return (a - b).abs().max() / b.abs().max().clamp(min=1)


# --- equality with transformers --------------------------------------------

@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 3), st.integers(1, 24), st.integers(0, 9))
def test_logits_and_counts(config, rows, length, seed):
    other, mine = pair(config, seed=seed)
    ids = torch.randint(0, config.vocab_size, (rows, length))
    with torch.inference_mode():
        assert gap(mine(ids), other(ids).logits) < 1e-5
        shifted = torch.arange(length)[None] + 64 - length
        assert gap(mine(ids, positions=shifted), other(
            ids, position_ids=shifted).logits) < 1e-5
        assert torch.equal(mine(ids, keep=1), mine(ids)[:, -1:]) or gap(
            mine(ids, keep=1), mine(ids)[:, -1:]) < 1e-5
    assert sum(t.count_parameters(config).values()) == sum(
        p.numel() for p in other.parameters())


@settings(max_examples=25, deadline=None)
@given(configs(), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_padding_and_pieces(config, lengths):
    "Left padding, positions from the mask, and a cache filled in pieces."
    other, mine = pair(config)
    width = max(lengths) + 3
    ids = torch.randint(0, config.vocab_size, (len(lengths), width))
    real = torch.tensor([[0] * (width - n - 3) + [1] * (n + 3)
                         for n in lengths])
    at = (real.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = other(ids, attention_mask=real, position_ids=at).logits
        whole = mine(ids, real, at)
        cache, parts = t.Cache(mine, len(lengths), width), []
        for start, end in ((0, width - 3), (width - 3, width - 1),
                           (width - 1, width)):
            parts.append(mine(ids[:, start:end], real[:, :end],
                              at[:, start:end], cache))
    seen = real.bool()
    assert gap(whole[seen], expected[seen]) < 1e-5
    assert gap(torch.cat(parts, 1)[seen], expected[seen]) < 1e-5


@settings(max_examples=25, deadline=None)
@given(configs(), st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_packed_texts_do_not_see_each_other(config, lengths):
    _, mine = pair(config)
    ids = torch.randint(0, config.vocab_size, (1, sum(lengths)))
    texts = torch.tensor([[i for i, n in enumerate(lengths, 1)
                           for _ in range(n)]])
    at = torch.tensor([[p for n in lengths for p in range(n)]])
    with torch.inference_mode():
        alone = torch.cat([mine(part) for part in ids.split(lengths, 1)], 1)
        assert gap(mine(ids, texts, at), alone) < 1e-5
        assert gap(mine(ids, texts), alone) < 1e-4 # only distance counts


@settings(max_examples=15, deadline=None)
@given(configs())
def test_gradients(config):
    "The same gradients as transformers, with and without checkpointing."
    other, mine = pair(config)
    ids = torch.randint(0, config.vocab_size, (2, 9))
    x, y = ids[:, :-1], ids[:, 1:]
    F.cross_entropy(other(x).logits.flatten(0, 1), y.flatten()).backward()
    expected = {n: p.grad for n, p in other.named_parameters()}
    for mine.checkpointing in (False, True):
        mine.zero_grad()
        F.cross_entropy(mine(x).flatten(0, 1), y.flatten()).backward()
        for name, p in mine.named_parameters():
            assert gap(p.grad, expected[name]) < 1e-4, name


def test_the_padding_row_learns_here_alone():
    "The one difference in training: theirs keeps the padding row's gradient 0."
    other, mine = pair(Qwen2Config(**SMALL, pad_token_id=3))
    ids = torch.arange(8)[None]
    for logits in (other(ids).logits, mine(ids)):
        F.cross_entropy(logits[0], ids[0]).backward()
    theirs, ours = (m.model.embed_tokens.weight.grad for m in (other, mine))
    differ = (theirs - ours).abs().amax(1) > 1e-4 * ours.abs().max()
    assert differ.nonzero().flatten().tolist() == [3]
    assert not theirs[3].any() and ours[3].any()


def test_bfloat16_agrees_with_transformers():
    "Norms in fp32, angles in fp32, the rest in 16 bit, as theirs."
    mine = t.load(STUDENT, torch.bfloat16)
    other, _ = load_base("student", False, "cpu", torch.bfloat16)
    ids = torch.arange(200)[None]
    with torch.inference_mode():
        assert gap(mine(ids).float(), other(ids).logits.float()) < 2e-2


def test_initial_weights_are_those_of_transformers():
    config = t.preset_config("micro", 1152, num_hidden_layers=1)
    torch.manual_seed(0)
    mine = t.Transformer(config).state_dict()
    other = AutoModelForCausalLM.from_config(config).state_dict()
    for name, p in mine.items():
        assert abs(p.std() - other[name].std()) < 2e-3, name
        assert abs(p.mean() - other[name].mean()) < 2e-3, name


# --- memory -----------------------------------------------------------------

@pytest.mark.parametrize("rows,length,more", [
    (2, 64, {}), (1, 16, {}), (3, 50, dict(tie_word_embeddings=False)),
    (4, 200, dict(num_key_value_heads=6, intermediate_size=512)),
    (2, 8, dict(vocab_size=8000)), (2, 100, dict(vocab_size=8000))])
@pytest.mark.parametrize("by_hand", [True, False])
def test_training_memory(rows, length, more, by_hand):
    "Activations to the byte, the peak of a second pass within 1 %."
    shape = dict(vocab_size=1152, num_hidden_layers=2) | more
    config = t.preset_config("micro", **shape)
    model = (t.Transformer if by_hand else Qwen2ForCausalLM)(config)
    ids = torch.zeros(rows, length, dtype=torch.long)

    def forward():
        return model(ids) if by_hand else model(ids, use_cache=False).logits

    def step():
        logits = forward()
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()

    step()
    for checkpointing in (False, True):
        if by_hand: model.checkpointing = checkpointing
        elif checkpointing: model.train().gradient_checkpointing_enable()
        need = t.training_bytes(config, rows, length, checkpointing)
        if not checkpointing:
            assert need["activations"] == saved_bytes(
                model, forward) - ids.nbytes
        moving = [need[r] for r in ("activations", "loss", "rest of backward")]
        assert sum(moving) == pytest.approx(peak_bytes(step), rel=0.01)
    assert need["weights"] == sum(p.nbytes for p in model.parameters())
    adam = torch.optim.AdamW(model.parameters())
    adam.step()
    assert need["Adam"] == sum(s.nbytes for state in adam.state.values()
                               for s in state.values())


# --- folders ----------------------------------------------------------------

class Words(list):
    "As much of a tokenizer as saving asks of it."
    eos_token_id = pad_token_id = 1
    def save_pretrained(self, folder): pass


@settings(max_examples=15, deadline=None)
@given(configs())
def test_round_trip(tmp_path_factory, config):
    "transformers writes, we read; we write, transformers reads."
    folder = tmp_path_factory.mktemp("round")
    other, mine = pair(config)
    other.save_pretrained(folder)
    read = t.load(folder)
    t.save(read, Words(range(config.vocab_size)), folder / "again")
    written = json.loads((folder / "again" / "config.json").read_text())
    assert (written["rope_theta"] == written["rope_parameters"]["rope_theta"]
            == config.rope_parameters["rope_theta"]) # for older readers too
    again = AutoModelForCausalLM.from_pretrained(folder / "again")
    assert type(again) is type(other)
    assert again.config.rope_parameters == config.rope_parameters
    expected = dict(other.named_parameters())
    for model in (read, again, t.load(folder / "again")):
        found = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in found)


@pytest.fixture
def folder(tmp_path):
    "A small model with the student's tokenizer."
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, tie_word_embeddings=True)
    return t.save(t.Transformer(config), load_tokenizer(STUDENT),
                  tmp_path / "model")


def test_a_tokenizer_that_does_not_fit(folder):
    model, words = t.load(folder), load_tokenizer(STUDENT)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)
    for n, spare in ((1151, 0), (1153, 0), (1153, -1), (1152, 5)):
        with pytest.raises(ValueError, match=f"1,152 rows.* {n:,} tokens"):
            t.save(model, Words(range(n)), folder, spare=spare)
    t.save(model, Words(range(1000)), folder, spare=152)
    words.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="1,152 rows.*1,153 tokens"):
        t.save(model, words, folder)


def test_a_file_in_parts(folder):
    expected = t.load(folder).state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = t.load(folder).state_dict()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    sorted(folder.glob("*.safetensors"))[0].unlink()
    with pytest.raises(FileNotFoundError, match="holds no model-00001"):
        t.load(folder)


def test_a_tied_table_that_is_there_twice(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.clone()}, file)
    assert t.load(folder).lm_head is None
    save_file(tensors | {"lm_head.weight": table + 1}, file)
    with pytest.raises(ValueError, match="ties head and embedding"):
        t.load(folder)


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("settings,said", [
    (dict(model_type="gpt2"), "Transformer builds qwen2 and llama; this is a gpt2 model"),
    (dict(model_type="rwkv7"), "names no architecture"),
    (dict(model_type=None), "names no architecture"),
    (dict(num_attention_heads=3), "3 heads do not divide a width of 64"),
    (dict(num_attention_heads=64), "head width of 1 is odd"),
    (dict(num_key_value_heads=4), "4 key/value heads do not divide 2"),
    (dict(model_type="llama", num_attention_heads=3, head_dim=None),
     "64.*not a multiple.*3"),
    (dict(hidden_act="gelu"), "hidden_act='gelu'.*'silu' alone"),
    (dict(use_sliding_window=True, sliding_window=8), "sliding_window=8"),
    (dict(rope_parameters=dict(rope_type="linear", factor=2.0,
                               rope_theta=1e4)), "rope_type='linear'"),
    (dict(num_hidden_layers=3, layer_types=["full_attention"] * 3),
     r"asks for model.layers.2.* the file has none"),
    (dict(num_hidden_layers=1, layer_types=["full_attention"]),
     r"of shape none, the file has \(64,\)"),
    (dict(intermediate_size=96), r"\(64, 96\), the file has \(64, 64\)"),
    (dict(vocab_size=1200), r"\(1200, 64\), the file has \(1152, 64\)"),
    (dict(tie_word_embeddings=False), "asks for lm_head.weight")])
def test_a_config_that_does_not_fit(folder, settings, said):
    change(folder, **settings)
    with pytest.raises(ValueError, match=said) as caught:
        t.load(folder)
    assert len(str(caught.value)) < 400


def test_files_that_are_missing_cut_or_pickled(folder, tmp_path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 200, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole safetensors"):
            t.load(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickles.*never opened"):
        t.load(folder)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        t.load(tmp_path / "nowhere")


def test_nan_is_named(folder):
    model, words = t.load(folder), load_tokenizer(STUDENT)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("inf")
    where = "1 of the 4,096 numbers of model.layers.1.mlp.up_proj.weight"
    for call in (lambda: t.save(model, words, folder),
                 lambda: t.greedy(model, [1, 2, 3])):
        with pytest.raises(FloatingPointError, match=where):
            call()
    t.load(folder) # the refused save left what was there
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight"):
        t.load(folder)


def test_limits_of_text_and_cache(folder):
    model = t.load(folder)
    full = torch.zeros(1, 128, dtype=torch.long)
    assert model(full).shape == (1, 128, 1152)
    with pytest.raises(ValueError, match="129 tokens.*made for 128"):
        model(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match="made for 128"):
        model(full[:, :2], positions=torch.tensor([[0, 128]]))
    with pytest.raises(ValueError, match="140 tokens.*made for 128"):
        t.greedy(model, [1] * 120, 20)
    with pytest.raises(ValueError, match="room for 4 tokens.*would be 5"):
        model(full[:, :5], cache=t.Cache(model, 1, 4))
    for ids in ([1152], [-1], [3, 5000]):
        with pytest.raises(ValueError, match="1,152 rows"):
            t.greedy(model, ids)
    with pytest.raises(ValueError, match="empty"):
        t.greedy(model, [])
    assert t.greedy(model, [1], 0) == []


def test_presets():
    for wrong, near in (("mini", "tiny"), ("smal", "small"), ("", "micro"),
                        ("gpt2", "tiny")):
        with pytest.raises(ValueError, match="all are micro, tiny, small"):
            t.preset_config(wrong, 100)
    with pytest.raises(ValueError, match="nearest is 'small'"):
        t.preset_config("smal", 100)
    for name in t.PRESETS: # rows of whole NF4 blocks, heads of 64
        config = t.preset_config(name, 1152)
        assert config.intermediate_size % 64 == config.hidden_size % 64 == 0
        assert t.head_width(config) == 64
        assert 8 / 3 <= config.intermediate_size / config.hidden_size < 2.8


def test_other_architectures_are_not_built():
    with pytest.raises(ValueError, match="builds qwen2 and llama.*gpt2"):
        t.Transformer(GPT2Config())
