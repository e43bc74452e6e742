"""What a GPU machine without a network needs, in at most 64 MiB.

`python benchmarks/on_cuda.py --pack` calls `pack`. It runs where this repository
is installed with its dependencies (`make install`) and fetches, by pip, the
wheels that the other machine lacks, in the versions that are installed here.
"""
import configparser, shutil, subprocess, sys, zipfile
from importlib.metadata import requires, version
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# An image with PyTorch and transformers. `--there` replaces it by the
# machine's own `pip list --format=freeze`; without a version, any will do.
THERE = """torch==2.11.0 transformers==5.17.0 accelerate==1.15.0
    huggingface_hub==1.33.0 tokenizers==0.23.2 safetensors==0.8.0 numpy==2.5.2
    pandas pyarrow scipy matplotlib psutil pyyaml tqdm filelock packaging
    jinja2 requests httpx anyio regex fsspec xxhash hypothesis statsmodels
    attrs typing-extensions python-dateutil six pygments certifi idna
    h11 httpcore sortedcontainers"""
NOTEBOOKS = "nbclient", "ipykernel", "fastcore", "openai", "rwkv"
# pip takes each of these literally: 2_28 does not imply 2_17.
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)] + [
    "manylinux2014_x86_64", "manylinux1_x86_64"]
HUB = {"hub": "models--Qwen--Qwen2.5-1.5B-Instruct",
       "datasets": "openai___gsm8k"}


def wanted(): # names with their limits
    "What the package asks for, and what it takes to run its notebooks."
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    return [*settings["DEFAULT"]["requirements"].split(), *NOTEBOOKS]


def lacking(names, there, python): # {package: version installed here}
    "Everything that `names` need, and that `there` lacks or has too old."
    there = {canonicalize_name(n): v for n, _, v in (
        line.partition("==") for line in there)}
    target = default_environment() | dict(
        python_version=python, python_full_version=f"{python}.0", extra="")
    found, waiting = {}, [Requirement(n) for n in names]
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if need.marker and not need.marker.evaluate(target): continue
        if name in found or name in there and (
                not there[name] or there[name] in need.specifier): continue
        found[name] = version(name)
        waiting += map(Requirement, requires(name) or [])
    return found


def fetch(packages, folder, python, platforms, wheelhouse=None):
    "Download a wheel of each package for the other machine, by pip."
    source = ["--no-index", "--find-links", str(wheelhouse)] if wheelhouse \
        else []
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps",
         "--only-binary=:all:", "--implementation", "cp", "--python-version",
         python, *(w for p in platforms for w in ("--platform", p)), *source,
         "-d", str(folder), *(f"{n}=={v}" for n, v in packages.items())],
        check=True)


def strip(wheel, cuda):
    "Leave one CUDA library in bitsandbytes' wheel: 43 MB become 2."
    kept = f"libbitsandbytes_cuda{cuda}.so", "libbitsandbytes_cpu.so"
    def goes(path):
        name = path.rpartition("/")[2]
        return name.startswith("libbitsandbytes") and name not in kept
    slim = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(
            slim, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        if f"bitsandbytes/{kept[0]}" not in names:
            raise ValueError(f"{wheel.name} has no {kept[0]}; --cuda takes one"
                             f" of {[n for n in names if '_cuda' in n]}")
        for item in old.infolist():
            if goes(item.filename): continue
            data = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                data = b"".join(line for line in data.splitlines(True)
                                if not goes(line.decode().split(",")[0]))
            new.writestr(item, data)
    slim.replace(wheel)


def copy_hub(home, folder):
    "Problems, configuration and tokenizer of a Hugging Face home; no weights."
    for kind, name in HUB.items():
        source = Path(home) / kind / name
        if not source.is_dir(): raise FileNotFoundError(
            f"{source} is missing: load it once with a network, or name "
            "another Hugging Face home with --hub")
        shutil.copytree(source, folder / kind / name, ignore=shutil
                        .ignore_patterns("blobs", "*.safetensors", "*.bin",
                                         "*.lock", "*.incomplete"))


def tree_files(): # paths
    "What of this repository travels: all that git does not ignore."
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT,
        capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def pack(folder, hub, there=None, python="3.12", platforms=None, cuda="130",
         limit=64, wheelhouse=None, names=None):
    """Fill `folder` with `wheels/` and `hub/`; returns what to type there.

    `ValueError` if it and the repository's files are beyond `limit` MiB."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    there = (Path(there).read_text() if there else THERE).split()
    packages = lacking(names or wanted(), there, python)
    fetch(packages, wheels, python, platforms or PLATFORMS, wheelhouse)
    for wheel in wheels.glob("bitsandbytes-*.whl"): strip(wheel, cuda)
    copy_hub(hub, folder / "hub")
    carried = [p for p in folder.rglob("*") if p.is_file()]
    sizes = {p: p.stat().st_size for p in {*carried, *tree_files()}
             if p.is_file()}
    total = sum(sizes.values())
    print(f"{len(packages)} wheels; {total / 2**20:.1f} of {limit} MiB with "
          "the repository", file=sys.stderr)
    if total > limit * 2**20:
        large = sorted(sizes, key=sizes.get)[-5:]
        raise ValueError(f"{total / 2**20:.1f} MiB are beyond {limit}; the "
                         f"largest: {[str(p) for p in large[::-1]]}")
    return commands(folder.resolve())


def commands(folder):
    "What to type on the GPU machine, in the repository's folder."
    near = f"$PWD/{folder.relative_to(ROOT)}" if folder.is_relative_to(
        ROOT) else folder
    return f"""\
test -d /tmp/site || python3 -m pip install -q --no-index --no-deps \\
  --no-compile --target /tmp/site {near}/wheels/*.whl || exit
export PYTHONPATH=/tmp/site HF_HOME={near}/hub HF_HUB_OFFLINE=1
# first whether it runs at all, then the three parts
python3 -u benchmarks/on_cuda.py --smoke --part all --out /tmp/smoke
python3 -u benchmarks/on_cuda.py --part right --out ${{OUT:-_build/cuda_out}}
python3 -u benchmarks/on_cuda.py --part train --out ${{OUT:-_build/cuda_out}}
python3 -u benchmarks/on_cuda.py --part decode --out ${{OUT:-_build/cuda_out}}"""
