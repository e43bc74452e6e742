"""Several processes, over gloo on CPUs, give what one gives.

Two processes of a one-layer model run always. Four processes, two nodes, the
student, the shape of Qwen2.5 and interruptions: `pytest -m many tests`."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_reason import cli
from tiny_reason.lib.journal import read_traces
from tiny_reason.lib.journal import read_records
from tiny_reason.lib.checkpoints import checkpoints, is_whole

ROOT = Path(__file__).parents[1]
FSDP = ROOT / "tiny_reason" / "configs" / "accelerate" / "fsdp.yaml"
SHORT = """train --config student --num_samples 44 --warmup_steps 2
    --eval_steps 3 --save_steps 3 --max_steps 6 --training.logging_steps 1
    --training.optim adamw_torch""".split()
ASK = "evaluate --config student --limit 9 --max_new_tokens 24".split()
TEACH = """distill --config distill --teacher_model student --teacher_style
    question --input_file arithmetic --limit 7 --max_new_tokens 32""".split()


def words(args): return [str(a) for a in args]


def launcher(processes, *flags, sharded=True):
    "The beginning of a command line: `accelerate launch`."
    kind = ["--config_file", FSDP] if sharded else [
        "--multi_gpu", "--num_machines", 1, "--mixed_precision", "no",
        "--dynamo_backend", "no"]
    port = [] if "--main_process_port" in flags else ["--main_process_port", 0]
    return words([sys.executable, "-m", "accelerate.commands.launch", *kind,
                  "--num_processes", processes, *port, *flags])


def start(command, **environment):
    return subprocess.Popen(
        words(command), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {
            "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
            "TQDM_DISABLE": "1"} | environment)


def finish(process, code=0, seconds=400):
    "Its output; a process that hangs is ended with all its children."
    try: out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate() # the launcher ends its children within 30 s
        raise AssertionError(f"hangs: {process.communicate()[1][-3000:]}")
    assert code is None or process.returncode == code, err[-5000:]
    return out, err


def train(processes, folder, *flags, batch=8, sharded=True, code=0, **env):
    return finish(start([
        *launcher(processes, sharded=sharded), "-m", "tiny_reason.cli", *SHORT,
        "--batch_size", batch // processes, "--output_dir", folder, *flags],
        **env), code)


def in_one(folder, *flags):
    assert cli.main(words([*SHORT, "--output_dir", folder, *flags])) == 0
    return folder


def log(folder):
    return [json.loads(x) for x in (folder / "log.jsonl").open()]


def record(folder):
    card = (folder / "experiment_config.yaml").read_text()
    return yaml.safe_load(card)["record"]


def assert_same_run(one, many, tolerance=1e-4):
    "Losses, counts, the best checkpoint and the adapter's values."
    for a, b in zip(log(one), log(many), strict=True):
        assert set(a) == set(b)
        for key in a: assert b[key] == pytest.approx(a[key], abs=tolerance), b
    a, b = (load_file(x / "adapter_model.safetensors") for x in (one, many))
    assert a.keys() == b.keys() and a
    for key in a: torch.testing.assert_close(b[key], a[key], atol=1e-3, rtol=0)
    states = [json.loads((checkpoints(x)[-1] / "trainer_state.json"
                          ).read_text()) for x in (one, many)]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]


def cut_back(folder, to):
    "The folder as it was after three of six steps."
    shutil.copytree(folder / "checkpoint-3", to / "checkpoint-3")
    return to


# Two processes: trained in shards, then asked, then asked for traces

TWO = """
import sys
from tiny_reason.cli import main
for argv in eval(sys.argv[1]):
    if code := main(argv): sys.exit(code)
