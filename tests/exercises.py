"""Prove the exercises: `make exercises`.

Of each exercise in nbs/exercises the stub must fail its check, the solution
must pass, and each of two or more wrong solutions must be refused by the check
in the words that stand beside it. How cells find each other is told in
CONTRIBUTING.md. No kernel is started: cells are executed here, one namespace
for each attempt."""
import ast
import json
import re
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "nbs" / "exercises"


def code(path):
    "Sources of the code cells, without the installation for Colab."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [source for source in sources if not source.startswith("#| hide")]


def bound(source):
    "Names that a cell gives a value or a function at its top level."
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        if isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))


def tasks(cells):
    "Of exercises: (cells before the first, {name: (stub, check)})."
    checks = {name.removeprefix("check_"): cell for cell in cells
              for name in bound(cell) if name.startswith("check_")}
    stubs, others = {}, []
    for cell in cells:
        if cell in checks.values(): continue
        names = checks.keys() & {*bound(cell)}
        if not names: others.append(cell)
        for name in names:
            if name in stubs: raise ValueError(f"{name} has two stubs")
            stubs[name] = cell
    if alone := checks.keys() - stubs.keys():
        raise ValueError(f"no stub for {', '.join(sorted(alone))}")
    return others, {name: (stubs[name], checks[name]) for name in checks}


def answers(cells, names):
    "Of solutions: (other cells, {name: (solutions, wrong solutions)})."
    found, others = {name: ([], []) for name in names}, []
    for cell in cells:
        name = next((n for n in bound(cell) if n in found), None)
        wrong = cell.startswith("# wrong: ")
        if name: found[name][wrong].append(cell)
        elif wrong: raise ValueError(f"no exercise for {cell[:70]!r}")
        else: others.append(cell)
    return others, found


def complaint(space, *cells):
    "What the last cell raises after the others; None if it passes."
    space = dict(space)
    try:
        for cell in cells: exec(compile(cell, "exercise", "exec"), space)
    except Exception as error: return error


def is_refusal(error): return type(error) is AssertionError and str(error)


def faults_of(space, stub, check, right, wrong):
    "What is not as promised of one exercise."
    error = complaint(space, stub, check)
    if not is_refusal(error): yield f"the stub is not refused: {error!r}"
    if len(right) != 1: yield f"{len(right)} solutions instead of one"
    for cell in right:
        if error := complaint(space, cell, check):
            yield f"the solution fails: {error!r}"
    if len(wrong) < 2: yield f"{len(wrong)} wrong solutions, two are needed"
    for cell in wrong:
        error, mistake = complaint(space, cell, check), cell.split("\n")[0]
        says = re.match(r"# wrong: .+\n# says: (.+)", cell)
        if not is_refusal(error):
            yield f"{mistake}: not refused by the check: {error!r}"
        elif not says or says[1] not in str(error):
            yield f"{mistake}: `# says:` should quote {str(error)!r}"


def prove(path):
    "(exercises, wrong solutions, faults) of a notebook and its solutions."
    space = {}
    try:
        setup, exercises = tasks(code(path))
        for cell in setup: exec(compile(cell, path.name, "exec"), space)
        beside = path.parent / "solutions" / path.name
        others, found = answers(code(beside), exercises)
        if others != setup: raise ValueError("exercises and solutions do not "
                                             "begin with the same cells")
        if not exercises: raise ValueError("no exercise")
    except Exception as error: return 0, 0, [f"{type(error).__name__}: {error}"]
    faults = [f"{name}: {fault}" for name in exercises
              for fault in faults_of(space, *exercises[name], *found[name])]
    return len(exercises), sum(len(w) for _, w in found.values()), faults


def main(folder=FOLDER):
    "Print a line for each notebook; True if an exercise is not as promised."
    total = refused = failed = 0
    notebooks = {p.name for p in (*folder.glob("*.ipynb"),
                                  *folder.glob("solutions/*.ipynb"))}
    for name in sorted(notebooks):
        start = time.perf_counter()
        n, wrong, faults = prove(folder / name)
        total, refused, failed = total + n, refused + wrong, failed + len(faults)
        print(f"{name[:-6]:16} {n} exercises, {wrong:2} wrong solutions, "
              f"{time.perf_counter() - start:4.1f} s", *faults, sep="\n  ")
    if failed or not total: print(f"{failed} faults in {total} exercises")
    else: print(f"{total} exercises: {total} stubs fail, {total} solutions "
                f"pass, {refused} wrong solutions fail")
    return bool(failed or not total)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
