"Notebooks are committed clean, and the package is what they export."
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEPT = ("nbs/**/*.ipynb", "index.ipynb", "tiny_reason/**/*.py")


@pytest.fixture(scope="module")
def rebuilt(copy):
    "A copy in which the notebooks were cleaned and exported again."
    for tool in (["nbdev_clean", "--fname", "."], ["nbdev_export"]):
        subprocess.run([Path(sys.executable).with_name(tool[0]), *tool[1:]],
                       cwd=copy, check=True, capture_output=True)
    return copy


def files(root):
    return {p.relative_to(root).as_posix() for pattern in KEPT
            for p in root.glob(pattern)}


def test_same_files(rebuilt):
    assert files(rebuilt) == files(ROOT)
    assert len([f for f in files(ROOT) if f.endswith(".ipynb")]) >= 7


@pytest.mark.parametrize("name", sorted(files(ROOT)))
def test_clean_and_in_sync(rebuilt, name):
    assert (rebuilt / name).read_text() == (ROOT / name).read_text(), (
        f"{name}: run `nbdev_clean --fname . && nbdev_export`, then commit")


@pytest.mark.parametrize("name", sorted(
    f for f in files(ROOT) if f.endswith(".ipynb")))
def test_a_lesson_was_run_whole(name):
    cells = json.loads((ROOT / name).read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    # A page of controls and an exercise are run by whoever opens them.
    alive = name == "nbs/app/page.ipynb" or "/exercises/" in name
    assert bool(outputs) != alive, f"{name} was not run"
