"""Parts *train* and *decode* of `on_cuda.py`: rows, and what is told of them."""
import contextlib, importlib.util, json, math, statistics, tempfile, time
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import ContinuousBatchingConfig, StaticCache

import tiny_reason.data
from benchmarks import generate, train as columns
from benchmarks.cuda_lab import beside, held, like_a_t4
from tiny_reason.data import build_prompt, encode, load_problems
from tiny_reason.lib.decode import end_ids, generate_ids
from tiny_reason.model import add_lora, compute_dtype, load_base, merge
from tiny_reason.train import RECIPE, sft_config, train

ROOT, RATE = Path(__file__).resolve().parents[1], 2e-4


def by_way(rows):
    ways = {}
    for row in rows: ways.setdefault(row["way"], []).append(row)
    return ways


# --- training ----------------------------------------------------------------

def variants(lab):
    "Twenty steps on the same rows, in turn; non-padding tokens a second."
    size, steps, plain = lab.size, lab.size["steps"], contextlib.nullcontext
    def made(): return columns.columns(lab.device, RATE, steps)
    ways = {name: (plain, name, lab.fresh) for name in made()}
    ways["ours, one row, as on a T4"] = like_a_t4, "ours, one row", lab.fresh
    if importlib.util.find_spec("unsloth"):
        ways["ours, padded, by Unsloth"] = plain, "ours, padded", lambda _: (
            load_base(lab.saved(), backend="unsloth")[0])
    for turn in range(size["rounds"]):
        for way, (kind, column, base) in ways.items():
            with kind(): dtype = compute_dtype(lab.device)
            lab.base(dtype) # its bytes are not the run's
            with kind():
                model = base(dtype)
                others, (grouped, make) = beside(model), made()[column]
                one = columns.measure(make, grouped, model, lab.tokenizer,
                                      lab.rows, steps, size["warm"])
            del model
            yield dict(round=turn + 1, way=way, tokens=one["tokens"],
                       seconds=one["seconds"], losses=one["losses"],
                       peak_GB=(one["peak"] - others) / 1e9,
                       ok=all(map(math.isfinite, one["losses"])))


def medians(rows):
    "A line for each way: the median of its rounds, and its ratios."
    ways = by_way(rows)
    speeds = {way: [r["tokens"] / r["seconds"] for r in found]
              for way, found in ways.items()}
    middle = {way: statistics.median(s) for way, s in speeds.items()}
    plain, tuned = [*middle.values(), math.nan][:2]
    for way, found in ways.items():
        yield {"way": way, "rounds": len(found), "tokens/s": middle[way],
               "lowest": min(speeds[way]), "highest": max(speeds[way]),
               "times plain": middle[way] / plain,
               "times tuned": middle[way] / tuned,
               "peak_GB": max(r["peak_GB"] for r in found),
               "last loss": found[0]["losses"][-1],
               "ok": all(r["ok"] for r in found)}


