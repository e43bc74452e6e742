"""Run notebooks as Colab does, without a GPU: `make colab`.

The versions of colab.txt go into an environment of their own. Each notebook is
copied alone into an empty folder and run in a kernel that has google.colab, so
that its first cell installs the package as it does there. Only the address in
that cell is another: the wheel of this working tree, not GitHub."""
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "tests" / "colab.txt"
BUILD = ROOT / "_build" / "colab"
PYTHON = BUILD / "env" / "bin" / "python"
ADDRESS = "git+https://github.com/tiny-reason/tiny_reason"


def pip(*command):
    return subprocess.run([PYTHON, "-m", "pip", *command], check=True,
                          stdout=subprocess.PIPE, text=True).stdout


def versions():
    "What is installed: name -> version."
    lines = pip("list", "--format=freeze").split()
    return dict(line.split("==") for line in lines if "==" in line)


def environment():
    "Make Colab's environment, unless it is there and the lists are the same."
    made_of = "\n".join([sys.version, PINS.read_text(),
                         (ROOT / "settings.ini").read_text()])
    stamp = BUILD / "made_of"
    if stamp.is_file() and stamp.read_text() == made_of: return
    shutil.rmtree(BUILD, ignore_errors=True)
    venv.create(BUILD / "env", with_pip=True)
    # Without dependencies: the list is what Colab has, and nothing else.
    pip("install", "-qq", "--no-deps", "-r", PINS)
    site = next((BUILD / "env" / "lib").glob("python*/site-packages"))
    stand_in = site / "google" / "colab"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("import numpy # the real one does\n")
    profile = BUILD / "ipython" / "profile_default"
    profile.mkdir(parents=True)
    (profile / "ipython_config.py").write_text(
        "c.InteractiveShellApp.exec_lines = ['import google.colab']\n"
        "c.InteractiveShell.colors = 'NoColor'\n")
    stamp.write_text(made_of)


def wheel():
    "A wheel of the working tree; what an earlier one installed is removed."
    for old in (BUILD / "dist", ROOT / "build"):
        shutil.rmtree(old, ignore_errors=True)
    pip("wheel", "-qq", "--no-deps", "-w", BUILD / "dist", ROOT)
    pip("uninstall", "-qq", "-y", "tiny_reason")
    return next((BUILD / "dist").glob("*.whl"))


def run(notebook, address):
    "Run a copy of the notebook in an empty folder; return what it complained."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PATH": f"{PYTHON.parent}{os.pathsep}{env['PATH']}",
            "IPYTHONDIR": str(BUILD / "ipython")}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, notebook.name)
        text = notebook.read_text(encoding="utf-8")
        copy.write_text(text.replace(ADDRESS, address), encoding="utf-8")
        done = subprocess.run(
            [PYTHON, "-m", "nbconvert", "--execute", "--inplace", copy],
            cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    return done.stderr if done.returncode else ""


def main(names):
    notebooks = [Path(n) for n in names] or [
        *sorted((ROOT / "nbs").glob("*.ipynb")), ROOT / "index.ipynb"]
    environment()
    address, before, failed = wheel().as_uri(), versions(), 0
    for notebook in notebooks:
        start = time.perf_counter()
        complaint = run(notebook, address)
        failed += bool(complaint)
        print(f"{'FAILED' if complaint else 'passed'} "
              f"{time.perf_counter() - start:5.0f} s  {notebook.name}",
              flush=True)
        if complaint: print("\n".join(complaint.splitlines()[-40:]))
    for name, version in versions().items():
        if before.get(name, version) != version:
            print(f"{name} {before[name]} was replaced by {version}")
            failed += name in ("torch", "numpy")
    print(f"{len(notebooks)} notebooks, {failed} failures")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
