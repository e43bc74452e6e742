"""How large the rooms of this house are: one table, from the sources alone.

    python benchmarks/house.py [FOLDER ...]

A folder is a checkout; several give a column each, so that what a change of
walls did can be seen. Nothing of the project is imported or run."""
import argparse
import ast
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median, quantiles

HERE = Path(__file__).parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SHELVES = ("lib", "app")


def modules(root):
    "Exported modules: {dotted name: syntax tree and number of lines}."
    package = root / "tiny_reason"
    found = {}
    for path in sorted(package.rglob("*.py")):
        if path.name.startswith("_"): continue
        text = path.read_text(encoding="utf-8")
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        found[name] = ast.parse(text), len(text.splitlines())
    return found


def code_cells(path):
    "Sources of a notebook's code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def is_exported(source):
    return bool(re.match(r"(#\|.*\n)*#\| *export", source))


def lessons(root):
    return sorted((root / "nbs").glob("[0-9]*.ipynb"))


def exported_cells(root):
    "Lines of code in each exported cell of the lessons, imports left out."
    found = [source for path in lessons(root) for source in code_cells(path)
             if is_exported(source)]
    return [sum(1 for line in source.splitlines()
                if line.strip() and line[:2] != "#|") for source in found
            if not all(isinstance(node, (ast.Import, ast.ImportFrom))
                       for node in ast.parse(source).body)]


def crowded_cells(root):
    """Exported cells of lessons with several definitions for others to use.

    A cell is one step: one definition that something outside of it names, and
    those that it alone needs. Cutting a function in two does not help: neither
    does it hurt, unless the second half has a reader of its own."""
    notebooks = [*(root / "nbs").rglob("*.ipynb"), root / "index.ipynb"]
    others = [p.read_text(encoding="utf-8") for folder in ("tests",
              "benchmarks") for p in (root / folder).glob("*.py")]
    words = [set(re.findall(r"\w+", text)) for text in (
        *others, *(source for p in notebooks for source in code_cells(p)))]
    named = Counter(word for some in words for word in some)
    found = []
    for path in lessons(root):
        for source in filter(is_exported, code_cells(path)):
            public = [node.name for node in ast.parse(source).body
                      if isinstance(node, (*FUNCTIONS, ast.ClassDef))
                      and named[node.name] > 1]
            if len(public) > 1: found.append((path.stem, public))
    return found


def definitions(trees):
    "Functions at the top of modules: {name: modules that define it}."
    found = defaultdict(list)
    for module, (tree, _) in trees.items():
        for node in tree.body:
            if isinstance(node, FUNCTIONS): found[node.name].append(module)
    return found


def mentions(trees):
    "How often each name is used, definitions and imports not counted."
    count = Counter()
    for tree, _ in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name): count[node.id] += 1
            elif isinstance(node, ast.Attribute): count[node.attr] += 1
    return count


def shelf(module):
    "lib, app, or lesson."
    first = module.partition(".")[0]
    # `cli` lies at the top because its name is in `console_scripts`
    return "app" if first in ("app", "cli") else (
        first if first in SHELVES else "lesson")


def imports(trees):
    "Pairs (importing module, imported module) inside the package."
    for module, (tree, _) in trees.items():
        here = ["tiny_reason", *module.split(".")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named = [a.name.partition(".")[2] for a in node.names
                         if a.name.startswith("tiny_reason.")]
                yield from ((module, name) for name in named if name in trees)
            if not isinstance(node, ast.ImportFrom): continue
            start = here[:len(here) - node.level] if node.level else []
            path = [*start, *(node.module or "").split(".")]
            if path[0] != "tiny_reason": continue
            named = [".".join(path[1:]), *(
                ".".join([*path[1:], a.name]).strip(".") for a in node.names)]
            yield from ((module, name) for name in named if name in trees)


def forbidden(trees):
    "Imports against the rule: lib imports no lesson, nothing imports app."
    return sorted({(a, b) for a, b in imports(trees) if shelf(a) != shelf(b)
                   and (shelf(b) == "app" or shelf(a) == "lib")})


def several(values, percent):
    return quantiles(values, n=100)[percent - 1] if len(values) > 1 else 0


def tests_of(root):
    "Test functions under tests/, and asserting cells of notebooks."
    functions = sum(
        len(re.findall(r"^\s*(?:async )?def test_", p.read_text(), re.M))
        for p in (root / "tests").glob("test_*.py"))
    cells = sum(bool(re.search(r"^(assert |test_\w+\(|with expect_fail)",
                               "".join(c["source"]), re.M))
                for p in [*(root / "nbs").rglob("*.ipynb"),
                          root / "index.ipynb"]
                for c in json.loads(p.read_text())["cells"]
                if c["cell_type"] == "code")
    return functions, cells


def measure(root):
    "All rows of one checkout: {what: text}."
    trees, cells = modules(root), exported_cells(root)
    lines = {name: n for name, (_, n) in trees.items()}
    defined, used = definitions(trees), mentions(trees)
    once = [n for n in defined if used[n] == 1]
    twice = [n for n, where in defined.items() if len(where) > 1]
    bodies = [node.end_lineno - node.lineno + 1 for tree, _ in trees.values()
              for node in tree.body if isinstance(node, FUNCTIONS)]
    wide = [node.name for tree, _ in trees.values() for node in ast.walk(tree)
            if isinstance(node, FUNCTIONS) and len(
                node.args.args) + len(node.args.kwonlyargs) > 6]
    longest = max(lines, key=lines.get)
    functions, asserting = tests_of(root)
    return {
        "modules": f"{len(lines)}",
        "lines of modules": f"{sum(lines.values()):,}",
        "a module's lines, median": f"{median(lines.values()):.0f}",
        "longest module": f"{lines[longest]} ({longest})",
        "modules above 400 lines": ", ".join(
            f"{m} {n}" for m, n in lines.items() if n > 400) or "none",
        "exported cells of lessons": f"{len(cells)}",
        "their lines, median": f"{median(cells):.0f}",
        "their lines, 90th percentile": f"{several(cells, 90):.0f}",
        "their lines, most": f"{max(cells)}",
        "exported cells of lessons with several public definitions":
            f"{len(crowded_cells(root))}",
        "functions at the top of modules": f"{len(bodies)}",
        "a function's lines, median": f"{median(bodies):.0f}",
        "functions used once": f"{len(once)}",
        "functions of more than 6 parameters": f"{len(wide)}",
        "function names defined twice": ", ".join(sorted(twice)) or "none",
        "imports across shelves against the rule": ", ".join(
            f"{a} → {b}" for a, b in forbidden(trees)) or "none",
        "test functions in tests/": f"{functions}",
        "asserting cells of notebooks": f"{asserting}",
        "lines of tests/": f"{sum(len(p.read_text().splitlines()) for p in (root / 'tests').glob('*.py')):,}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[HERE])
    folders = parser.parse_args().folders
    for folder in folders:
        if not (folder / "nbs").is_dir():
            sys.exit(f"{folder} is no checkout: it has no nbs/")
    columns = [measure(folder) for folder in folders]
    print("| | " + " | ".join(folder.resolve().name for folder in folders)
          + " |\n" + "|---" * (1 + len(folders)) + "|")
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(c[row] for c in columns) + " |")


if __name__ == "__main__": main()
