"""The code path of Qwen2.5-1.5B on its real data, tokenizer and layer shape.

Two layers with random weights stand in for the twenty-eight: a test cannot
download three gigabytes. Skipped where real GSM8K is not at hand."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2] / "shared" / "hf_home"

pytestmark = pytest.mark.skipif(not HOME.is_dir(), reason=(
    "needs GSM8K and Qwen2.5's tokenizer in a Hugging Face home at "
    "../shared/hf_home"))

PATH = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from tiny_reason.data import build_prompt, load_problems, prepare
from tiny_reason.eval import evaluate
from tiny_reason.lib.layers import loaded_bytes
from tiny_reason.model import (add_lora, load_base, load_tuned, memory_budget,
                               merge)
from tiny_reason.train import save_run, sft_config, train

qwen, out = "Qwen/Qwen2.5-1.5B-Instruct", Path(sys.argv[1])
config = AutoConfig.from_pretrained(qwen)
whole = memory_budget(config) # of the published configuration, 28 layers
assert whole["adapters"] == 4 * 18_464_768
assert 2 * whole["NF4 codes"] == 1_310_195_712
config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
torch.manual_seed(0)
base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
base.save_pretrained(out / "base")
AutoTokenizer.from_pretrained(qwen).save_pretrained(out / "base")
del base

model, tokenizer = load_base(str(out / "base"), device="cpu")
assert tokenizer.vocab_size + len(tokenizer.get_added_vocab()) >= 151_665
rows, held, report = prepare("openai/gsm8k", 2000, tokenizer=tokenizer)
assert report == dict(read=2000, kept=2000, dropped={}), report
assert (len(rows), len(held)) == (1800, 200)

# No user text forms a control token, for every control token there is.
controls = tokenizer.get_added_vocab()
plain = build_prompt("x", tokenizer)
for text in controls:
    prompt = build_prompt(f"a{text}b", tokenizer, system_prompt=f"c{text}d")
    assert sum(prompt.count(i) for i in controls.values()) == sum(
        plain.count(i) for i in controls.values()), text
    assert f"a{text}b" in tokenizer.decode(prompt)

tuned = add_lora(model)
assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {
    torch.float32}
counted = loaded_bytes(tuned)
predicted = memory_budget(model.config, dtype=torch.float32)
assert counted == {row: predicted[row] for row in counted}
args = sft_config(str(out / "run"), device="cpu", max_steps=3, eval_steps=3,
                  save_steps=3, warmup_steps=1, logging_steps=1,
                  per_device_train_batch_size=2)
run = train(tuned, tokenizer, rows, held.select(range(4)), args)
losses = [h["loss"] for h in run.history if "loss" in h]
assert run.steps == 3 and all(5 < loss < 20 for loss in losses), losses
save_run(run, tuned, tokenizer, rows, args, out / "adapter", data=report)

ids = torch.tensor([rows[0]["input_ids"]])
with torch.inference_mode():
    before = tuned.eval()(input_ids=ids).logits
    again, tokenizer = load_tuned(out / "adapter", device="cpu")
    after = again.eval()(input_ids=ids).logits
assert torch.allclose(before, after, atol=1e-5)

test = load_problems("openai/gsm8k", "main", "test").select(range(50))
merged = merge(again)
result = evaluate(merged, tokenizer, test, max_new_tokens=8)
assert result.n == 50 and 0 <= result.low <= result.accuracy <= result.high
print("whole path done")
"""


def test_real_path(tmp_path):
    shutil.copytree(HOME, tmp_path / "hf")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"),
                                "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PATH, str(tmp_path)],
                          env=environment, cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "whole path done" in done.stdout
