"What can be said in seconds of a run on Colab; `make colab` runs it all."
import ast
import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [*sorted((ROOT / "nbs").glob("*.ipynb")),
             *sorted((ROOT / "nbs" / "exercises").rglob("*.ipynb")),
             ROOT / "index.ipynb"]


def code(notebook):
    "Sources of the code cells."
    return ["".join(cell["source"])
            for cell in json.loads(notebook.read_text())["cells"]
            if cell["cell_type"] == "code"]


def named(notebook): return notebook.relative_to(ROOT).as_posix()


def test_every_notebook_begins_with_the_same_installation():
    first = {next(c for c in code(n) if not c.startswith("#| default_exp"))
             for n in NOTEBOOKS}
    assert len(first) == 1 and "tiny_reason[lessons] @ " in first.pop()


@pytest.mark.parametrize("imported, said", [
    ("", ""), ("import used", "['used'] had been imported before")])
def test_an_installation_under_the_feet_is_told(imported, said, tmp_path):
    "A package that was replaced matters only if this kernel had imported it."
    for name in ("used", "other"):
        (tmp_path / f"{name}.py").touch()
        old = tmp_path / f"{name}-1.dist-info"
        old.mkdir()
        (old / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
        (old / "RECORD").write_text(f"{name}.py,,\n")
    (tmp_path / "cell.py").write_text(code(NOTEBOOKS[-1])[0])
    script = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
{imported}
def install(magic, line):
    assert magic == "pip" and line.startswith("install")
    for name in ("used", "other"):
        Path(f"{{name}}-1.dist-info/METADATA").write_text(
            f"Name: {{name}}\\nVersion: 2\\n")
sys.modules["google.colab"] = None
get_ipython = lambda: SimpleNamespace(run_line_magic=install)
exec(Path("cell.py").read_text())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path,
                          capture_output=True, text=True)
    assert bool(done.returncode) == bool(said), done.stderr
    assert said in done.stderr


def test_colab_keeps_its_torch():
    "Of what Colab has, accelerate and datasets are too old for us."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    ours = settings["DEFAULT"]
    pins = [line for line in (ROOT / "tests" / "colab.txt").read_text().split(
        "\n") if "==" in line and not line.startswith("#")]
    theirs = dict(pin.lower().split("==") for pin in pins)
    wanted = [Requirement(r) for r in (
        ours["requirements"] + " " + ours["lessons_requirements"]).split()]
    assert [w.name for w in wanted if w.name in theirs
            and theirs[w.name] not in w.specifier] == ["accelerate",
                                                       "datasets"]
    assert {"torch", "peft", "transformers"} <= {*theirs}


BESIDE_OLD_TORCHAO = """
import importlib, sys
from pathlib import Path
import tiny_reason
folder = Path(tiny_reason.__file__).parents[1]
for path in sorted((folder / "tiny_reason").rglob("[!_]*.py")):
    importlib.import_module(".".join(path.relative_to(folder).parts)[:-3])
from tiny_reason.model import add_lora, load_base, load_tuned
import importlib.metadata, torchao
assert importlib.metadata.version("torchao") == "0.10.0"
base, _ = load_base("student", four_bit=False, device="cpu")
add_lora(base).save_pretrained("adapter")
tuned, _ = load_tuned("adapter", four_bit=False, device="cpu")
assert any(".lora_A." in name for name, _ in tuned.named_parameters())
"""


def test_adapters_beside_a_torchao_that_peft_refuses(tmp_path):
    "Colab has torchao 0.10; an unquantised layer does not need any."
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    meta = tmp_path / "torchao-0.10.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Name: torchao\nVersion: 0.10.0\n")
    done = subprocess.run([sys.executable, "-c", BESIDE_OLD_TORCHAO],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_lesson_needs_no_clone_beside_it(notebook):
    "An adapter in ../outputs is taken where there is one, and not missed."
    texts = {node.value for cell in code(notebook)
             for node in ast.walk(ast.parse(cell))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not {t for t in texts if t.startswith("../")} - {
        "../outputs/student"}


MAKERS = {"tensor", "arange", "zeros", "ones", "full", "eye", "empty", "rand",
          "randn", "randint", "randperm", "Generator"}
LOADERS = {"load_any", "load_base", "load_tuned"}


def calls(cells):
    for cell in cells:
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Call):
                name = node.func
                yield (getattr(name, "attr", getattr(name, "id", "")), node,
                       {k.arg for k in node.keywords})


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_no_tensor_stays_behind(notebook):
    """Where a model goes to the GPU that there may be, tensors go with it.

    A lesson either says device="cpu" of its models, or names a device for each
    tensor that it makes."""
    made = [*calls(c for c in code(notebook) if "#| export" not in c)]
    follows = [ast.unparse(node) for name, node, keys in made
               if name in LOADERS and "device" not in keys]
    behind = [ast.unparse(node) for name, node, keys in made
              if name in MAKERS and "device" not in keys
              and ast.unparse(node.func).startswith("torch.")]
    assert not follows or not behind, (follows, behind)


def test_programs_are_found_where_colab_keeps_them():
    "There python is in /usr/bin and what pip installs in /usr/local/bin."
    for notebook in NOTEBOOKS:
        assert "sys.executable).with_name" not in "".join(code(notebook))
