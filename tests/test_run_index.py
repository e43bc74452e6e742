"`make run` and `make notebooks`: what they print, and what README.md is."
import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("run_index", ROOT / "run_index.py")
run_index = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_index)


def test_readme_is_rendered_from_the_tour(tmp_path, monkeypatch):
    shutil.copy(ROOT / "index.ipynb", tmp_path)
    monkeypatch.chdir(tmp_path)
    run_index.render_readme()
    assert Path("README.md").read_text() == (ROOT / "README.md").read_text()
    for made, kept in ((tmp_path, ROOT), (ROOT, tmp_path)):
        for file in (made / "README_files").iterdir():
            assert file.read_bytes() == (kept / "README_files" / file.name
                                         ).read_bytes()


def test_a_picture_keeps_its_words(tmp_path, monkeypatch):
    "A drawing brings its text along; a plot has it in a comment."
    def shown(**metadata):
        return new_output("display_data", {"image/png": "iVBORw0KGgo="},
                          metadata={"image/png": metadata})
    monkeypatch.chdir(tmp_path)
    nbformat.write(new_notebook(cells=[
        new_code_cell("draw()", outputs=[shown(alt="a <b> drawing", width=7)]),
        new_code_cell("# alt: a plot\nplot()", outputs=[shown()])]),
        "index.ipynb")
    run_index.render_readme()
    found = re.findall(r"!\[(.*?)\]", Path("README.md").read_text())
    assert found == ["a &lt;b&gt; drawing", "a plot"]


def test_heading():
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[
        code("# no heading"), markdown("# One\n\ntext\n\n## Two"), code("1"),
        markdown("no heading"), markdown("### Three"), code("# Four")])
    assert [run_index.heading(nb, i) for i in range(6)] == [
        "", "", "Two", "Two", "Two", "Three"]


def test_table():
    cell = dict(n=100, correct=9, accuracy=0.09, low=0.048, high=0.162)
    lines = run_index.table(dict(groups=dict(
        taught=dict(base=cell, tuned=cell, mcnemar_p=0.0312)))).split("\n")
    assert [line.split() for line in lines] == [
        "group model n right accuracy 95 % interval".split(),
        "taught base 100 9 9.0% 4.8% to 16.2%".split(),
        "taught tuned 100 9 9.0% 4.8% to 16.2%".split(),
        "taught tuned against base_best: McNemar p = 0.031".split()]
    assert len({line.index("100") for line in lines[1:3]}) == 1


def test_what_fails_in_a_cell_ends_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "5") # as `execute` may set it
    path = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(SystemExit, match="stopped: ZeroDivisionError"):
        run_index.execute(path)


def test_bars_are_no_part_of_a_page():
    "A bar of a library would stand still at 0 % where no kernel runs."
    view = "application/vnd.jupyter.widget-view+json"
    def shown(text):
        return new_output("display_data", {"text/plain": text, view: {}})
    bars = [shown("Loading weights:   0%|     | 0/49 [00:00<?, ?it/s]"),
            shown("0it [00:00, ?it/s]")]
    kept = [shown("VBox(children=(IntSlider(value=16),))"),
            new_output("stream", name="stdout", text="loss 0.1\n")]
    nb = new_notebook(cells=[new_code_cell(outputs=[*bars, *kept])])
    nb.metadata["widgets"] = {view.replace("view", "state"): {"state": {}}}
    run_index.drop_bars(nb)
    assert nb.cells[0].outputs == kept and "widgets" in nb.metadata
    nb.cells[0].outputs = bars
    run_index.drop_bars(nb)
    assert not nb.cells[0].outputs and "widgets" not in nb.metadata
