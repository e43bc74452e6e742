"Where things belong: the rules of CONTRIBUTING, read from the sources."
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = runpy.run_path(str(ROOT / "benchmarks" / "house.py"))


def forbidden(root): return HOUSE["forbidden"](HOUSE["modules"](root))


def test_lib_imports_no_lesson_and_nothing_imports_app():
    assert forbidden(ROOT) == []


@pytest.mark.parametrize("file, line", [
    ("lib/disk.py", "from ..data import prepare"),
    ("lib/disk.py", "from tiny_reason import eval"),
    ("lib/disk.py", "def f():\n    from ..train import train"),
    ("lib/disk.py", "import tiny_reason.rwkv"),
    ("data.py", "from .app.flags import parse"),
    ("eval.py", "from tiny_reason.cli import main")])
def test_a_forbidden_import_is_seen(file, line, copy):
    path = copy / "tiny_reason" / file
    before = path.read_text()
    path.write_text(f"{before}\n{line}\n")
    try: assert len(forbidden(copy)) == 1
    finally: path.write_text(before)


def test_a_lessons_cell_is_one_step():
    assert HOUSE["crowded_cells"](ROOT) == []


def test_a_crowded_cell_is_seen(tmp_path):
    for folder in ("nbs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "index.ipynb", tmp_path)
    lesson = tmp_path / "nbs" / "03_eval.ipynb"
    text = lesson.read_text()
    cell = re.search(r'"#\| export\\n",\n    "def \w+', text)
    lesson.write_text(text.replace(cell[0], cell[0].replace(
        '"def ', '"def perplexity(x): return x\\n",\n    "\\n",\n    "def ')))
    assert [name for name, _ in HOUSE["crowded_cells"](tmp_path)] == ["03_eval"]


def test_the_table_of_rooms_is_complete():
    told = (ROOT / "CONTRIBUTING.md").read_text()
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        if name.startswith("exercises/"): # a room for each lesson
            assert (ROOT / "nbs" / path.name).exists(), f"no lesson for {name}"
            name = f"{name.rpartition('/')[0]}/NN_name"
        assert f"`{name}`" in told, f"CONTRIBUTING.md does not place {name}"


def test_the_map_of_the_course_shows_every_lesson():
    from tiny_reason.lib.draw import COURSE
    assert {*COURSE} == {p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}


def test_the_tour_leads_to_every_lesson():
    tour = (ROOT / "index.ipynb").read_text()
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        assert f"](nbs/{path.name})" in tour, f"no way from the tour to {path}"


@pytest.mark.parametrize("page", sorted(
    p.relative_to(ROOT).as_posix() for p in [
        *(ROOT / "nbs").rglob("*.ipynb"), ROOT / "index.ipynb",
        ROOT / "README.md", ROOT / "CONTRIBUTING.md"]))
def test_a_link_between_pages_leads_somewhere(page):
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        cells = [c for c in json.loads(text)["cells"]
                 if c["cell_type"] == "markdown"]
        text = "".join("".join(c["source"]) for c in cells)
        assert ({*re.findall(r"\]\(attachment:([^)]+)", text)}
                == {name for c in cells for name in c.get("attachments", {})})
    elsewhere = "https?:|#|mailto:|attachment:"
    for link in re.findall(rf"\]\(((?!{elsewhere})[^)\s#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
