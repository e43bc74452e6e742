"""Part *right* of `on_cuda.py`: each function gives the rows of one table.

`ok` says whether a row is as it should be."""
import contextlib, json, math, os, shutil, signal, subprocess, sys, time
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import memory
from benchmarks.cuda_lab import (T4_BYTES, beside, like_a_t4, quiet,
                                 room, short)
from tiny_reason.data import prepare
from tiny_reason.lib.decode import rows_that_fit
from tiny_reason.lib.layers import loaded_bytes
from tiny_reason.model import add_lora, compute_dtype, load_base, merge
from tiny_reason.lib.checkpoints import Stopped
from tiny_reason.train import sft_config, train

ROOT = Path(__file__).resolve().parents[1]


def losses(run): return [h["loss"] for h in run.history if "loss" in h]


def make_infinite(model, passes):
    "One gradient becomes infinite in these backward passes, counted from 1."
    count = [0]
    def spoil(gradient):
        count[0] += 1
        return gradient * math.inf if count[0] in passes else gradient
    next(p for p in model.parameters() if p.requires_grad).register_hook(spoil)


def as_on_a_t4(lab):
    "Losses in three precisions, skipped steps, the peak, the slots afterwards."
    plain, reference = contextlib.nullcontext, None
    for name, kind, precision, spoiled in (
            ("fp32", plain, dict(bf16=False, fp16=False), ()),
            ("as it is", plain, {}, ()), ("T4", like_a_t4, {}, ()),
            ("T4, two infinite gradients", like_a_t4, {}, (3, 5))):
        with kind(): dtype = compute_dtype(lab.device)
        dtype = torch.float32 if precision else dtype
        lab.base(dtype) # its bytes are not the run's
        with kind():
            args, model = lab.arguments(**precision), add_lora(lab.fresh(dtype))
            others = beside(model)
            make_infinite(model, spoiled)
            before = rows_that_fit(model, 1024)
            run = train(model, lab.tokenizer, lab.rows, lab.held, args)
            after = rows_that_fit(model, 1024)
        found, peak = losses(run), run.peak_bytes - others
        reference = reference or found
        far = max(abs(a / b - 1) for a, b in zip(found, reference))
        yield dict(
            run=name, base=short(dtype), steps=run.steps, losses=(
                f"{found[0]:.4f} to {found[-1]:.4f}"), farthest=far,
            skipped=run.skipped, peak_GB=peak / 1e9,
            predicted_GB=lab.budget(run.steps, dtype) / 1e9,
            slots=f"{before}, then {after}",
            ok=all(map(math.isfinite, found)) and run.skipped >= len(spoiled)
            and (bool(spoiled) or far < 0.02) and after >= before
            and (kind is plain or not lab.on_gpu or peak < T4_BYTES))
        del model, run


@torch.no_grad()
def attention(lab):
    "Does a row see its neighbour, or its padding? In each kernel by itself."
    ids = [lab.rows[i]["input_ids"] for i in (0, 1)]
    first, second = (torch.tensor([r], device=lab.device) for r in ids)
    other, size, pad = first.flip(1), first.shape[1], first.shape[1] // 2
    at = torch.cat([torch.arange(len(r), device=lab.device) for r in ids])
    mask = torch.ones(1, pad + size, dtype=torch.long, device=lab.device)
    mask[:, :pad] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def packed(model, neighbour): # logits of the second row, behind it
        return model(input_ids=torch.cat([neighbour, second], 1),
                     position_ids=at[None], use_cache=False).logits[:, size:]

    def padded(model, neighbour): # logits of a row, behind other padding
        row = torch.cat([neighbour[:, :pad], first], 1)
        return model(input_ids=row, use_cache=False, attention_mask=mask,
                     position_ids=places).logits[:, pad:]

    for dtype in (torch.bfloat16, torch.float16):
        model = merge(lab.base(), dtype)
        alone = {packed: model(input_ids=second, use_cache=False).logits,
                 padded: model(input_ids=first, use_cache=False).logits}
        for kernel in ("FLASH_ATTENTION", "CUDNN_ATTENTION",
                       "EFFICIENT_ATTENTION", "MATH"):
            for layout, truth in alone.items():
                row = dict(kernel=kernel, dtype=short(dtype),
                           layout=layout.__name__)
                try:
                    with sdpa_kernel(getattr(SDPBackend, kernel)):
                        one, two = layout(model, first), layout(model, other)
                except RuntimeError as error: # it may take no mask, or no GQA
                    yield row | dict(note=f"refused: {error}"[:60])
                    continue
                off = ((one - truth).norm() / truth.norm()).item()
                seen = (one - two).abs().max().item()
                yield row | dict(seen=seen, off_alone=off,
                                 ok=seen == 0 and off < 0.05)


