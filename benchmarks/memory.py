"""Every row of `memory_budget` against bytes in memory. Prints Markdown.

`python benchmarks/memory.py > benchmarks/memory.md`; takes minutes and about
6 GB of memory and 4 GB of disk for the 28 layers of Qwen2.5-1.5B (--small
leaves them out). Weights are random, only shapes are real; nothing is
downloaded. With a CUDA device the peaks are measured there too."""
import argparse
import importlib.metadata
import shutil
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from accelerate.utils import calculate_maximum_sizes
from transformers import (AutoModelForCausalLM, LlamaConfig, Qwen2Config,
                          logging)
from trl.trainer.utils import add_fused_lm_head

from tiny_reason.lib.folders import find_base
from tiny_reason.lib.layers import empty_model, loaded_bytes, weight_bytes
from tiny_reason.memory import adapter_bytes, peak_bytes, saved_bytes
from tiny_reason.model import add_lora, load_base, memory_budget

QWEN = dict(hidden_size=1536, num_attention_heads=12, num_key_value_heads=2,
            intermediate_size=8960, vocab_size=151_936,
            tie_word_embeddings=True, max_position_embeddings=32_768)
LLAMA = dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4,
             intermediate_size=5632, vocab_size=32_000,
             tie_word_embeddings=False, max_position_embeddings=2048)
ADAMS = {"adamw_torch": torch.optim.AdamW, "adamw_8bit": bnb.optim.AdamW8bit}


def table(header, rows):
    print("|", " | ".join(header), "|")
    print("|" + "---|" * len(header))
    for row in rows:
        print("|", " | ".join(str(cell) for cell in row), "|")
    print(flush=True)


def saved(config, folder):
    "Random weights of this shape in 16 bit, with the student's tokenizer."
    torch.manual_seed(3407)
    AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in Path(find_base("student")[0]).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def trainable(base, r):
    tuned = add_lora(base, r)
    for p in tuned.parameters(): # as training keeps them
        if p.requires_grad: p.data = p.data.float()
    return tuned.train()


def loaded(source, dtype, four_bit, r, device="cpu"):
    return trainable(load_base(str(source), four_bit, device, dtype)[0], r)


# --- rows that are always there ------------------------------------------------

def static_rows(source, dtype):
    "{row: (predicted, in memory)} of a model with adapters on a CPU."
    tuned = loaded(source, dtype, True, 16)
    budget = memory_budget(tuned.config, batch_tokens=1, dtype=dtype)
    rows = {row: (budget[row], size)
            for row, size in loaded_bytes(tuned).items()}
    trained = [p for p in tuned.parameters() if p.requires_grad]
    for p in trained: p.grad = torch.zeros_like(p)
    rows["gradients"] = budget["gradients"], sum(p.grad.nbytes for p in trained)
    for name, kind in ADAMS.items():
        optimizer = kind(trained, lr=0.0)
        optimizer.step()
        tensors = [t for state in optimizer.state.values()
                   for t in state.values() if torch.is_tensor(t)]
        rows[f"optimiser, {name}"] = (
            adapter_bytes(empty_model(tuned.config), 16, name)["optimiser"],
            sum({t.data_ptr(): t.nbytes for t in tensors}.values()))
    return rows


def static_tables(sources):
    print("## Rows that are always there\n\nPredicted from the configuration, "
          "and counted over the tensors of the loaded model (NF4, double "
          "quantised), in bytes. What is not quantised is in fp32, as on a "
          "CPU; in the model of 28 layers it is in 16 bit, as on a GPU.\n")
    found = {name: static_rows(source, torch.bfloat16 if "28" in name
                               else torch.float32)
             for name, source in sources.items()}
    header = ["row"]
    for name in found: header += [f"{name}: predicted", "in memory"]
    rows = []
    for row in next(iter(found.values())):
        rows.append([row])
        for shape in found.values(): rows[-1] += [f"{n:,}" for n in shape[row]]
    weights = ["NF4 codes", "absmax", "unquantised weights", "tables"]
    rows.append(["weights, sum"] + [
        f"{sum(shape[row][i] for row in weights):,}"
        for shape in found.values() for i in (0, 1)])
    table(header, rows)
    exact = all(a == b for shape in found.values() for a, b in shape.values())
    print(f"All rows equal: **{exact}**.\n")


def estimates():
    print("## Beside `accelerate estimate-memory`\n\nQwen2.5-1.5B, weights "
          "alone, 16 bit for what is not quantised. Ours is the row that the "
          "table above checks.\n")
    rows = []
    for name, config in {
            "Qwen2.5-1.5B": Qwen2Config(**QWEN, num_hidden_layers=28),
            "TinyLlama-1.1B": LlamaConfig(**LLAMA, num_hidden_layers=22)}.items():
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        theirs, shape = calculate_maximum_sizes(model)[0] / 8, empty_model(config)
        for scales, double in (("fp32", False), ("double quantised", True)):
            ours = sum(weight_bytes(shape, True, double, 2).values())
            rows.append([name, scales, f"{ours / 1e9:.3f} GB",
                         f"{theirs / 1e9:.3f} GB", f"{theirs / ours - 1:+.0%}"])
    table(["model", "scales", "memory_budget", "accelerate, int4", "off"], rows)


# --- rows that move ----------------------------------------------------------------

