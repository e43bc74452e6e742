"""What the parts of `on_cuda.py` share: sizes, problems, a base, and pretence."""
import contextlib, copy, gc
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import disable_progress_bars
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from tiny_reason.data import prepare
from tiny_reason.lib.folders import find_base, load_tokenizer
from tiny_reason.lib.layers import loaded_bytes
from tiny_reason.model import compute_dtype, load_base, memory_budget
from tiny_reason.lib.fast import ChunkedLoss
from tiny_reason.train import row_order, sft_config

FULL = dict(
    rows=2000, steps=20, warm=3, rounds=3, recipe=250, # training
    shapes=((1, 512), (1, 2048), (2, 512), (8, 256)), # of a batch
    killed=40, notebooks="*", # steps; which
    alone=4, static=128, slots=(10, 40, 128, 512), # problems; decoding
    limit=512, together=(1, 40, 128, 512)) # tokens of an answer; rows
SMOKE = dict(
    rows=48, steps=5, warm=1, rounds=1, recipe=2,
    shapes=((1, 512),), killed=4, notebooks="00_data",
    alone=1, static=4, slots=(2,), limit=400, together=(2,))
T4_BYTES = 15.4e9 # that a program can use of one


class Lab:
    "The exact shape of Qwen2.5-1.5B with random weights; or a tiny one."
    def __init__(self, smoke, folder):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.on_gpu, self.smoke = self.device == "cuda", smoke
        self.size, self.folder = SMOKE if smoke else FULL, Path(folder)
        self.source = "arithmetic" if smoke else "openai/gsm8k"
        self.path, self.kept = str(self.folder / "base"), {}
        shape = find_base("student" if smoke else "qwen2.5-1.5b")[0]
        self.tokenizer = load_tokenizer(shape)
        self.config = AutoConfig.from_pretrained(shape)
        if smoke:
            self.config.num_hidden_layers = 1
            self.config.layer_types = self.config.layer_types[:1]
        self.rows, self.held, _ = prepare(self.source, self.size["rows"],
                                          tokenizer=self.tokenizer)

    def saved(self): # folder
        "Random weights in 16 bit, as files that `load_base` takes."
        if not Path(self.path).is_dir():
            torch.manual_seed(3407)
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.bfloat16)
            model.save_pretrained(self.path)
            self.tokenizer.save_pretrained(self.path)
        return self.path

    def base(self, dtype=None):
        "The base in NF4, not to be changed."
        dtype = dtype or compute_dtype(self.device)
        if dtype not in self.kept:
            self.kept[dtype] = load_base(self.saved(), device=self.device,
                                         dtype=dtype)[0]
        return self.kept[dtype]

    def fresh(self, dtype=None):
        "The base in NF4, to be changed: a copy is quicker than the files."
        return copy.deepcopy(self.base(dtype))

    def arguments(self, **changes):
        "The recipe, short and without checkpoints."
        steps = self.size["steps"]
        return sft_config(str(self.folder / "run"), self.device, **dict(
            max_steps=steps, warmup_steps=min(5, steps), eval_steps=steps,
            save_strategy="no", load_best_model_at_end=False,
            logging_steps=1) | changes)

    def budget(self, steps, dtype):
        "Predicted peak, in bytes, of a run of the recipe in one row."
        lengths = [len(ids) for ids in self.rows["input_ids"]]
        order = row_order(lengths, steps, 8, grouped=False)
        heaviest = max(sum(lengths[i] for i in order[k:k + 8])
                       for k in range(0, len(order), 8))
        return sum(memory_budget(
            self.config, 16, heaviest, optimizer="adamw_8bit", dtype=dtype,
            logit_chunk=ChunkedLoss.at_once // self.config.vocab_size
            ).values())

    def wait(self):
        if self.on_gpu: torch.cuda.synchronize()


def held(): # bytes of tensors on the GPU
    gc.collect()
    if not torch.cuda.is_available(): return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def beside(model): # bytes that are held for something else
    return held() - sum(loaded_bytes(model).values())


@contextlib.contextmanager
def room(limit, told=True):
    "Let this process take `limit` more bytes of the GPU, and tell it so."
    if not torch.cuda.is_available():
        yield
        return
    total, limit = torch.cuda.mem_get_info()[1], int(limit) + held()
    def left(*device): return limit - torch.cuda.memory_reserved(), limit
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        with (patch.object(torch.cuda, "mem_get_info", left) if told
              else contextlib.nullcontext()): yield
    finally: torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def like_a_t4():
    "A T4 as far as software can tell; its speed is still this GPU's."
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with (patch.object(torch.cuda, "get_device_capability",
                       lambda *device: (7, 5)),
          sdpa_kernel(kernels), room(T4_BYTES)): yield


def short(dtype): return str(dtype).removeprefix("torch.")


def quiet():
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
