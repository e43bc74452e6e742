"Execute notebooks with their progress in the terminal: `make run`, `make notebooks`."
import copy
import html
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter, MarkdownExporter

BUILD = Path("_build")


class TerminalClient(NotebookClient):
    "Passes on what a cell prints while it is still running."

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            sys.stderr.write(msg["content"]["text"])
            sys.stderr.flush()
        return super().process_message(msg, cell, cell_index)


def heading(nb, index):
    "The last heading before a cell."
    for cell in reversed(nb.cells[:index]):
        found = re.findall(r"^#+ (.+)$", cell.source, re.M)
        if cell.cell_type == "markdown" and found: return found[-1]
    return ""


def execute(path):
    "Run a notebook in a fresh kernel; its progress bars are not kept."
    if not sys.stderr.isatty(): os.environ["TQDM_MININTERVAL"] = "5"
    nb = nbformat.read(path, as_version=4)
    seen = []

    def announce(cell, cell_index):
        title = heading(nb, cell_index)
        if title not in seen:
            seen.append(title)
            print(f"[{cell_index + 1:2}/{len(nb.cells)}] {title}",
                  file=sys.stderr)

    client = TerminalClient(
        nb, timeout=None, kernel_name="python3", on_cell_start=announce,
        resources={"metadata": {"path": str(path.parent)}})
    try: client.execute()
    except CellExecutionError as error:
        sys.exit(f"{path} stopped: {error.ename}: {error.evalue}")
    for cell in nb.cells:
        # What cannot be drawn does not fail its cell; it fails the page.
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                sys.exit(f"{path} shows an error: {output.ename}: "
                         f"{output.evalue}")
    drop_bars(nb)
    return nb


def drop_bars(nb):
    "Take progress bars out: without a kernel they stand still at 0 %."
    view, state = (f"application/vnd.jupyter.widget-{kind}+json"
                   for kind in ("view", "state"))

    def is_bar(output):
        data = output.get("data", {})
        return output.get("name") == "stderr" or view in data and bool(
            re.search(r"\[\d\d:\d\d[<,]", data.get("text/plain", "")))

    shown = []
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        cell.outputs = [o for o in cell.outputs if not is_bar(o)]
        shown += [o for o in cell.outputs if view in o.get("data", {})]
    if not shown: nb.metadata.get("widgets", {}).pop(state, None)
    if not nb.metadata.get("widgets", True): del nb.metadata["widgets"]


def run():
    "Execute the tour into `_build/` and print its result."
    nb = execute(Path("index.ipynb"))
    write_page(nb, "index")
    result = json.loads((BUILD / "run.json").read_text())
    print("\n" + table(result))
    print(f"\ntrained in {result['train_seconds']:.0f} s at "
          f"{result['tokens_per_second']:,.0f} tokens/s, "
          f"peak memory {result['peak_bytes'] / 1e6:,.0f} MB")
    print(f"page: {BUILD / 'index.html'}   figures: {BUILD / 'run.json'}")


def write_page(nb, stem):
    "A page of an executed notebook for reading; controls need a kernel."
    nb = copy.deepcopy(nb)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    nb.metadata.pop("widgets", None) # their JavaScript comes from a CDN
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if "application/vnd.jupyter.widget-view+json" in output.get(
                    "data", {}):
                output["data"] = {"text/plain":
                                  "(controls, alive where a kernel runs)"}
    BUILD.mkdir(exist_ok=True)
    page, _ = HTMLExporter(embed_images=True).from_notebook_node(nb)
    (BUILD / f"{stem}.html").write_text(page)


def keep(names):
    "Execute notebooks in place and render README.md; for `make notebooks`."
    for name in map(Path, names):
        nb = execute(name)
        nbformat.write(nb, name)
        write_page(nb, name.stem)
    render_readme()


def table(result):
    "The result as a plain-text table."
    rows = [("group", "model", "n", "right", "accuracy", "95 % interval")]
    for group, cells in result["groups"].items():
        for model, c in cells.items():
            if model == "mcnemar_p": continue
            rows.append((group, model, str(c["n"]), str(c["correct"]),
                         f"{c['accuracy']:.1%}",
                         f"{c['low']:.1%} to {c['high']:.1%}"))
        rows.append((group, "tuned against base_best: McNemar p = "
                     f"{cells['mcnemar_p']:.2g}", "", "", "", ""))
    widths = [10, 10, 4, 6, 9, 0]
    return "\n".join("  ".join(f"{v:<{w}}" for v, w in zip(row, widths)).rstrip()
                     for row in rows)


def render_readme():
    "README.md and its pictures: texts and outputs of the committed tour."
    nb = nbformat.read("index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells
                if not c.source.startswith(("#| hide", "#| readme: false"))]
    text, resources = MarkdownExporter(exclude_input=True).from_notebook_node(
        nb, {"output_files_dir": "README_files", "unique_key": "index"})
    shutil.rmtree("README_files", ignore_errors=True)
    for name, data in resources["outputs"].items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    # GitHub shows the text of a style element instead of obeying it.
    text = re.sub(r"<style scoped>.*?</style>\n?", "", text, flags=re.S)
    for cell in nb.cells:
        told = [o.get("metadata", {}).get("image/png", {}).get("alt")
                for o in cell.get("outputs", [])]
        for alt in [*re.findall(r"^# alt: (.+)$", cell.source, re.M),
                    *(html.escape(alt) for alt in told if alt)]:
            text = text.replace("![png]", f"![{alt}]", 1)
    note = "<!-- Rendered from index.ipynb by `make notebooks`. -->\n"
    Path("README.md").write_text(note + text.strip() + "\n")


if __name__ == "__main__":
    keep(sys.argv[1:]) if sys.argv[1:] else run()