"""


def marked(lines, n):
    "The first records of a file, each with a time that nobody measures."
    return "".join(json.dumps(json.loads(x) | {"seconds": 777}) + "\n"
                   for x in lines[:n])


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    "The same by one process and by two; two go on from what was cut off."
    folder = tmp_path_factory.mktemp("many")
    one, two = folder / "one", folder / "two"
    full = ["--model.four_bit", "false", "--model.name", base]
    in_one(one / "run", *full)
    assert cli.main(words([*ASK, "--output_dir", one / "asked"])) == 0
    assert cli.main(words([*TEACH, "--output_file",
                           one / "traces.jsonl"])) == 0
    # left by three processes, of which two wrote; a line is torn
    (two / "asked").mkdir(parents=True)
    for name in ("base-think", "base-question"):
        lines = (one / "asked" / f"{name}.jsonl").read_text().splitlines()
        for i in (0, 1):
            (two / "asked" / f"{name}.{i}-of-3.jsonl").write_text(
                marked(lines[i::3], 2) + lines[-1][:50])
    lines = (one / "traces.jsonl").read_text().splitlines()
    (two / "traces.jsonl").write_text(lines[0] + "\n")
    (two / "traces.1-of-3.jsonl").write_text(lines[1] + "\n" + lines[2][:50])
    script = folder / "two.py"
    script.write_text(TWO)
    out, err = finish(start([*launcher(2), script, [
        words(x) for x in (
            [*SHORT, *full, "--batch_size", 4, "--output_dir", two / "run"],
            [*ASK, "--resume", "--output_dir", two / "asked"],
            [*TEACH, "--output_file", two / "traces.jsonl"])]]))
    return one, two, out


def test_two_processes_train_in_shards_as_one(runs):
    one, two, out = runs
    assert_same_run(one / "run", two / "run")
    assert out.count("trained: 6 steps") == 1
    a, b = record(one / "run"), record(two / "run")
    assert (a["sharded"], a["processes"]) == (False, 1)
    assert (b["sharded"], b["processes"]) == (True, 2)
    assert a["hashes"]["rows"] == b["hashes"]["rows"]


def test_one_process_loads_what_two_have_saved(runs):
    from tiny_reason.model import load_tuned
    logits = []
    for folder in runs[:2]:
        model, tokenizer = load_tuned(folder / "run", False, "cpu")
        ids = tokenizer("Tom has 3 apples", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits.append(model.eval()(input_ids=ids).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_one_process_goes_on_where_two_were_cut_off(runs, base, tmp_path):
    cut_back(runs[1] / "run", tmp_path)
    in_one(tmp_path, "--resume", "--model.four_bit", "false", "--model.name",
           base)
    assert_same_run(runs[0] / "run", tmp_path)


def test_two_processes_evaluate_as_one(runs):
    one, two, _ = runs
    for name in ("base-think", "base-question"):
        a, b = (read_records(x / "asked" / f"{name}.jsonl")
                for x in (one, two))
        kept = [r["seconds"] == 777 for r in b]
        assert kept == [True, True, False, True, True, False] + [False] * 3
        assert [r | {"seconds": 0} for r in b] == [
            r | {"seconds": 0} for r in a]
    left = {p.name for p in (two / "asked").iterdir()}
    assert left == {p.name for p in (one / "asked").iterdir()}
    a, b = (json.loads((x / "asked" / "summary.json").read_text())
            for x in (one, two))
    assert {k: r["accuracy"] for k, r in a.items()} == {
        k: r["accuracy"] for k, r in b.items()}


def test_two_processes_distill_as_one(runs):
    a, b = (read_traces(x / "traces.jsonl") for x in runs[:2])
    assert b[0] == a[0] and len(b) == 7 # what was there stays where it was
    assert sorted(map(str, a)) == sorted(map(str, b))
    assert not list(runs[1].glob("traces.*-of-*"))
    assert "traces: 5 new, 2 there before" in runs[2]


def test_what_cannot_be_sharded_is_said(base, tmp_path):
    _, err = train(1, tmp_path, "--model.name", base, "--training.optim",
                   "adamw_8bit", code=1)
    assert "add --training.optim adamw_torch" in err


# Four processes, two nodes, larger models, interruptions: weekly

many = pytest.mark.many


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    "Two layers of Qwen2.5-1.5B's shape with random weights; its tokenizer."
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    home = ROOT.parent / "shared" / "hf_home"
    if not home.is_dir(): pytest.skip("needs a Hugging Face home with GSM8K "
                                      "and Qwen2.5 at ../shared/hf_home")
    source = next(home.glob("hub/models--Qwen--Qwen2.5-1.5B-Instruct/"
                            "snapshots/*"))
    folder = tmp_path_factory.mktemp("qwen")
    shutil.copytree(home, folder / "hf")
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16
                                     ).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "base")
    return folder


@many
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("four_bit", ["true", "false"])
def test_the_student(processes, sharded, four_bit, tmp_path):
    flags = ["--model.four_bit", four_bit]
    in_one(tmp_path / "one", *flags)
    train(processes, tmp_path / "many", *flags, sharded=sharded)
    assert_same_run(tmp_path / "one", tmp_path / "many")
    assert record(tmp_path / "many")["sharded"] == sharded


@many
@pytest.mark.parametrize("processes", [2, 4])
def test_the_shape_of_qwen(qwen, processes, tmp_path):
    "Two steps of four sequences: one of its logits takes 600 kB a token."
    flags = ["--model.name", qwen / "base", "--data.source", "openai/gsm8k",
             "--data.max_length", 640, "--model.four_bit", "false",
             "--num_samples", 12, "--max_steps", 2, "--eval_steps", 1,
             "--save_steps", 1, "--warmup_steps", 0]
    environment = dict(HF_HOME=str(qwen / "hf"), HF_HUB_OFFLINE="1")
    finish(start([sys.executable, "-m", "tiny_reason.cli", *SHORT, *flags,
                  "--batch_size", 4, "--output_dir", tmp_path / "one"],
                 **environment))
    train(processes, tmp_path / "many", *flags, batch=4, **environment)
    assert_same_run(tmp_path / "one", tmp_path / "many")
    assert record(tmp_path / "many")["sharded"]


@many
def test_layers_are_recomputed_in_shards(base, tmp_path):
    full = ["--model.four_bit", "false", "--model.name", base]
    in_one(tmp_path / "one", *full)
    train(2, tmp_path / "two", *full, "--training.gradient_checkpointing",
          "true")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_nodes(folders, *flags, code=0):
    "Two launches of two processes each, which meet on the loopback."
    port = free_port()
    nodes = [start([*launcher(
        4, "--num_machines", 2, "--machine_rank", rank, "--main_process_ip",
        "127.0.0.1", "--main_process_port", port), "-m", "tiny_reason.cli",
        *SHORT, *flags, "--batch_size", 2, "--output_dir", folder])
        for rank, folder in enumerate(folders)]
    return [finish(node, code) for node in nodes]


@many
def test_two_nodes_train_as_one_process(base, tmp_path):
    full = ["--model.four_bit", "false", "--model.name", base]
    in_one(tmp_path / "one", *full)
    (out, _), (silent, _) = two_nodes([tmp_path / "nodes"] * 2, *full)
    assert "trained: 6 steps" in out and "trained" not in silent
    assert_same_run(tmp_path / "one", tmp_path / "nodes")
    assert record(tmp_path / "nodes")["processes"] == 4
    # and two processes of one node go on from what two nodes have left
    cut_back(tmp_path / "nodes", tmp_path / "again")
    train(2, tmp_path / "again", *full, "--resume", sharded=False)
    assert_same_run(tmp_path / "one", tmp_path / "again")


@many
def test_nodes_without_a_common_disk_end_before_the_first_step(base, tmp_path):
    ended = two_nodes([tmp_path / "a", tmp_path / "b"], "--model.name", base,
                      code=1)
    assert all("on a disk that all nodes share" in err for _, err in ended)


BROKEN = """
import os, signal, sys, time
from tiny_reason import cli
from tiny_reason.lib import trainer
real, rank = trainer.RecipeTrainer.close_step, int(os.environ["RANK"])

