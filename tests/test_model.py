"""What lib/folders and 01_model cannot show on a page: other architectures, and
bad files on their way through `load_base` and `load_tuned`.

Everything is tiny and random; nothing asks the network."""
import errno
import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, BertConfig,
                          BitsAndBytesConfig, GPT2Config, LlamaConfig,
                          MistralConfig, Qwen2Config)

from tiny_reason import model as m
from tiny_reason import memory
from tiny_reason.lib import device, layers, loading
from tiny_reason.lib.folders import find_base
from tiny_reason.lib.card import save_run
from tiny_reason.train import Run, sft_config

STUDENT = Path(find_base("student")[0])
TINY = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=1152)
SHAPES = {
    "qwen2, tied, biases, GQA": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen2, untied": Qwen2Config(**TINY, tie_word_embeddings=False),
    "llama, untied": LlamaConfig(**TINY, tie_word_embeddings=False),
    "llama, MQA, biases, odd": LlamaConfig(
        hidden_size=36, intermediate_size=50, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, vocab_size=1152,
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**TINY, sliding_window=None),
    "llama, no sharing, wide heads": LlamaConfig(**TINY | dict(
        num_key_value_heads=4, head_dim=32))}


def saved(config, folder):
    "A random model of this shape, with the student's tokenizer."
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in STUDENT.glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