def recipe(lab):
    "The whole recipe, with validation and checkpoints."
    steps = lab.size["recipe"]
    lab.base() # its bytes are not the run's
    model = add_lora(lab.fresh())
    others, every = beside(model), max(1, steps // 5)
    run = train(model, lab.tokenizer, lab.rows, lab.held, sft_config(
        str(lab.folder / "recipe"), lab.device, max_steps=steps,
        eval_steps=every, save_steps=every))
    peak = run.peak_bytes - others
    predicted = lab.budget(steps, compute_dtype(lab.device))
    yield {"steps": run.steps, "seconds": run.seconds, "tokens": run.tokens,
           "tokens/s": run.tokens_per_second, "peak_GB": peak / 1e9,
           "predicted_GB": predicted / 1e9, "off": predicted / peak - 1,
           "skipped": run.skipped, "best_loss": run.best_loss,
           "ok": run.steps == steps}


# --- decoding ----------------------------------------------------------------

ZERO = 100 # ids below may end an answer


def count_down(model, stop):
    """Make answers as long as the last id of their prompt says.

    Whatever the model has worked out, the likeliest token is the last one
    less 1, and behind ZERO + 1 the end. So random weights do real work."""
    after = torch.arange(-1, model.config.vocab_size - 1, device=model.device)
    after[:ZERO + 2] = stop
    def force(module, args, given, out):
        ids = given["input_ids"] if "input_ids" in given else args[0]
        where = given.get("logits_to_keep") # a number, or places in a row
        last = (ids[:, where] if torch.is_tensor(where)
                else ids[:, -out.logits.shape[1]:])
        out.logits.scatter_(-1, after[last][..., None], 1e4)
    return model.register_forward_hook(force, with_kwargs=True)


def asked(lab, n): # prompts, and how many tokens each answer takes
    "Test problems; the answers as long as the written solutions."
    rows = load_problems(lab.source, split="test", n=n)
    prompts = [build_prompt(r["question"], lab.tokenizer) for r in rows]
    lengths = [len(encode(r, lab.tokenizer)["input_ids"]) - len(p)
               for r, p in zip(rows, prompts)]
    return [p + [ZERO + n] for p, n in zip(prompts, lengths)], lengths


def decoding(lab):
    "Answers of real lengths: alone, in batches, in slots that are refilled."
    size, limit, tokenizer = lab.size, lab.size["limit"], lab.tokenizer
    nf4, merged = lab.fresh(), merge(lab.base())
    stop = end_ids(merged, tokenizer)[0]
    for model in nf4, merged: count_down(model, stop)
    prompts, lengths = asked(lab, max(4 * max(size["slots"]), size["static"]))
    def batches(model, n): return lambda some: generate.padded(
        model, tokenizer, some, limit, n)
    def slots(n): return lambda some: generate_ids(merged, tokenizer, some,
                                                   limit, n)
    def paged(some): # left alone, it takes nine tenths of all memory
        blocks = sum(-(-(len(p) + limit) // 256) for p in some)
        return generate.continuous(merged, tokenizer, some, limit,
                                   ContinuousBatchingConfig(
                                       num_blocks=blocks,
                                       max_batch_tokens=4096))
    ways = {"one at a time, NF4": (size["alone"], batches(nf4, 1)),
            "one at a time, merged": (size["alone"], batches(merged, 1)),
            "batches of 32, transformers": (size["static"],
                                            batches(merged, 32))}
    ways |= {f"ours, {n} slots": (4 * n, slots(n)) for n in size["slots"]}
    ways["continuous batching, transformers"] = size["static"], paged
    for turn in range(size["rounds"]):
        for way, (n, decode) in ways.items():
            row = dict(round=turn + 1, way=way, problems=len(prompts[:n]))
            held() # tidy
            lab.wait()
            start = time.perf_counter()
            try:
                with torch.no_grad(): answers = decode(prompts[:n])
            except Exception as error: # others' code may not run on every GPU
                yield row | dict(note=f"{type(error).__name__}: {error}"[:90])
                continue
            lab.wait()
            seconds = time.perf_counter() - start
            found = [len(a) + (a[-1] != stop) for a in answers]
            yield row | dict(seconds=seconds, tokens=sum(found),
                             ok=found == lengths[:n])


def rates(rows):
    "A line for each way: its fastest round, and its ratio to one at a time."
    def rate(found): return max((r["tokens"] / r["seconds"] for r in found
                                 if "tokens" in r), default=math.nan)
    alone = rate(rows[:1])
    for way, found in by_way(rows).items():
        yield {"way": way, "rounds": len(found),
               "problems": found[0]["problems"], "tokens/s": rate(found),
               "times alone in NF4": rate(found) / alone,
               "ok": all(r.get("ok") for r in found),
               "note": found[0].get("note", "")}


@torch.no_grad()
def one_step(lab):
    "A token for each of some rows: driven by Python, and as a CUDA graph."
    model, length = merge(lab.base()), 256
    for rows in lab.size["together"]:
        cache = StaticCache(config=model.config, max_cache_len=length)
        ids = torch.ones(rows, 1, dtype=torch.long, device=lab.device)
        given = dict(input_ids=ids, position_ids=ids, past_key_values=cache,
                     use_cache=True, attention_mask=torch.ones(
                         rows, 1, 1, length, dtype=torch.bool,
                         device=lab.device))
        def step(): model(**given)
        def milliseconds(run, times):
            lab.wait()
            start = time.perf_counter()
            for _ in range(times): run()
            lab.wait()
            return (time.perf_counter() - start) / times * 1e3
        milliseconds(step, 3) # to warm up
        row = dict(rows=rows, cache=length, python_ms=milliseconds(step, 20))
        if lab.on_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph): step()
            row["graph_ms"] = milliseconds(graph.replay, 20)
            del graph
        yield row | dict(ok=True)


def tour(lab):
    """The code cells of index.ipynb in Qwen's shape, from first to last.

    Random weights end no answer, so each takes the limit: the seconds of
    evaluation are an upper bound."""
    lab.kept.clear()
    cells = json.loads((ROOT / "index.ipynb").read_text())["cells"]
    choice, space, heading = "name, why = choose()", {}, ""
    def few(source, subset="main", split="train", n=None, seed=3407):
        return load_problems("arithmetic", "main", split, min(n or 4, 4), seed)
    with contextlib.ExitStack() as stack:
        lab.saved()
        stack.enter_context(contextlib.chdir(
            tempfile.mkdtemp(dir=lab.folder)))
        if lab.smoke:
            stack.enter_context(patch.object(tiny_reason.data, "load_problems",
                                             few))
            stack.enter_context(patch.dict(RECIPE, max_steps=2, eval_steps=1,
                                           save_steps=1))
        log = stack.enter_context(open("log", "w"))
        for number, cell in enumerate(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                titles = [line.lstrip("# ") for line in source.split("\n")
                          if line.startswith("#")]
                heading = (titles or [heading])[-1]
                continue
            source = source.replace(choice, f"name, why = {lab.path!r}, ''")
            code = compile(source, f"index.ipynb, cell {number}", "exec")
            start = time.perf_counter()
            with contextlib.redirect_stdout(log), \
                    contextlib.redirect_stderr(log): exec(code, space)
            lab.wait()
            yield dict(cell=number, heading=heading,
                       seconds=time.perf_counter() - start)
    run = space["run"]
    yield dict(cell="all", ok=space["name"] == lab.path, note=(
        f"training {run.seconds:.0f} s, {run.tokens_per_second:,.0f} tokens/s"))


def slow_cells(rows):
    "The cells that take longer than a second, and the last line."
    return [r for r in rows if r.get("seconds", 2) > 1]