def close_step(self):
    step = self.state.global_step
    {what}
    return real(self)

trainer.RecipeTrainer.close_step = close_step
sys.exit(cli.main())
"""
NAN = """if step in {steps} and rank == 1:
        p = next(p for p in self.model.parameters() if p.grad is not None)
        getattr(p.grad, "_local_tensor", p.grad).view(-1)[0] = float("nan")"""
SLOW = "print('step', step, flush=True); time.sleep(0.5)"


def broken(base, folder, what, sharded, script):
    script.write_text(BROKEN.format(what=what))
    return start([*launcher(2, sharded=sharded), script, *SHORT,
                  "--model.four_bit", "false", "--model.name", base,
                  "--batch_size", 4, "--output_dir", folder])


@many
def test_a_bad_shard_is_a_bad_step_of_all(base, tmp_path):
    "One process has a NaN in its shard of a gradient; none makes the step."
    _ = finish(broken(base, tmp_path / "run", NAN.format(steps="(3,)"), True,
                      tmp_path / "broken.py"))
    assert record(tmp_path / "run")["results"]["skipped"] == 1
    assert record(tmp_path / "run")["results"]["steps"] == 6
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(v.isfinite().all() for v in weights.values())


@many
def test_three_bad_steps_end_all_processes(base, tmp_path):
    _, err = finish(broken(base, tmp_path / "run", NAN.format(
        steps="(2, 3, 4)"), True, tmp_path / "broken.py"), 1)
    assert "three steps in a row were not finite" in err
    assert is_whole(tmp_path / "run" / "checkpoint-2")


@many
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("whom", ["one process", "SIGTERM", "SIGINT"])
def test_a_signal_stops_all_after_the_same_step(base, tmp_path, whom, sharded):
    process = broken(base, tmp_path, SLOW + f"""
    if step == 1 and rank == 1 and {whom!r} == "one process":
        os.kill(os.getpid(), signal.SIGTERM)""", sharded,
        tmp_path / "broken.py")
    if whom != "one process": # but the launcher
        while "step 1" not in process.stdout.readline(): pass
        process.send_signal(getattr(signal, whom))
    _, err = finish(process, None)
    assert process.returncode != 0
    last, = tmp_path.glob("checkpoint-*")
    assert is_whole(last), err[-3000:]
    in_one(tmp_path, "--resume", "--model.four_bit", "false", "--model.name",
           base)
    in_one(tmp_path / "one", "--model.four_bit", "false", "--model.name", base)
    assert_same_run(tmp_path / "one", tmp_path)
