"An exercise that proves nothing is found out, and those we have are proven."
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "nbs" / "exercises"
PROVE = runpy.run_path(str(ROOT / "tests" / "exercises.py"))["prove"]

SETUP = "import math"
STUB = "def double(x):\n    return x"
CHECK = '''def check_double(double):
    for x in (0, 3):
        assert double(x) == 2 * x, f"{x}: got {double(x)}"

check_double(double)'''
RIGHT = "def double(x):\n    return 2 * x"
SQUARE = ("# wrong: a square\n# says: 3: got 9\n"
          "def double(x):\n    return x ** 2")
MORE = "# wrong: two more\n# says: 0: got 2\ndef double(x):\n    return x + 2"


def write(folder, exercises, solutions):
    (folder / "solutions").mkdir()
    for path, cells in ((folder / "00_a.ipynb", exercises),
                        (folder / "solutions" / "00_a.ipynb", solutions)):
        path.write_text(json.dumps(dict(cells=[
            dict(cell_type="code", source=[cell]) for cell in cells])))
    return folder / "00_a.ipynb"


def test_a_whole_exercise_is_proven(tmp_path):
    path = write(tmp_path, [SETUP, STUB, CHECK], [SETUP, RIGHT, SQUARE, MORE])
    assert PROVE(path) == (1, 2, [])


BLIND = CHECK.replace("(0, 3)", "()")
NAMELESS = "# wrong: a slip\n# says: 0\ndef double(x):\n    return y"


@pytest.mark.parametrize("exercises, solutions, fault", [
    ([STUB, BLIND], [RIGHT, SQUARE, MORE], "the stub is not refused"),
    ([STUB, BLIND], [RIGHT, SQUARE, MORE], "a square: not refused"),
    ([RIGHT, CHECK], [RIGHT, SQUARE, MORE], "the stub is not refused"),
    ([STUB.replace("return", "retrun"), CHECK], [RIGHT], "SyntaxError"),
    ([STUB.replace("return x", "return y"), CHECK], [RIGHT, SQUARE, MORE],
     "the stub is not refused: NameError"),
    ([STUB, CHECK], [STUB, SQUARE, MORE], "the solution fails"),
    ([STUB, CHECK], [SQUARE, MORE], "0 solutions instead of one"),
    ([STUB, CHECK], [RIGHT, RIGHT, SQUARE, MORE], "2 solutions instead"),
    ([STUB, CHECK], [RIGHT, SQUARE], "1 wrong solutions, two are needed"),
    ([STUB, CHECK], [RIGHT, SQUARE, RIGHT.replace("def", "# wrong: no\ndef")],
     "no: not refused by the check: None"),
    ([STUB, CHECK], [RIGHT, SQUARE, NAMELESS], "a slip: not refused"),
    ([STUB, CHECK], [RIGHT, SQUARE, MORE.replace("got 2", "got 5")],
     "two more: `# says:` should quote '0: got 2'"),
    ([STUB, CHECK], [RIGHT.replace("double", "twice"), SQUARE, MORE],
     "do not begin with the same cells"),
    ([STUB, CHECK], [RIGHT, SQUARE, MORE.replace("double", "twice")],
     "no exercise for '# wrong: two more"),
    ([STUB.replace("double", "twice"), CHECK], [RIGHT], "no stub for double"),
    ([STUB, STUB, CHECK], [RIGHT, SQUARE, MORE], "double has two stubs"),
    ([SETUP], [SETUP], "no exercise")])
def test_what_is_not_as_promised_is_named(exercises, solutions, fault,
                                          tmp_path):
    *_, faults = PROVE(write(tmp_path, exercises, solutions))
    assert any(fault in found for found in faults), faults


def test_a_notebook_without_its_pair_is_a_fault(tmp_path):
    path = write(tmp_path, [STUB, CHECK], [RIGHT, SQUARE, MORE])
    (tmp_path / "solutions" / path.name).rename(
        tmp_path / "solutions" / "01_b.ipynb")
    done = subprocess.run([sys.executable, ROOT / "tests" / "exercises.py",
                           tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "2 faults in 0 exercises" in done.stdout


def test_every_exercise_is_proven():
    done = subprocess.run([sys.executable, ROOT / "tests" / "exercises.py"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.fullmatch(r"(\d+) exercises: \1 stubs fail, \1 solutions pass, "
                        r"(\d+) wrong solutions fail",
                        done.stdout.splitlines()[-1])
    assert int(said[1]) >= 44 and int(said[2]) >= 2 * int(said[1])


def headings(path):
    "The exercises' titles of a notebook, each with its kind."
    cells = json.loads(path.read_text())["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells
                       if c["cell_type"] == "markdown")
    return re.findall(r"^## (\d+\. .+ \((?:calculate|change|break|extend)\))$",
                      text, re.M)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")),
                         ids=lambda p: p.stem)
def test_a_lesson_ends_in_its_exercises(path):
    "Three or more, under the same titles here, there and in the solutions."
    titles = headings(path)
    assert len(titles) >= 3
    assert headings(path.parent / "solutions" / path.name) == titles
    lesson = json.loads((ROOT / "nbs" / path.name).read_text())["cells"]
    last, = ("".join(c["source"]) for c in lesson[-3:]
             if "".join(c["source"]).startswith("## Exercises\n"))
    assert re.findall(r"^\d+\. .+$", last, re.M) == titles
    assert last.count(f"exercises/{path.name})") == 2 # here and in Colab