def budget(lab):
    "`memory_budget` of one step against the allocator's peak; at most 5 % off."
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        tuned = memory.trainable(lab.fresh(dtype), 16)
        for rows, length in lab.size["shapes"]:
            for checkpointing in (False, True):
                _, _, expected, peak = memory.measure(
                    tuned, rows, length, 16, True, rows > 1, checkpointing,
                    "plain")
                off = expected / peak - 1
                worst = max(worst, abs(off))
                yield dict(dtype=short(dtype), rows=rows, length=length,
                           checkpointing="yes" * checkpointing,
                           predicted_MB=expected / 1e6, measured_MB=peak / 1e6,
                           off=off, worst=worst, ok=abs(off) < 0.05)
        del tuned


def out_of_memory(lab):
    "A GPU too small for eight sequences at once: `train` takes fewer."
    model, sizes = add_lora(lab.fresh()), []
    full = lab.budget(2, compute_dtype(lab.device))
    weights = sum(loaded_bytes(model).values())
    def watch(module, args, given):
        ids, at = given["input_ids"], given.get("position_ids")
        sizes.append(len(ids) if at is None else int((at == 0).sum()))
        if not lab.on_gpu and len(ids) > 4: # a CPU has no such limit
            raise torch.OutOfMemoryError
    model.register_forward_pre_hook(watch, with_kwargs=True)
    with room(0.65 * (full - weights), told=False):
        run = train(model, lab.tokenizer, lab.rows, lab.held,
                    lab.arguments(max_steps=2, eval_strategy="no"))
    yield dict(needed_GB=full / 1e9, steps=run.steps, sequences=sizes,
               room_GB=(weights + 0.65 * (full - weights)) / 1e9,
               ok=run.steps == 2 and sizes[0] == 8 > sizes[-1])


def one_run(base, folder, device, steps, resume):
    "A run in a process of its own; its losses go to disk."
    quiet()
    model, tokenizer = load_base(base, device=device)
    rows, kept, _ = prepare("arithmetic", 120, tokenizer=tokenizer)
    args = sft_config(folder, device, max_steps=steps, warmup_steps=2,
                      eval_steps=steps // 4, save_steps=steps // 4,
                      logging_steps=1, learning_rate=4e-3)
    try: run = train(add_lora(model), tokenizer, rows, kept, args, resume)
    except Stopped: sys.exit(75)
    Path(folder, "losses.json").write_text(json.dumps(losses(run)))


def killed(lab):
    "Runs ended by a signal and resumed, against one that nobody stopped."
    processes, steps = get_context("forkserver"), lab.size["killed"]
    processes.set_forkserver_preload([__name__])
    place, base = lab.folder / "killed", lab.saved() if lab.smoke else "student"
    def start(name, resume):
        child = processes.Process(target=one_run, args=(
            base, str(place / name), lab.device, steps, resume))
        child.start()
        return child
    numbers = dict(SIGTERM=signal.SIGTERM, SIGKILL=signal.SIGKILL)
    children = {name: start(name, False) for name in ("nobody", *numbers)}
    waiting = {*numbers}
    try:
        while waiting: # for a first checkpoint
            time.sleep(0.002)
            for name in [*waiting]:
                if (place / name / f"checkpoint-{steps // 4}").is_dir():
                    os.kill(children[name].pid, numbers[name])
                    waiting.discard(name)
                if not children[name].is_alive(): waiting.discard(name)
        for child in children.values(): child.join()
        status = {name: child.exitcode for name, child in children.items()}
        children = {name: start(name, True) for name in numbers}
        for child in children.values(): child.join()
    finally:
        for child in children.values(): child.kill()
    found = {name: json.loads((place / name / "losses.json").read_text())
             for name in status}
    for name in numbers:
        far = max(abs(a - b) for a, b in zip(found[name], found["nobody"]))
        yield dict(ended_by=name, status=status[name], steps=len(found[name]),
                   farthest_loss=far, ok=bool(status[name]) and far < 0.01
                   and len(found[name]) == steps)


def notebooks(lab):
    "Every notebook on this device, with the student; all at the same time."
    run = "from nbclient.cli import main; main()"
    place, going = lab.folder / "tree", {}
    for name in "nbs", "benchmarks":
        shutil.copytree(ROOT / name, place / name)
    shutil.copy(ROOT / "index.ipynb", place / "nbs") # beside the others
    for path in sorted((place / "nbs").glob(
            lab.size["notebooks"] + ".ipynb")):
        with open(path.with_suffix(".log"), "w") as log:
            going[path] = subprocess.Popen(
                [sys.executable, "-c", run, "--timeout=-1", str(path)],
                stdout=log, stderr=log, start_new_session=True,
                cwd=path.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    start = time.monotonic()
    try:
        while going and time.monotonic() < lab.ends - 5:
            time.sleep(0.2)
            for path in [p for p in going if going[p].poll() is not None]:
                fine = going.pop(path).returncode == 0
                log = path.with_suffix(".log").read_text().strip()
                yield dict(notebook=path.stem, ok=fine,
                           seconds=time.monotonic() - start,
                           note="" if fine else log[-160:])
        for path in going: yield dict(notebook=path.stem,
                                      note="not finished in time")
    finally:
        for process in going.values(): os.killpg(process.pid, signal.SIGKILL)