def measure(tuned, rows, length, r, four_bit, padded, checkpointing, loss):
    """One training step: predicted and measured bytes kept, and at the peak.

    PEFT asks whether *CUDA* autocast is on before it copies inputs to fp32;
    on a CPU the answer is patched, so that the path of a GPU is measured."""
    device, dtype = tuned.device, tuned.dtype
    ids = torch.randint(0, tuned.config.vocab_size, (rows, length),
                        device=device)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    getattr(tuned, "gradient_checkpointing_"
            + ("enable" if checkpointing else "disable"))()
    extra = dict(fused_lm_head=True) if loss == "trl" else {}
    sixteen = dtype.itemsize == 2

    def run():
        with torch.autocast(device.type, dtype, enabled=sixteen):
            return tuned(input_ids=ids, labels=ids, use_cache=False,
                         attention_mask=mask if padded else None, **extra)

    def step():
        output = run() # held, as a hand-written loop would
        output.loss.backward()

    with patch.object(torch, "is_autocast_enabled", lambda *_: sixteen):
        step() # gradients are there from now on
        peak, kept = peak_bytes(step, device), saved_bytes(tuned, run)
    # what autocast took for the state before was the patch's answer
    torch.set_autocast_enabled(device.type, False)
    budget = memory_budget(
        tuned.config, r, rows * length, four_bit, checkpointing=checkpointing,
        padded_to=length if padded else None, dtype=dtype,
        logit_chunk=None if loss == "plain" else loss)
    log_probs = 4 * ids.numel() * tuned.config.vocab_size
    if loss == "trl": kept = None # it keeps no log-probabilities
    # a checkpointed layer saves nothing but its input
    copies = 0 if checkpointing else budget["adapter copies"]
    return (budget["activations"] + copies + log_probs, kept,
            sum(budget[row] for row in ("activations", "adapter copies",
                                        "logits", "backward of a layer")), peak)


def peaks(sources, plans, device):
    results, worst = [], 0
    for name, dtype, four_bit, r, settings in plans:
        tuned = loaded(sources[name], dtype, four_bit, r, device)
        fused = False
        for rows, length, padded, checkpointing, loss in settings:
            if loss == "trl" and not fused:
                add_fused_lm_head(tuned.get_base_model())
                fused = True
            keeps, kept, expected, peak = measure(
                tuned, rows, length, r, four_bit, padded, checkpointing, loss)
            off = expected / peak - 1
            worst = max(worst, abs(off))
            results.append([
                name, "NF4" if four_bit else "not quantised",
                f"{8 * dtype.itemsize} bit", r, f"{rows} × {length}",
                "yes" if padded else "", "yes" if checkpointing else "", loss,
                f"{kept / 1e6:.1f}" if kept else "",
                f"{keeps / kept - 1:+.1%}" if kept else "",
                f"{expected / 1e6:.1f}", f"{peak / 1e6:.1f}", f"{off:+.1%}"])
        del tuned
    table(["shape", "base", "forward", "rank", "rows × length", "padded",
           "checkpointing", "loss", "kept, MB", "predicted, off",
           "peak predicted, MB", "peak measured, MB", "off"], results)
    print(f"{len(results)} configurations; the worst peak is {worst:.1%} off.\n")


def peak_plans(on_gpu):
    full, half = torch.float32, torch.bfloat16
    grid = [(1, 512, False, False, "plain"), (2, 256, True, False, "plain"),
            (8, 256, True, False, "plain"), (2, 512, False, True, "plain"),
            (8, 256, True, True, "plain")]
    short = [(1, 512, False, False, "plain"), (2, 256, True, False, "plain"),
             (2, 256, True, True, "plain")]
    own = [(2, 256, True, False, "trl"), (2, 512, True, True, "trl")]
    plans = [("student", half, True, 8, grid),
             ("student", half, False, 64, grid),
             ("Qwen2.5-1.5B, 2 layers", half, True, 16, short),
             ("Qwen2.5-1.5B, 2 layers", half, False, 64, short),
             ("TinyLlama-1.1B, 2 layers", half, True, 4, short)]
    if on_gpu: return plans
    return [("student", full, True, 16, grid + own), *plans]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true",
                        help="without the 28 layers of Qwen2.5-1.5B")
    parser.add_argument("--machine", default=(
        "2 cores of an Intel Xeon (Sapphire Rapids class, AMX), no GPU"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in (
        "torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate"))
    print(f"# Memory, predicted and measured\n\nBy `benchmarks/memory.py` on "
          f"{options.machine}. {versions}. Weights are random, shapes are "
          "real.\n")
    with tempfile.TemporaryDirectory() as folder:
        qwen, two = "Qwen2.5-1.5B, 28 layers", "Qwen2.5-1.5B, 2 layers"
        sources = {"student": "student",
                   two: saved(Qwen2Config(**QWEN, num_hidden_layers=2),
                              f"{folder}/qwen2"),
                   "TinyLlama-1.1B, 2 layers": saved(
                       LlamaConfig(**LLAMA, num_hidden_layers=2),
                       f"{folder}/llama2")}
        static = {name: sources[name] for name in ("student", two)}
        if not options.small:
            static[qwen] = saved(Qwen2Config(**QWEN, num_hidden_layers=28),
                                 f"{folder}/qwen28")
        static_tables(static)
        estimates()
        print("## Kept for the backward pass, and the peak of a training step\n"
              "\nBeyond weights, adapters and gradients. *Kept*: the distinct "
              "storages of `saved_tensors_hooks`, without parameters. *Peak*: "
              "the largest running sum of the allocator's events, on a CPU as "
              "the profiler reports them.\n")
        peaks(sources, peak_plans(False), "cpu")
        if torch.cuda.is_available():
            print(f"## The peak on {torch.cuda.get_device_name()}\n\n"
                  "`torch.cuda.max_memory_allocated`.\n")
            peaks(sources, peak_plans(True), "cuda")
