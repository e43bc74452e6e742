"Execute index.ipynb with its progress in the terminal; the work of `make run`."
import json
import re
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


def execute():
    "Run the page in a fresh kernel; write it to `_build/` as notebook and HTML."
    nb = nbformat.read("index.ipynb", as_version=4)
    total = len(nb.cells)
    seen = []

    def announce(cell, cell_index):
        title = heading(nb, cell_index)
        if title not in seen:
            seen.append(title)
            print(f"[{cell_index + 1:2}/{total}] {title}", file=sys.stderr)

    client = TerminalClient(nb, timeout=None, kernel_name="python3",
                            on_cell_start=announce)
    try: client.execute()
    except CellExecutionError as error:
        sys.exit(f"index.ipynb stopped: {error.ename}: {error.evalue}")
    BUILD.mkdir(exist_ok=True)
    # The progress bars were for the terminal, not for the page.
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    page, _ = HTMLExporter(embed_images=True).from_notebook_node(nb)
    (BUILD / "index.html").write_text(page)


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
    "README.md and its picture from the committed index.ipynb."
    nb = nbformat.read("index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    text, resources = MarkdownExporter().from_notebook_node(
        nb, {"output_files_dir": "README_files", "unique_key": "index"})
    for name, data in resources["outputs"].items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    Path("README.md").write_text(text.strip() + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--readme"]: sys.exit(render_readme())
    execute()
    result = json.loads((BUILD / "run.json").read_text())
    print("\n" + table(result))
    print(f"\ntrained in {result['train_seconds']:.0f} s at "
          f"{result['tokens_per_second']:,.0f} tokens/s, "
          f"peak memory {result['peak_bytes'] / 1e6:,.0f} MB")
    print(f"page: {BUILD / 'index.html'}   figures: {BUILD / 'run.json'}")
