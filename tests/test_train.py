"Training that is killed, interrupted, starved or fed nonsense."
import errno, json, math, os, shutil, signal, subprocess, sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from tiny_reason import train as lesson
from tiny_reason.app import flags
from tiny_reason.data import prepare
from tiny_reason.lib import (card, checkpoints, device, disk, fast, layers,
                             loading)
from tiny_reason.lib.trainer import isolates, RecipeTrainer
from tiny_reason.lib.folders import load_tokenizer
from tiny_reason.model import add_lora, load_base

QUICK = dict(device="cpu", max_steps=8, eval_steps=2, save_steps=2,
             warmup_steps=2, logging_steps=3, learning_rate=4e-3)


@pytest.fixture(scope="module")
def data(base):
    tokenizer = load_tokenizer(base)
    rows, held, _ = prepare("arithmetic", 44, tokenizer=tokenizer)
    return tokenizer, rows, held # 40 rows, so eight steps see two epochs


def fine_tune(base, data, folder, resume=False, **kwargs):
    tokenizer, rows, held = data
    model = add_lora(load_base(base, device="cpu")[0])
    args = lesson.sft_config(str(folder), **QUICK | kwargs)
    return lesson.train(model, tokenizer, rows, held, args, resume), model


def losses(run): return [h["loss"] for h in run.history if "loss" in h]


# Killed at any instant

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
from unittest.mock import patch
sys.path.insert(0, sys.argv[1])
from test_train import QUICK, fine_tune, lesson
from tiny_reason.data import prepare
from tiny_reason.lib import card, checkpoints, disk, trainer
from tiny_reason.lib.folders import load_tokenizer

base, out = map(Path, sys.argv[2:4])
tokenizer = load_tokenizer(base)
data = (tokenizer, *prepare("arithmetic", 44, tokenizer=tokenizer)[:2])

def session(folder, resume, dies=None):
    "Train in a process of its own; the exit status."
    child = os.fork()
    if child: return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        if dies: dies()
        run, model = fine_tune(base, data, folder, resume)
        card.save_run(run, model, tokenizer, data[1], lesson.sft_config(
            str(folder), **QUICK), folder / "saved")
        (folder / "run.json").write_text(json.dumps(
            [run.history, run.tokens, run.loss_tokens, run.best_loss,
             Path(run.best_checkpoint).name]))
    except checkpoints.Stopped: os._exit(77)
    except BaseException as e: (folder / "error").write_text(repr(e))
    os._exit(0)

def die(name, at, after=False):
    "Make the `at`-th call of a function the last thing that happens."
    home = checkpoints if name == "seal" else disk
    count, real = [0], getattr(home, name)
    def call(*args):
        value = real(*args) if after else None
        count[0] += 1
        if count[0] == at: os.kill(os.getpid(), signal.SIGKILL)
        return value if after else real(*args)
    for module in (disk, checkpoints, trainer):
        if hasattr(module, name): setattr(module, name, call)

def result(folder):
    if (folder / "error").exists(): return (folder / "error").read_text()
    return [json.loads((folder / "run.json").read_text()),
            disk.file_hash(folder / "saved" / "adapter_model.safetensors")]

start = time.time()
os.waitpid(session(out / "unbroken", False), 0)
whole, random = time.time() - start, random.Random(int(sys.argv[4]))
report = dict(unbroken=result(out / "unbroken"), broken={})
points = {" ".join(map(str, p)): p for p in (
    ("seal", 1), ("flush", 30), ("discard", 4), ("file_hash", 20),
    ("seal", 2, True), ("discard", 3, True))}
points |= {f"random {i}": None for i in range(int(sys.argv[5]))}
for name, point in points.items():
    folder, status, kills = out / name, None, 0
    (out / name).mkdir()
    if point:
        kill = lambda: die(*point)
        _, status = os.waitpid(session(folder, False, kill), 0)
    else:
        child = session(folder, False)
        time.sleep(random.uniform(0.05, whole))
        os.kill(child, 9 if random.random() < 0.7 else 15)
        _, status = os.waitpid(child, 0)
    os.waitpid(session(folder, True), 0)
    report["broken"][name] = [status, result(folder)]