@pytest.fixture
def base(tmp_path):
    return saved(SHAPES["qwen2, untied"], tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    folder = tmp_path / "adapter"
    model, _ = loading.load_base(base, device="cpu")
    m.add_lora(model, r=4).save_pretrained(folder)
    return folder


def optimizer_bytes(optimizer):
    optimizer.step()
    tensors = [t for state in optimizer.state.values()
               for t in state.values() if torch.is_tensor(t)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


# --- the budget against the bytes in memory -------------------------------

@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_static_rows_are_exact(shape, four_bit, tmp_path):
    model, _ = loading.load_base(saved(SHAPES[shape], tmp_path), four_bit, "cpu")
    assert model.config._attn_implementation == "sdpa"
    tuned = m.add_lora(model, r=5)
    budget = memory.memory_budget(model.config, r=5, batch_tokens=1,
                                  four_bit=four_bit, dtype=torch.float32)
    for row, size in layers.loaded_bytes(tuned).items():
        assert budget.get(row, 0) == size, row
    ids = torch.arange(8)[None]
    tuned(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert budget["gradients"] == sum(p.grad.nbytes for p in trained)
    for name, kind in {"adamw_torch": torch.optim.AdamW,
                       "adamw_8bit": bnb.optim.AdamW8bit}.items():
        assert memory.adapter_bytes(layers.empty_model(model.config), 5, name)[
            "optimiser"] == optimizer_bytes(kind(trained, lr=0.0)), name


def test_scales_that_are_not_quantised():
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        STUDENT, dtype=torch.float32, device_map={"": "cpu"},
        quantization_config=nf4)
    budget = memory.memory_budget(model.config, double_quant=False,
                                  dtype=torch.float32)
    counted = layers.loaded_bytes(model)
    assert counted.pop("adapters") == 0
    assert counted == {row: budget[row] for row in counted}


@pytest.mark.parametrize("shape", SHAPES)
def test_activations_and_peak(shape, tmp_path):
    model, _ = loading.load_base(saved(SHAPES[shape], tmp_path), device="cpu")
    tuned, ids = m.add_lora(model, r=4).train(), torch.arange(1024).view(4, 256)
    for padded in (False, True):
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        def run():
            return tuned(input_ids=ids, labels=ids, use_cache=False,
                         attention_mask=mask if padded else None)
        def step():
            output = run()
            output.loss.backward()
        step()
        budget = memory.memory_budget(
            model.config, r=4, batch_tokens=1024, dtype=torch.float32,
            padded_to=256 if padded else None)
        kept = budget["activations"] + 4 * 1024 * model.config.vocab_size
        assert kept == pytest.approx(memory.saved_bytes(tuned, run), rel=0.05)
        peak = sum(budget[row] for row in (
            "activations", "logits", "backward of a layer"))
        assert peak == pytest.approx(memory.peak_bytes(step), rel=0.05)


def test_budget_rows():
    qwen = Qwen2Config(**TINY)
    shape = layers.empty_model(qwen)
    big = memory.adapter_bytes(shape, 1000, "paged_adamw_32bit")
    assert big["optimiser"] < big["gradients"] * 2 # some of it may be paged out
    with pytest.raises(ValueError, match="states of 'sgd'"):
        memory.adapter_bytes(shape, 16, "sgd")
    for wrong in (dict(r=0), dict(batch_tokens=0), dict(r=-1)):
        with pytest.raises(ValueError, match="needs r and batch_tokens"):
            memory.memory_budget(qwen, **wrong)
    with pytest.raises(ValueError, match="not for gpt2"):
        memory.memory_budget(GPT2Config())
    answers = memory.answer_budget(qwen, 10)
    assert answers["KV cache"] == 2 * 2 * 2 * 16 * 2 * 10
    assert {*answers} == {"unquantised weights", "tables", "KV cache"}
    assert memory.largest_batch(qwen, card_bytes=1e3) == {False: 0, True: 0}
    small, large = [memory.largest_batch(qwen, size)[False] for size in (1e8, 2e8)]
    assert 0 < small < large


# --- NF4 against bitsandbytes, on whatever hypothesis comes up with --------

@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), half=st.integers(2, 60), seed=st.integers(0, 99),
       exponent=st.integers(-30, 30), zeros=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_nf4_bit_for_bit(rows, half, seed, exponent, zeros, dtype):
    w = torch.randn(rows, 2 * half, generator=torch.Generator().manual_seed(seed))
    w = (w * 2.0 ** (exponent if dtype != torch.float16 else 0)).to(dtype)
    if zeros:
        w[: rows // 2] = 0
    codes, absmax, shape = m.quantize_nf4(w)
    packed, state = quantize_4bit(w, quant_type="nf4")
    assert torch.equal(codes, packed.view(-1))
    assert torch.equal(absmax, state.absmax)
    back = m.dequantize_nf4(codes, absmax, shape, dtype=dtype)
    if 2 * half % 64 not in (16, 32, 48): # bitsandbytes 0.50 errs on a CPU
        assert torch.equal(back, dequantize_4bit(packed, state))
    scale = absmax.repeat_interleave(64)[:w.numel()].view_as(w)
    assert ((back.float() - w.float()).abs() <= 0.157 * scale).all()


def test_nf4_refuses_integers():
    with pytest.raises(ValueError, match="floating point"):
        m.quantize_nf4(torch.arange(64))


# --- other architectures ---------------------------------------------------

@pytest.mark.parametrize("four_bit", [True, False])
def test_gpt2(four_bit, tmp_path):
    folder = saved(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=1152,
                              n_positions=64), tmp_path)
    model, _ = loading.load_base(folder, four_bit, "cpu")
    with pytest.raises(ValueError, match="it has .'c_attn', 'c_fc', 'c_proj'"):
        m.add_lora(model, target_modules=["q_proj", "v_proj"])
    tuned = m.add_lora(model)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    merged, ids = loading.merge(tuned), torch.arange(32)[None]
    with torch.no_grad():
        ours, theirs = [x.eval()(input_ids=ids).logits for x in (merged, tuned)]
        with tuned.disable_adapter():
            plain = tuned(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(plain, theirs, atol=1e-2)
    tuned.save_pretrained(tmp_path / "adapter")
    again, _ = loading.load_tuned(tmp_path / "adapter", four_bit, "cpu")
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, theirs, atol=1e-5)


def test_not_a_causal_lm(tmp_path):
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a causal .* BertForMaskedLM"):
        loading.load_base(str(tmp_path))


def test_code_in_the_folder_is_not_run(base):
    config = json.loads(Path(base, "config.json").read_text())
    trace = Path(base, "ran")
    Path(base, "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    config |= dict(model_type="evil", auto_map={
        "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    Path(base, "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is never run"):
        loading.load_base(base, device="cpu")
    assert not trace.exists()


# --- merge -------------------------------------------------------------------

@pytest.mark.parametrize("four_bit", [True, False])
def test_merge_before_and_after_training(four_bit):
    tuned = m.add_lora(loading.load_base("student", four_bit, "cpu")[0])
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.arange(64)[None]
    early = loading.merge(tuned)
    with torch.no_grad():
        adapted = tuned.eval()(input_ids=ids).logits
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for merged in (early, loading.merge(tuned)):
            assert torch.allclose(merged(input_ids=ids).logits, adapted,
                                  atol=1e-3)


def test_merge_of_a_foreign_model():
    "bitsandbytes may have rearranged its weights at the first evaluation."
    nf4 = loading.load_base("student", device="cpu")[0].config.quantization_config
    foreign = AutoModelForCausalLM.from_pretrained(
        STUDENT, dtype=torch.float32, device_map={"": "cpu"},
        quantization_config=nf4).eval()
    ids = torch.arange(64)[None]
    with torch.no_grad():
        seen = foreign(input_ids=ids).logits
        plain = loading.merge(foreign)
        gap = plain(input_ids=ids).logits - seen
    assert gap.norm() < 0.05 * seen.norm()
    assert type(plain) is type(foreign)
    assert not hasattr(plain.config, "quantization_config")


# --- bad files ---------------------------------------------------------------

class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_truncated_weights(base):
    file = Path(base, "model.safetensors")
    for keep in (0, 5, 100, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match="not a whole safetensors"):
            loading.load_base(base, device="cpu")


def test_pickle_posing_as_weights(base, tmp_path):
    trace, file = tmp_path / "ran", Path(base, "model.safetensors")
    file.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ValueError, match="something else under that name"):
        loading.load_base(base, device="cpu")
    file.rename(Path(base, "pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match="are pickles"):
        loading.load_base(base, device="cpu")
    assert not trace.exists()


def test_flipped_bit_in_the_header(base):
    "Every byte of the header matters, or is a name that is then missing."
    file = Path(base, "model.safetensors")
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for at in range(0, 8 + length, (8 + length) // 12):
        file.write_bytes(whole)
        flip(file, at)
        try:
            model, _ = loading.load_base(base, device="cpu")
        except ValueError:
            continue
        assert layers.loaded_bytes(model)["NF4 codes"] == layers.weight_bytes(
            layers.empty_model(model.config), True, True, 4)["NF4 codes"]


def test_flipped_bit_in_the_numbers(tmp_path):
    "Seen where a hash is recorded: the student's SHA256SUMS."
    folder = tmp_path / "student"
    shutil.copytree(STUDENT, folder)
    loading.load_base(str(folder), device="cpu")
    flip(folder / "model.safetensors", -1000)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        loading.load_base(str(folder), device="cpu")


def test_flipped_bit_in_an_adapter(base, tmp_path):
    "Seen in whatever `save_run` has written, which records the hash."
    tuned, words = loading.load_base(base, device="cpu")
    tuned = m.add_lora(tuned, r=4)
    folder = save_run(Run([], None, None, 0, 0, 1.0, 0), tuned, words,
                      dict(input_ids=[], completion_mask=[]),
                      sft_config(str(tmp_path), "cpu"), tmp_path / "run")
    loading.load_tuned(folder, device="cpu")
    flip(folder / "adapter_model.safetensors", -10)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        loading.load_tuned(folder, device="cpu")


def test_missing_and_misshapen_tensors(base):
    file = Path(base, "model.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file,
              {"format": "pt"})
    with pytest.raises(ValueError, match="qwen2: 1 missing, the first .*up_pr"):
        loading.load_base(base, device="cpu")
    save_file(tensors | {name: torch.zeros(3, 3)}, file, {"format": "pt"})
    for four_bit in True, False:
        with pytest.raises(ValueError, match="1 of another shape, the first .*"
                           "up_proj"): loading.load_base(base, four_bit, "cpu")
    more = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | more, file, {"format": "pt"}) # as old Llamas have it
    loading.load_base(base, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none(base, adapter, value):
    "They would be hidden by NF4, so the file is asked."
    for file, name in (
            (Path(base, "model.safetensors"),
             "model.layers.1.mlp.up_proj.weight"),
            (adapter / "adapter_model.safetensors", "base_model.model.model."
             "layers.0.mlp.down_proj.lora_B.weight")):
        tensors = load_file(file)
        tensors[name][0, :2] = value
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"^2 of the .* of {name} in .*"):
            loading.load_tuned(adapter, device="cpu")


def test_a_tokenizer_of_another_model(base, adapter, tmp_path):
    "More rows than tokens are usual; a token without a row is an error."
    shutil.copytree(base, tmp_path / "b",
                    ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(FileNotFoundError, match="b holds no tokenizer"):
        loading.load_base(tmp_path / "b", device="cpu")
    small = SHAPES["qwen2, untied"].to_dict() | dict(vocab_size=1151)
    saved(Qwen2Config(**small), base)
    for call in (lambda: loading.load_base(base, device="cpu"),
                 lambda: loading.load_tuned(adapter, device="cpu")):
        with pytest.raises(ValueError, match="rows for 1,151 tokens and the "
                           "tokenizer has 1,152"): call()
    saved(Qwen2Config(**small | dict(vocab_size=1153)), base)
    tokenizer = loading.load_base(base, device="cpu")[1]
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ValueError, match="adapter: .* 1,153 .* has 1,154"):
        loading.load_tuned(adapter, device="cpu")


def test_bad_adapters(base, adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        loading.load_tuned(tmp_path)
    with pytest.raises(ValueError, match="was made for .*base, not for student"):
        loading.load_tuned(adapter, base="student")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for wrong, message in [
            (dict(r=8), r"not fit .*\[4, 192\] in the adapter and \[8, 192\]"),
            (dict(r=0), "rank of at least 1"),
            (dict(lora_alpha=-1), "alpha=-1"),
            (dict(base_model_name_or_path="student"), "does not fit student"),
            (dict(target_modules=["q_proj"]), "missing in the base")]:
        (adapter / "adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=message):
            loading.load_tuned(adapter, device="cpu")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    loading.load_tuned(adapter, device="cpu")
    trace = tmp_path / "ran"
    (adapter / "adapter_model.safetensors").write_bytes(
        pickle.dumps(Evil(trace)))
    with pytest.raises(ValueError, match="Nothing in it was run"):
        loading.load_tuned(adapter, device="cpu")
    assert not trace.exists()


def test_rows_that_bitsandbytes_misreads(tmp_path):
    folder = saved(LlamaConfig(**TINY | dict(intermediate_size=160)), tmp_path)
    with pytest.raises(ValueError, match="misreads rows of 160"):
        loading.load_base(folder, device="cpu")
    loading.load_base(folder, four_bit=False, device="cpu")


def test_numbers_and_names():
    model, _ = loading.load_base("student", device="cpu")
    for wrong in (dict(r=0), dict(r=-4), dict(alpha=0), dict(alpha=-32)):
        with pytest.raises(ValueError, match="rank of at least 1 and an alpha"):
            m.add_lora(model, **wrong)
    tuned = m.add_lora(model)
    with pytest.raises(ValueError, match="has adapters already"):
        m.add_lora(tuned)
    for wrong, near in {"studnet": "student", "qwen-1.5b": "qwen2.5-1.5b",
                        "TinyLlama": "tinyllama-1.1b"}.items():
        with pytest.raises(ValueError, match=f"nearest preset is '{near}'"):
            loading.load_base(wrong)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        loading.load_base("./nowhere")
    with pytest.raises(ValueError, match="backend"):
        loading.load_base("student", backend="onnx")


# --- room and backends --------------------------------------------------------

def test_not_enough_memory(base, monkeypatch):
    monkeypatch.setattr(device.psutil, "virtual_memory",
                        lambda: types.SimpleNamespace(available=10_000))
    monkeypatch.setattr(loading, "load_weights", None) # would fail if it were reached
    with pytest.raises(MemoryError, match="GB is missing"):
        loading.load_base(base, device="cpu")


def test_not_enough_disk(monkeypatch):
    config = SHAPES["qwen2, untied"]
    monkeypatch.setattr(loading.shutil, "disk_usage",
                        lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="GB is missing") as caught:
        loading.check_room(config, "nobody/has-this", True, torch.device("cpu"),
                     torch.float32)
    assert caught.value.errno == errno.ENOSPC


def test_unsloth(monkeypatch):
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        loading.load_base("student", device="cpu", backend="unsloth")
    asked = {}
    stand_in = types.ModuleType("unsloth")
    stand_in.__spec__ = types.SimpleNamespace()
    class FastLanguageModel:
        def from_pretrained(**options):
            asked.update(options)
            return "model", "tokenizer"
    stand_in.FastLanguageModel = FastLanguageModel
    monkeypatch.setitem(sys.modules, "unsloth", stand_in)
    assert loading.load_unsloth("owner/name", None, None, True, torch.device("cuda"),
                          torch.float16) == "model"
    assert asked["load_in_4bit"] and not asked["trust_remote_code"]
    assert (asked["model_name"], asked["dtype"]) == ("owner/name", torch.float16)
