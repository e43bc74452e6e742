"""Is everything right on a GPU, and how fast is it there? Half an hour's work.

    python benchmarks/on_cuda.py --pack [FOLDER] [--hub HF_HOME]
    python benchmarks/on_cuda.py --part right|train|decode|all --out FOLDER
    python benchmarks/on_cuda.py --report FOLDER > benchmarks/cuda.md

`--pack` gathers what a GPU machine without a network needs (`cuda_pack.py`)
and prints what to type there. A part (`cuda_right.py`, `cuda_speed.py`) ends
after `--minutes` at the latest, prints each table as soon as it is there, and
keeps FOLDER/PART.json up to date, whatever happens. Weights are random, in the
exact shape of Qwen2.5-1.5B; problems and tokenizer are real. `--smoke` runs
the same functions on a tiny shape, on a CPU too: then no figure means anything.
"""
import argparse, contextlib, json, os, signal, sys, tempfile, time, traceback
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# This file is not called `cuda`: a script's own folder comes first in sys.path,
# and would hide NVIDIA's package of that name.
sys.path.insert(0, str(ROOT))


def parts():
    "Name -> {section: (minutes, what to tell of its rows)}."
    from benchmarks import cuda_right as right, cuda_speed as speed
    return dict(
        right={right.as_on_a_t4: (2.8, list), right.attention: (0.6, list),
               right.budget: (1.0, list), right.out_of_memory: (0.5, list),
               right.killed: (1.1, list), right.notebooks: (2.0, list)},
        train={speed.variants: (5.5, speed.medians),
               speed.recipe: (2.5, list)},
        decode={speed.decoding: (3.8, speed.rates),
                speed.one_step: (0.4, list),
                speed.tour: (3.8, speed.slow_cells)})


class OutOfTime(BaseException): "No Exception, so that nothing catches it."


@contextlib.contextmanager
def within(seconds):
    "Raise OutOfTime when they are over, and again should it get lost."
    def ring(*_): raise OutOfTime
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 15)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(name, sections, lab, minutes, out):
    "Sections in turn; one that ends early leaves its time to the next."
    from benchmarks.cuda_lab import held
    scale = minutes * 60 / sum(share for share, _ in sections.values())
    found = described(lab) | dict(part=name, sections={})
    path, lab.ends = Path(out, f"{name}.json"), time.monotonic()
    for section, (share, summary) in sections.items():
        began, kept = time.monotonic(), dict(rows=[], error="")
        found["sections"][section.__name__] = kept
        lab.ends += share * scale
        def keep():
            kept["seconds"] = time.monotonic() - began
            part = path.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1) + "\n")
            part.replace(path)
        try:
            with within(lab.ends - began):
                for row in section(lab):
                    kept["rows"].append(row)
                    keep()
        except OutOfTime: kept["error"] = "out of time"
        except Exception as error: # the other sections can still be right
            traceback.print_exc()
            kept["error"] = f"{type(error).__name__}: {error}"[:300]
        keep()
        held() # tidy
        print(told(section, kept, summary), flush=True)


def described(lab):
    import torch
    from tiny_reason.lib.card import PACKAGES
    from tiny_reason.lib.device import device_name
    name = device_name(torch.device(lab.device))
    if lab.on_gpu: name += f", {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB"
    return dict(device=name, smoke=lab.smoke,
                versions={p: version(p) for p in PACKAGES})


def told(section, kept, summary):
    "A section as Markdown."
    rows = [*summary(kept["rows"])]
    names = [*dict.fromkeys(k for row in rows for k in row)]
    lines = [f"## {section.__name__}", "", section.__doc__.split("\n")[0], ""]
    if rows: lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(shown(row.get(k)) for k in names)} |"
              for row in rows]
    wrong = sum(row.get("ok") is False for row in rows)
    if wrong: lines += ["", f"**{wrong} of {len(rows)} not as it should be.**"]
    if kept["error"]: lines += ["", f"**Stopped: {kept['error']}**"]
    return "\n".join([*lines, "", f"{kept['seconds']:.0f} s", ""])


def shown(value):
    if isinstance(value, bool): return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else " ".join(str(value).split()).replace(
        "|", "/")


def report(folder):
    "The parts that are in a folder, as one page."
    lines = ["# On a GPU", ""]
    for name, sections in parts().items():
        path = Path(folder, f"{name}.json")
        if not path.is_file(): continue
        found = json.loads(path.read_text())
        versions = ", ".join(f"{p} {v}" for p, v in found["versions"].items())
        lines += [f"`python benchmarks/on_cuda.py --part {name}` on "
                  f"{found['device']}; {versions}."
                  + " **Smoke: no figure means anything.**" * found["smoke"],
                  ""]
        lines += [told(s, found["sections"][s.__name__], summary)
                  for s, (_, summary) in sections.items()
                  if s.__name__ in found["sections"]]
    return "\n".join(lines)


def run(options):
    os.environ |= dict(TQDM_DISABLE="1", MPLBACKEND="agg", HF_HUB_OFFLINE="1",
                       KINETO_LOG_LEVEL="99",
                       PYTHONPATH=os.pathsep.join(sys.path))
    import torch
    from benchmarks.cuda_lab import Lab, quiet
    if not (options.smoke or torch.cuda.is_available()): raise SystemExit(
        "There is no CUDA device here; without one, only --smoke runs.")
    quiet()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    chosen = parts()
    for name in [*chosen] if options.part == "all" else [options.part]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            run_part(name, chosen[name], Lab(options.smoke, scratch),
                     options.minutes, options.out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", choices=["right", "train", "decode", "all"])
    what.add_argument("--pack", nargs="?", metavar="FOLDER",
                      const=str(ROOT / "_build" / "cuda"))
    what.add_argument("--report", metavar="FOLDER")
    parser.add_argument("--out", default="_build/cuda_out", help="of a part")
    parser.add_argument("--minutes", type=float, default=8, help="of a part, "
                        "from when its data is prepared")
    parser.add_argument("--smoke", action="store_true")
    packing = parser.add_argument_group("for --pack")
    packing.add_argument("--hub", default=os.environ.get(
        "HF_HOME", "~/.cache/huggingface"), help="a Hugging Face home with "
        "GSM8K and Qwen2.5's tokenizer; default: $HF_HOME")
    packing.add_argument("--there", metavar="FILE", help="what the machine "
                         "has, as `pip list --format=freeze` prints it")
    packing.add_argument("--python", default="3.12", help="of the machine")
    packing.add_argument("--platform", nargs="+", help="pip's tags; default: "
                         "manylinux of x86_64")
    packing.add_argument("--cuda", default="130", help="library that "
                         "bitsandbytes keeps; 130: of CUDA 13.0")
    packing.add_argument("--limit", type=float, default=64, help="in MiB")
    packing.add_argument("--wheelhouse", help="a folder instead of an index")
    options = parser.parse_args(argv)
    if options.report: print(report(options.report))
    elif options.pack:
        from benchmarks.cuda_pack import pack
        print(pack(options.pack, Path(options.hub).expanduser(), options.there,
                   options.python, options.platform, options.cuda,
                   options.limit, options.wheelhouse))
    else: run(options)


if __name__ == "__main__": main()