print(json.dumps(report))
"""


def test_killed_at_any_instant_and_resumed(base, tmp_path):
    "Same losses, counts, best checkpoint and adapter, wherever it is killed."
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(Path(__file__).parent), str(base),
         str(tmp_path), "3407", "4"], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    killed = 0
    for name, (status, result) in report["broken"].items():
        killed += os.WIFSIGNALED(status)
        assert result == report["unbroken"], name
    assert killed >= 6 # those that were aimed; a random one may come late


# What a checkpoint may look like

def test_torn_and_tampered_checkpoints(base, data, tmp_path):
    fine_tune(base, data, tmp_path, save_total_limit=None)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*/*.bin"))
    newest = lambda: Path(checkpoints.last_checkpoint(tmp_path)).name
    optimizer = tmp_path / "checkpoint-8" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    assert newest() == "checkpoint-6"
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    assert newest() == "checkpoint-4"
    manifest = tmp_path / "checkpoint-4" / "manifest.json"
    for text in ("", "{", "[]", '{"sha256": {}}', '{"sha256": 3}'):
        manifest.write_text(text)
        assert newest() == "checkpoint-2"
    (tmp_path / "checkpoint-10").mkdir()
    assert newest() == "checkpoint-2"


def test_a_checkpoint_of_another_run_is_refused(base, data, tmp_path):
    fine_tune(base, data, tmp_path, max_steps=2)
    tokenizer, rows, held = data
    with pytest.raises(ValueError, match="another rows"):
        fine_tune(base, (tokenizer, held, rows), tmp_path, resume=True)
    with pytest.raises(ValueError, match="another sequences_a_step: 8, not 4"):
        fine_tune(base, data, tmp_path, resume=True,
                  per_device_train_batch_size=4)


def test_a_resumed_run_that_was_moved_finds_its_best(base, data, tmp_path):
    first, _ = fine_tune(base, data, tmp_path / "here", max_steps=4)
    shutil.move(tmp_path / "here", tmp_path / "there")
    again, _ = fine_tune(base, data, tmp_path / "there", resume=True,
                         max_steps=4)
    assert again.best_checkpoint == str(tmp_path / "there" / "checkpoint-4")
    assert again.history == first.history


def test_fresh_runs_do_not_inherit_checkpoints(base, data, tmp_path):
    fine_tune(base, data, tmp_path)
    fine_tune(base, data, tmp_path, max_steps=2)
    assert Path(checkpoints.last_checkpoint(tmp_path)).name == "checkpoint-2"


# Disk

def test_disk_full(base, data, tmp_path, monkeypatch):
    real = shutil.disk_usage
    saves = []

    def usage(folder):
        if len(saves) < 2: return real(folder)
        return real(folder)._replace(free=100_000)

    seal = checkpoints.seal
    monkeypatch.setattr(checkpoints, "seal", lambda folder: (
        seal(folder), saves.append(folder)))
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(OSError, match="are missing") as caught:
        fine_tune(base, data, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert "checkpoint-4" in str(caught.value)
    assert Path(checkpoints.last_checkpoint(tmp_path)).name == "checkpoint-4"
    assert not (tmp_path / ".saving").exists()


def test_disk_full_for_real(base, data, tmp_path):
    "A file system of five megabytes, where this may be mounted."
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)],
            capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(OSError, match=r"[\d,]+ are missing") as caught:
            fine_tune(base, data, disk, save_total_limit=None, max_steps=40)
        assert caught.value.errno == errno.ENOSPC
        kept = checkpoints.last_checkpoint(disk)
        assert kept and kept in str(caught.value)
    finally: subprocess.run(["umount", str(disk)])


# Numbers that cannot lie

def poison(monkeypatch, bad, value=math.nan):
    real = RecipeTrainer.summed_loss

    def summed(self, *args):
        total, count = real(self, *args)
        hit = self.model.training and self.state.global_step + 1 in bad
        return total * (value if hit else 1), count

    monkeypatch.setattr(RecipeTrainer, "summed_loss", summed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_three_bad_steps_end_a_run(base, data, tmp_path, monkeypatch, value):
    poison(monkeypatch, {4, 5, 6, 7, 8}, value)
    with pytest.raises(FloatingPointError, match="three steps") as caught:
        fine_tune(base, data, tmp_path)
    kept = Path(checkpoints.last_checkpoint(tmp_path))
    assert kept.name == "checkpoint-4" and str(kept) in str(caught.value)
    from safetensors.torch import load_file
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-4"):
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(w.isfinite().all() for w in weights.values())
    states = [disk.file_hash(tmp_path / f"checkpoint-{n}" /
                               "adapter_model.safetensors") for n in (3, 4)]
    assert states[0] == states[1] # the bad step 4 changed nothing


def test_one_bad_step_is_dropped_counted_and_shown(base, data, tmp_path,
                                                   monkeypatch):
    poison(monkeypatch, {3, 4, 6})
    run, model = fine_tune(base, data, tmp_path)
    assert run.steps == 8 and run.skipped == 3
    assert all(p.isfinite().all() for p in model.parameters())
    shown = losses(run)
    assert math.isnan(shown[0]) and math.isnan(shown[1]) # not averaged away
    assert math.isfinite(run.best_loss)


def test_a_gradient_that_is_not_finite(base, data, tmp_path, monkeypatch):
    real = RecipeTrainer.training_step

    def step(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.requires_grad
                 ).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(RecipeTrainer, "training_step", step)
    run, model = fine_tune(base, data, tmp_path)
    assert run.skipped == 1 and math.isfinite(losses(run)[-1])


def test_a_validation_loss_that_is_not_finite(base, data, tmp_path,
                                              monkeypatch):
    real = RecipeTrainer.summed_loss
    monkeypatch.setattr(RecipeTrainer, "summed_loss", lambda self, *a: (
        (total := real(self, *a))[0] * (1 if self.model.training or
         self.state.global_step < 4 else math.nan), total[1]))
    with pytest.raises(FloatingPointError, match="validation loss is nan"):
        fine_tune(base, data, tmp_path)
    assert Path(checkpoints.last_checkpoint(tmp_path)).name == "checkpoint-2"


def test_rows_that_carry_no_loss(base, data, tmp_path):
    tokenizer, rows, held = data
    silent = rows.map(lambda r, i: {"completion_mask": (
        [0] * len(r["input_ids"]) if i in (3, 7) else r["completion_mask"])},
        with_indices=True)
    with pytest.raises(ValueError, match="2 of 40 rows .* first is row 3"):
        fine_tune(base, (tokenizer, silent, held), tmp_path)
    run, _ = fine_tune(base, (tokenizer, silent, held), tmp_path, max_steps=2,
                       completion_only_loss=False)
    assert run.loss_tokens == run.tokens - 16 # all but each row's first


def test_counts(base, data, tmp_path):
    tokenizer, rows, held = data
    run, _ = fine_tune(base, data, tmp_path, max_steps=5) # every row once
    assert run.tokens == sum(map(len, rows["input_ids"]))
    assert run.loss_tokens == sum(map(sum, rows["completion_mask"]))


# Layouts and precision

@pytest.mark.parametrize("other", [
    dict(padding_free=True), dict(per_device_train_batch_size=2,
                                  gradient_accumulation_steps=4),
    dict(padding_free=True, per_device_train_batch_size=4,
         gradient_accumulation_steps=2)])
def test_twenty_steps_are_the_same_in_every_layout(base, data, tmp_path,
                                                   other):
    kwargs = dict(max_steps=20, logging_steps=1, optim="adamw_torch",
                  eval_steps=20, save_steps=20)
    padded, _ = fine_tune(base, data, tmp_path / "a", **kwargs)
    rows, _ = fine_tune(base, data, tmp_path / "b", **kwargs | other)
    assert len(losses(padded)) == 20 and rows.tokens == padded.tokens
    assert losses(rows) == pytest.approx(losses(padded), abs=1e-5)


@pytest.mark.parametrize("room", [0, 10**12])
def test_our_layers_train_as_peft_s(base, data, tmp_path, monkeypatch, room):
    "Also where the base is unpacked anew, and with gradient accumulation."
    from trl import SFTTrainer
    kwargs = dict(logging_steps=1, optim="adamw_torch",
                  per_device_train_batch_size=4, gradient_accumulation_steps=2)
    calls, apply = [], fast.Adapted.apply
    monkeypatch.setattr(fast, "available_bytes", lambda: room)
    monkeypatch.setattr(fast.Adapted, "apply",
                        lambda *args: calls.append(args) or apply(*args))
    ours, model = fine_tune(base, data, tmp_path / "a", **kwargs)
    assert len(calls) % 7 == 0 and calls
    assert not any("forward" in vars(m) for m in fast.plain_layers(model))
    calls.clear()
    monkeypatch.setattr(RecipeTrainer, "train", SFTTrainer.train)
    theirs, _ = fine_tune(base, data, tmp_path / "b", **kwargs)
    assert not calls
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    assert ours.best_loss == pytest.approx(theirs.best_loss, abs=1e-5)


def test_layers_that_are_left_to_peft(base):
    def found(**kwargs): return len(fast.plain_layers(
        add_lora(load_base(base, four_bit=False, device="cpu")[0], **kwargs)))

    assert found() == 7
    assert found(dropout=0.1) == 0
    assert found(target_modules=["q_proj"]) == 1


def test_bf16_on_a_cpu(base, data, tmp_path):
    "Off unless asked for; computes in bf16, keeps adapters in fp32."
    assert not lesson.sft_config(device="cpu").bf16
    kwargs = dict(logging_steps=1, optim="adamw_torch")
    fp32, _ = fine_tune(base, data, tmp_path / "a", **kwargs)
    bf16, model = fine_tune(base, data, tmp_path / "b", bf16=True, **kwargs)
    assert losses(bf16) != losses(fp32)
    assert losses(bf16) == pytest.approx(losses(fp32), abs=0.02)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {
        torch.float32}


def test_prompt_tokens_get_no_gradient(base, data, tmp_path):
    tokenizer, rows, _ = data
    model = add_lora(load_base(base, device="cpu")[0])
    args = lesson.sft_config(str(tmp_path), **QUICK)
    trainer = lesson.make_trainer(model, tokenizer, rows, rows, args)
    row, caught = trainer.train_dataset[0], []
    decoder = model.get_base_model().get_decoder()

    def catch(module, args, out):
        out[0].retain_grad()
        caught.append(out[0])

    hook = decoder.register_forward_hook(catch)
    loss, count = trainer.summed_loss(model, trainer.data_collator([row]))
    hook.remove()
    loss.backward()
    reached = caught[0].grad[0].abs().sum(-1) > 0
    expected = torch.tensor(row["labels"][1:] + [-100]) != -100
    assert count == expected.sum() and torch.equal(reached, expected)


def test_heads_that_change_logits_fall_back(base, data, tmp_path):
    tokenizer, rows, _ = data
    model = add_lora(load_base(base, device="cpu")[0])
    args = lesson.sft_config(str(tmp_path), **QUICK)
    trainer = lesson.make_trainer(model, tokenizer, rows, rows, args)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])
    ours = trainer.summed_loss(model, batch)
    model.get_base_model().config.logit_scale = 1.0
    theirs = trainer.summed_loss(model, batch)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("drops", [False, True])
def test_rows_are_shared_only_where_the_model_keeps_them_apart(
        base, rwkv_folder, data, tmp_path, capsys, drops):
    tokenizer, rows, held = data
    ids = rows["input_ids"]
    for folder in (base, rwkv_folder):
        model = add_lora(load_base(folder, four_bit=False, device="cpu")[0])
        torch.manual_seed(0)
        for p in model.parameters(): # an untrained RWKV-7 passes nothing on
            torch.nn.init.normal_(p, std=0.2)
        inner = model.get_base_model()
        real = inner.forward
        if drops: # as an engine with kernels of its own may
            inner.forward = lambda position_ids, **kw: real(**kw)
        assert isolates(model, ids[0], ids[1]) != drops
        trainer = lesson.make_trainer(model, tokenizer, rows, held,
            lesson.sft_config(str(tmp_path), padding_free=True, **QUICK))
        assert trainer.args.padding_free != drops
        assert ("rows are padded" in capsys.readouterr().err) == drops


def test_t4_arguments(base, data, tmp_path, monkeypatch):
    "Compute capability 7.5: fp16, a scaler that works, adapters in fp32."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    args = lesson.sft_config(str(tmp_path), device="cuda")
    assert args.fp16 and not args.bf16 and args.padding_free
    assert not args.gradient_checkpointing
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda device=None: (8, 0))
    newer = lesson.sft_config(str(tmp_path), device="cuda")
    assert newer.bf16 and not newer.fp16
    monkeypatch.undo()

    # The same precision on this CPU: an fp16 base, autocast and the scaler
    monkeypatch.setattr(loading, "compute_dtype",
                        lambda device="cpu": torch.float16)
    loaded = load_base(base, device="cpu")[0]
    linear = layers.projections(loaded).popitem()[1]
    assert linear.compute_dtype == torch.float16
    tokenizer, rows, held = data
    model = add_lora(loaded)
    trainer = lesson.make_trainer(model, tokenizer, rows, held,
                                  lesson.sft_config(str(tmp_path), **QUICK))
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.float16
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.AdamW(adapters, lr=1e-3)
    before, seen = [p.detach().clone() for p in adapters], []
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.float16):
            total, count = trainer.summed_loss(model, batch)
        scaler.scale(total / count).backward()
        scaler.unscale_(optimizer)
        assert {p.grad.dtype for p in adapters} == {torch.float32}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append((total / count).item())
    assert scaler.get_scale() == 2.0**12 and seen[-1] < seen[0]
    assert any(not torch.equal(a, b) for a, b in zip(before, adapters))


def test_skipped_scaler_steps_are_counted(base, data, tmp_path, monkeypatch):
    from accelerate.optimizer import AcceleratedOptimizer
    real, calls = AcceleratedOptimizer.step, []

    def step(self, closure=None):
        calls.append(1)
        self._is_overflow = len(calls) in (1, 2)
        if not self._is_overflow: real(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    run, _ = fine_tune(base, data, tmp_path)
    assert run.skipped == 2
    assert [h["skipped"] for h in run.history if "skipped" in h] == [2, 2]


def test_twenty_skips_in_a_row_end_the_run(base, data, tmp_path, monkeypatch):
    "fp16 that overflows at every scale trains nothing; it must not look done."
    from accelerate.optimizer import AcceleratedOptimizer

    def step(self, closure=None): self._is_overflow = True

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    with pytest.raises(FloatingPointError, match="20 steps in a row overflow"):
        fine_tune(base, data, tmp_path, max_steps=24, eval_steps=24,
                  save_steps=24)


def test_one_process_trains_on_one_of_two_gpus(tmp_path, monkeypatch):
    "Two GPUs in sight are no reason for DataParallel, which TRL refuses."
    for name, value in dict(is_available=True, device_count=2,
                            set_device=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda device=None: (7, 5))
    assert lesson.sft_config(str(tmp_path), device="cuda").n_gpu == 1
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1"):
        lesson.sft_config(str(tmp_path), device="cuda:1")


# Memory

def test_the_heaviest_batch_decides(base, data, tmp_path):
    "Not the longest rows together, which the order may keep apart."
    tokenizer, rows, held = data
    model = add_lora(load_base(base, device="cpu")[0])
    asked = []

    def budget(config, r, batch_tokens, *args, **kwargs):
        asked.append((batch_tokens, kwargs["padded_to"]))
        return dict(all=batch_tokens)

    for one_row in (False, True):
        args = lesson.sft_config(str(tmp_path), **QUICK | dict(
            padding_free=one_row, train_sampling_strategy="random"))
        trainer = lesson.make_trainer(model, tokenizer, rows, held, args)
        lengths = list(map(len, trainer.train_dataset["input_ids"]))
        batches = [lengths[i:i + 8] for i in range(0, len(lengths), 8)]
        assert sum(sorted(lengths)[-8:]) > max(map(sum, batches))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(lesson, "memory_budget", budget)
            lesson.run_budget(trainer)
        expected = ((max(map(sum, batches)),) * 2 if one_row
                    else (max(8 * max(b) for b in batches), None))
        assert asked.pop() == expected


def test_checkpointing_counts_what_torch_holds_idle(base, data, tmp_path,
                                                    monkeypatch):
    "A card whose memory torch keeps for later is not full."
    tokenizer, rows, held = data
    model = add_lora(load_base(base, device="cpu")[0])
    trainer = lesson.make_trainer(model, tokenizer, rows, held,
                                  lesson.sft_config(str(tmp_path), **QUICK))
    there, need = sum(layers.loaded_bytes(model).values()), 10**9

    class Cuda:
        gradient_checkpointing, device = False, torch.device("cuda")

    def card(free, reserved, allocated):
        for name, value in dict(mem_get_info=(free, 15e9),
                                memory_reserved=reserved,
                                memory_allocated=allocated).items():
            monkeypatch.setattr(torch.cuda, name, lambda _, v=value: v)

    def budget(trainer): return dict(all=need)

    card(free=1e8, reserved=need, allocated=there)
    assert not lesson.checkpointing_if_needed(trainer, Cuda, budget)
    card(free=1e8, reserved=need, allocated=need) # another model's tensors
    assert lesson.checkpointing_if_needed(trainer, Cuda, budget)


def test_peak_memory_is_of_the_run_and_its_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 9 * 10**9)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert device.peak_memory(cuda, others=4 * 10**9) == 5 * 10**9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert 0 < device.peak_memory(cpu) < 9 * 10**9


def test_training_leaves_no_states_behind(base, data, tmp_path, monkeypatch):
    import weakref
    made, real = [], lesson.make_trainer

    def remember(*args):
        trainer = real(*args)
        made.append(weakref.ref(trainer))
        return trainer

    monkeypatch.setattr(lesson, "make_trainer", remember)
    _, model = fine_tune(base, data, tmp_path, max_steps=2)
    assert made and not [ref for ref in made if ref()]
    assert not [p for p in model.parameters() if p.grad is not None]


def starve(monkeypatch, fits):
    real = RecipeTrainer.summed_loss

    def summed(self, model, inputs):
        if self.model.training and len(inputs["input_ids"]) > fits:
            raise torch.OutOfMemoryError("fake")
        return real(self, model, inputs)

    monkeypatch.setattr(RecipeTrainer, "summed_loss", summed)


def test_out_of_memory_halves_the_micro_batch(base, data, tmp_path,
                                              monkeypatch, capsys):
    whole, _ = fine_tune(base, data, tmp_path / "a")
    starve(monkeypatch, 2)
    halved, _ = fine_tune(base, data, tmp_path / "b")
    said = capsys.readouterr().err
    assert "4 sequences at a time instead of 8" in said
    assert "2 sequences at a time instead of 4" in said
    assert halved.tokens == whole.tokens and halved.steps == 8
    assert losses(halved) == pytest.approx(losses(whole), abs=1e-3)


def test_out_of_memory_in_the_middle_goes_on_from_there(base, data, tmp_path,
                                                        monkeypatch):
    whole, _ = fine_tune(base, data, tmp_path / "a")
    real = RecipeTrainer.summed_loss

    def summed(self, model, inputs):
        if self.state.global_step == 5 and len(inputs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("fake")
        return real(self, model, inputs)

    monkeypatch.setattr(RecipeTrainer, "summed_loss", summed)
    halved, _ = fine_tune(base, data, tmp_path / "b")
    assert halved.tokens == whole.tokens
    assert losses(halved) == pytest.approx(losses(whole), abs=1e-3)


def test_one_sequence_that_does_not_fit(base, data, tmp_path, monkeypatch):
    starve(monkeypatch, 0)
    with pytest.raises(MemoryError, match="1 sequence.*activations") as caught:
        fine_tune(base, data, tmp_path)
    assert "max_length" in str(caught.value)


def test_what_nobody_counted_is_trained_all_the_same(base, data, tmp_path,
                                                     monkeypatch, capsys):
    def uncounted(*args, **kwargs): raise ValueError("not for gpt2")
    monkeypatch.setattr(lesson, "memory_budget", uncounted)
    starve(monkeypatch, 0)
    with pytest.raises(MemoryError, match="1 sequence.*max_length"):
        fine_tune(base, data, tmp_path)
    assert "memory is not predicted: not for gpt2" in capsys.readouterr().err


# The command

def test_the_keys_of_the_card_are_the_command_line_s():
    known = {f.name for f in fields(flags.Training)}
    assert {*card.TRAINING_KEYS, "batch_size"} <= known


def launch(*args, processes=1, **kwargs):
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["accelerate.commands.launch", "--multi_gpu", "--num_processes",
                  str(processes), "--num_machines", "1", "--mixed_precision",
                  "no", "--dynamo_backend", "no", "-m"]
    return subprocess.run(
        [*start, "tiny_reason.cli", *map(str, args)], capture_output=True,
        text=True, timeout=300, env=os.environ | {
            "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, **kwargs)


SHORT = ["--config", "student", "--num_samples", "44", "--warmup_steps", "2",
         "--eval_steps", "3", "--save_steps", "3", "--max_steps", "6",
         "--training.logging_steps", "1"]


def test_the_card_repeats_the_run_bit_by_bit(base, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    done = launch("train", *SHORT, "--model.name", base, "--output_dir", first)
    assert done.returncode == 0, done.stderr
    card = first / "experiment_config.yaml"
    written = yaml.safe_load(card.read_text())
    assert list(written) == [*flags.SECTIONS, "record"]
    for name, part in flags.SECTIONS.items(): # defaults included
        assert set(written[name]) == {f.name for f in fields(part)}
    record = written["record"]
    assert record["results"]["loss_tokens"] < record["results"]["tokens"]
    assert {"torch", "trl", "bitsandbytes"} <= set(record["versions"])
    done = launch("train", "--config", card, "--output_dir", second)
    assert done.returncode == 0, done.stderr
    assert (first / "log.jsonl").read_text() == (
        second / "log.jsonl").read_text()
    again = yaml.safe_load((second / "experiment_config.yaml").read_text())
    assert again["record"]["hashes"] == record["hashes"]


def test_two_processes_train_as_one(base, tmp_path):
    "gloo on a CPU: the same global batch, the same losses, one writer."
    one = launch("train", *SHORT, "--model.name", base, "--output_dir",
                 tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = launch("train", *SHORT, "--model.name", base, "--output_dir",
                 tmp_path / "two", "--batch_size", "4", processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("trained: 6 steps") == 1
    assert two.stdout.count("data: ") == 1
    logs = [[json.loads(x) for x in (tmp_path / name / "log.jsonl"
             ).read_text().splitlines()] for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        for key in {"loss", "eval_loss"} & set(a):
            assert b[key] == pytest.approx(a[key], abs=1e-4)
        assert a.get("tokens") == b.get("tokens")


# A picture of a run that is not over

@pytest.mark.parametrize("history", [
    [], [dict(step=1, loss=2.0)],
    [dict(step=1, loss=2.0), dict(step=2, eval_loss=1.0)]])
def test_a_live_curve_can_be_drawn(history):
    figure = lesson.plot_run(lesson.Run(history, None, None, 0, 0, 0.0, 0))
    figure.canvas.draw()
    assert not figure.axes[0].texts # nothing is marked as kept yet
