"""How fast is one training step, and does the speed change the losses?

    python benchmarks/train.py [--device cuda] > benchmarks/train.md

On a CPU: the bundled student. On CUDA: the shape of Qwen2.5-1.5B with random
weights, which takes the same time as the real ones. Every column trains on the
same rows with the same mask and optimiser. The columns run in turn, in several
rounds; the median of the rounds is printed, and the lowest and highest.
"""
import argparse, gc, os, platform, statistics, subprocess, sys, tempfile, time
import types
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
import torch
import yaml
from datasets import disable_progress_bars
from transformers import (AutoModelForCausalLM, PrinterCallback, Qwen2Config,
                          TrainerCallback)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from tiny_reason import train as lesson
from tiny_reason.data import prepare
from tiny_reason.lib import trainer as shipped
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.model import add_lora, compute_dtype, load_base

STEPS, WARM, BATCH = 20, 3, 8
# Qwen/Qwen2.5-1.5B-Instruct, config.json
QWEN = Qwen2Config(
    hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, intermediate_size=8960, vocab_size=151_936,
    tie_word_embeddings=True, rms_norm_eps=1e-6,
    rope_parameters=dict(rope_theta=1e6, rope_type="default"))


class Clock(TrainerCallback):
    "The time at the end of every step, and every loss."
    def on_train_begin(self, args, state, control, **kwargs):
        self.times, self.spent, self.losses = [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.spent.append(time.process_time())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs: self.losses.append(logs["loss"])


def reset_peak():
    gc.collect() # a trainer and its model are a circle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try: Path("/proc/self/clear_refs").write_text("5") # Linux: peak RSS
    except OSError: pass


def peak():
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"): return int(line.split()[1]) * 1024


def common(device, rate, steps):
    return dict(max_steps=steps, learning_rate=rate, warmup_steps=5,
                optim="adamw_8bit", logging_steps=1, report_to="none",
                save_strategy="no", eval_strategy="no", disable_tqdm=True,
                use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu",
                train_sampling_strategy="sequential", seed=3407,
                # TRL masks nothing by itself when rows come as tokens
                completion_only_loss=True)


def trl_trainer(model, tokenizer, rows, args):
    trainer = SFTTrainer(model, args, processing_class=tokenizer,
                         train_dataset=rows.select_columns(
                             ["input_ids", "completion_mask"]))
    trainer.remove_callback(PrinterCallback)
    return trainer


def columns(device, rate, steps=STEPS):
    "Name -> (whether rows are grouped by length, how to make the trainer)."
    shared, dtype = common(device, rate, steps), compute_dtype(device)
    precision = dict(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)

    def plain(model, tokenizer, rows, folder):
        return trl_trainer(model, tokenizer, rows, SFTConfig(
            folder, per_device_train_batch_size=2,
            gradient_accumulation_steps=4, **shared))

    def tuned(model, tokenizer, rows, folder):
        return trl_trainer(model, tokenizer, rows, SFTConfig(
            folder, per_device_train_batch_size=8, max_length=None,
            gradient_checkpointing=False, **precision, **shared))

    def ours(one_row, **more):
        def make(model, tokenizer, rows, folder):
            chosen = dict(shared, train_sampling_strategy="random", **more)
            args = lesson.sft_config(
                folder, device, load_best_model_at_end=False,
                padding_free=one_row, **chosen)
            return lesson.make_trainer(model, tokenizer, rows, rows, args)
        return make

    def by_peft(*args):
        trainer = ours(False)(*args)
        trainer.train = types.MethodType(SFTTrainer.train, trainer)
        return trainer

    extra = {"ours, PEFT's layers": (True, by_peft),
             "ours, bf16": (True, ours(False, bf16=True))}
    return {"plain recipe": (False, plain), "TRL tuned by hand": (True, tuned),
            "ours, padded": (True, ours(False)),
            **(extra if device == "cpu" else {}),
            "ours, one row": (False, ours(True))}


def measure(make, grouped, model, tokenizer, rows, steps=STEPS, warm=WARM):
    "One run of a fresh base: seconds and tokens after `warm`, losses, peak."
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = lesson.row_order(lengths, steps, BATCH, grouped=grouped)
    rows, model = rows.select(order), add_lora(model)
    reset_peak()
    with tempfile.TemporaryDirectory() as folder, patched_order():
        trainer, clock = make(model, tokenizer, rows, folder), Clock()
        trainer.add_callback(clock)
        trainer.train()
    tokens = sum(lengths[i] for i in order[warm * BATCH:])
    return dict(seconds=clock.times[-1] - clock.times[warm - 1],
                spent=clock.spent[-1] - clock.spent[warm - 1],
                peak=peak(), tokens=tokens, losses=clock.losses)


class patched_order:
    "Rows come in their order already: `make_trainer` is to keep it."
    def __enter__(self):
        self.real = shipped.row_order
        shipped.row_order = lambda lengths, *args: list(range(len(lengths)))

    def __exit__(self, *error): shipped.row_order = self.real


def two_processes(folder):
    "One process with all threads against two with half; the whole command."
    out, cores = {}, os.cpu_count()
    for n in (1, 2):
        to = Path(folder, str(n))
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu",
                  "--num_processes", "2", "--num_machines", "1",
                  "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
        subprocess.run(
            [sys.executable, *(launch if n > 1 else ["-m"]), "tiny_reason.cli",
             "train", "--config", "student", "--output_dir", str(to),
             "--max_steps", "30", "--num_samples", "300", "--eval_steps",
             "30", "--save_steps", "30", "--batch_size", str(BATCH // n)],
            check=True, capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, cores // n))})
        card = yaml.safe_load((to / "experiment_config.yaml").read_text())
        out[n] = card["record"]["results"]
    return out


def machine(device):
    if device != "cpu": return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in
             Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return (f"{len(names)} cores of {name}, {torch.get_num_threads()} threads,"
            " no GPU")


def span(values, form):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", default="student", help="a folder")
    options = parser.parse_args()
    disable_progress_bars()
    logging.set_verbosity_error()
    base, rate = options.base, 4e-3
    with tempfile.TemporaryDirectory() as scratch:
        if options.device != "cpu":
            base, rate = f"{scratch}/qwen", 2e-4
            AutoModelForCausalLM.from_config(
                QWEN, dtype=torch.bfloat16).save_pretrained(base)
            load_tokenizer(find_base("student")[0]).save_pretrained(base)
        rows, _, _ = prepare("arithmetic", 400, tokenizer=load_tokenizer(
            find_base("student")[0]))
        made = columns(options.device, rate)
        found = {name: [] for name in made}
        for _ in range(options.rounds):
            for name, (grouped, make) in made.items():
                model, tokenizer = load_base(base, device=options.device)
                found[name].append(measure(make, grouped, model, tokenizer,
                                           rows))
        report(found, options, base)
        if options.device == "cpu": report_processes(two_processes(scratch))


def report(found, options, base):
    shape = "the bundled student" if options.device == "cpu" else (
        "the shape of Qwen2.5-1.5B, random weights")
    print(f"Measured on {machine(options.device)}; torch {torch.__version__}; "
          f"{shape}; {STEPS} steps of {BATCH} sequences, of which the first "
          f"{WARM} are not timed; median of {options.rounds} rounds in turn "
          "(lowest to highest).\n")
    print("| | non-padding tokens/s | times plain | tokens per CPU second | "
          "times plain | 250 steps, seconds | peak, MB |\n" + "|---" * 7 + "|")
    speed, thrift = ({name: [r["tokens"] / r[unit] for r in runs]
                      for name, runs in found.items()}
                     for unit in ("seconds", "spent"))
    plain, frugal = (statistics.median(s["plain recipe"])
                     for s in (speed, thrift))
    for name, runs in found.items():
        per_step = [r["seconds"] / (STEPS - WARM) * 250 for r in runs]
        print(f"| {name} | {span(speed[name], ',.0f')} | "
              f"{statistics.median(speed[name]) / plain:.2f} | "
              f"{span(thrift[name], ',.0f')} | "
              f"{statistics.median(thrift[name]) / frugal:.2f} | "
              f"{span(per_step, '.0f')} | "
              f"{statistics.median(r['peak'] for r in runs) / 1e6:,.0f} |")
    print("\nLosses of the first 20 steps. Rows as drawn: *plain recipe* and "
          "*ours, one row*. The same rows grouped by length: the others.\n")
    print("| step |", " | ".join(found), "|\n|---|" + "---|" * len(found))
    for i in range(STEPS):
        print(f"| {i + 1} |", " | ".join(
            f"{runs[0]['losses'][i]:.4f}" for runs in found.values()), "|")


def report_processes(results):
    print("\nOne process with all threads against two with half of them "
          "(gloo), 30 steps with the same global batch, validation "
          "included:\n\n| processes | tokens/s | best validation loss |\n"
          "|---|---|---|")
    for n, r in results.items():
        print(f"| {n} | {r['tokens_per_second']:,} | {r['best_loss']:.5f} |")


if __name__ == "__main__": main()
