"The script for a GPU, rehearsed without one."
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT)) # a folder without a package: `benchmarks`
from benchmarks import cuda_pack, on_cuda as cuda


# The parts, in a tiny shape

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "All parts in a process of their own, as somebody would start them."
    folder = tmp_path_factory.mktemp("out")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "on_cuda.py", "--smoke", "--part",
         "all", "--out", folder], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("part, section", [
    (part, section.__name__) for part, sections in cuda.parts().items()
    for section in sections])
def test_every_section_runs(out, part, section):
    found = json.loads((out / f"{part}.json").read_text())["sections"][section]
    assert found["error"] == "" and found["rows"]
    if section != "budget": # it counts the shapes of real models
        wrong = [r for r in found["rows"] if r.get("ok") is False]
        assert not wrong and any(r.get("ok") for r in found["rows"])


def test_what_the_sections_found(out):
    right, train, decode = (
        {name: section["rows"] for name, section in json.loads(
            (out / f"{part}.json").read_text())["sections"].items()}
        for part in ("right", "train", "decode"))
    assert [r["skipped"] for r in right["as_on_a_t4"]] == [0, 0, 0, 2]
    assert right["out_of_memory"][0]["sequences"] == [8, 4, 4, 4, 4]
    assert [r["status"] for r in right["killed"]] == [75, -9]
    assert {r["layout"] for r in right["attention"] if r.get("ok")} == {
        "packed", "padded"}
    # the same rows, whoever trains on them
    tokens = {r["way"]: r["tokens"] for r in train["variants"]}
    assert tokens["plain recipe"] == tokens["ours, one row"]
    assert len({r["tokens"] for r in decode["decoding"]
                if r["problems"] == 4}) == 1
    assert decode["tour"][-1]["cell"] == "all"


def test_the_report(out):
    page = cuda.report(out)
    for sections in cuda.parts().values():
        for section in sections: assert f"## {section.__name__}\n" in page
    assert page.count("no figure means anything") == 3
    assert "times plain" in page and "nan" not in page


def test_without_a_gpu_nothing_is_measured(capsys):
    import torch
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA device"):
        cuda.main(["--part", "right"])
    with pytest.raises(SystemExit): cuda.main([])


# Time

class Lab:
    "As much of a lab as `run_part` looks at."
    device, on_gpu, smoke = "cpu", False, True


def test_a_part_ends_with_what_it_has(tmp_path, capsys):
    def endless(lab):
        "Rows without end."
        while True:
            yield dict(ends=lab.ends)
            try: time.sleep(0.01)
            except Exception: pass # the end is none

    def broken(lab):
        "A row, and an error."
        yield dict(n=1, ok=False)
        raise ValueError("no luck")

    def last(lab):
        "Takes what is left."
        yield dict(ends=lab.ends, ok=True)

    cuda.run_part("right", {endless: (1, list), broken: (1, list),
                            last: (2, list)}, Lab(), 0.02, tmp_path)
    found = json.loads((tmp_path / "right.json").read_text())["sections"]
    assert found["endless"]["error"] == "out of time"
    assert found["broken"]["error"] == "ValueError: no luck"
    first, *_ = found["endless"]["rows"]
    row, = found["last"]["rows"] # 1.2 s in all, a quarter for the first
    assert row["ends"] - first["ends"] == pytest.approx(0.9)
    printed = capsys.readouterr().out
    assert "**1 of 1 not as it should be.**" in printed
    assert "| 1 | **no** |" in printed


# A GPU that is made up

def test_a_t4_made_of_another_gpu(monkeypatch):
    "What a program is told in there, and that it is gone afterwards."
    import torch
    from benchmarks.cuda_lab import like_a_t4
    from tiny_reason.lib.device import available_bytes
    from tiny_reason.model import compute_dtype
    given = []
    for name, value in dict(
            is_available=lambda: True, empty_cache=lambda: None,
            mem_get_info=lambda *device: (70e9, 80e9),
            memory_allocated=lambda *device: 2e9,
            memory_reserved=lambda *device: 5e9,
            get_device_capability=lambda *device: (9, 0),
            set_per_process_memory_fraction=given.append).items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert compute_dtype("cuda") == torch.bfloat16
    with like_a_t4():
        assert compute_dtype("cuda") == torch.float16
        assert available_bytes("cuda") == 15.4e9 # beyond the 2 held before
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert compute_dtype("cuda") == torch.bfloat16
    assert available_bytes("cuda") == 73e9
    assert torch.backends.cuda.flash_sdp_enabled()
    assert given == [pytest.approx(17.4 / 80), 1.0]


# What is carried

def wheel(folder, name, version, files=()):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = dict(files) | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\n"
                            f"Version: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
                         "Root-Is-Purelib: true\nTag: py3-none-any\n"}
    files[f"{info}/RECORD"] = "".join(f"{f},,\n" for f in files)
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items(): archive.writestr(file, text)


def installed(folder, name, version, *needs):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {n}\n" for n in needs))


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A wheelhouse, an environment and a Hugging Face home, all invented."
    site, wheels, hub = (tmp_path / n for n in ("site", "wheels", "hub"))
    installed(site, "zz-top", "2.0", "zz_mid>=1", "zz-there", "zz-old>=3",
              "zz-win; sys_platform == 'win32'", "zz-extra; extra == 'x'",
              "zz-snake; python_version < '3.12'")
    installed(site, "zz-mid", "1.5", "zz-top") # a circle
    installed(site, "zz-old", "3.1")
    installed(site, "bitsandbytes", "0.1")
    monkeypatch.syspath_prepend(str(site))
    wheels.mkdir()
    for name, version in (("zz_top", "2.0"), ("zz_mid", "1.5"),
                          ("zz_old", "3.1")): wheel(wheels, name, version)
    wheel(wheels, "bitsandbytes", "0.1", {
        f"bitsandbytes/libbitsandbytes_{n}.so": n * 1000
        for n in ("cpu", "cuda121", "cuda130", "rocm70")} | {
        "bitsandbytes/__init__.py": ""})
    (tmp_path / "there").write_text("zz-there==1\nzz_old==2.9\n")
    for kind, name in cuda_pack.HUB.items():
        (hub / kind / name / "blobs").mkdir(parents=True)
        for file in ("tokenizer.json", "model.safetensors", "blobs/abc"):
            (hub / kind / name / file).write_text("x" * 2000)
    return dict(hub=hub, there=tmp_path / "there", wheelhouse=wheels,
                names=["zz-top", "bitsandbytes"])


def test_what_is_lacking(house):
    there = house["there"].read_text().split()
    assert cuda_pack.lacking(house["names"], there, "3.12") == {
        "zz-top": "2.0", "zz-mid": "1.5", "zz-old": "3.1",
        "bitsandbytes": "0.1"}
    assert "zz-old" not in cuda_pack.lacking(
        ["zz-top"], ["zz-there", "zz-old==3.0"], "3.12")


def test_pack(house, tmp_path, capsys):
    folder = tmp_path / "pack"
    text = cuda_pack.pack(folder, **house)
    assert f"{folder}/wheels/*.whl" in text and "--part decode" in text
    assert {p.name.split("-")[0] for p in folder.glob("wheels/*")} == {
        "zz_top", "zz_mid", "zz_old", "bitsandbytes"}
    with zipfile.ZipFile(*folder.glob("wheels/bitsandbytes*")) as archive:
        assert archive.testzip() is None
        kept = [n for n in archive.namelist() if n.endswith(".so")]
        record = archive.read("bitsandbytes-0.1.dist-info/RECORD").decode()
    assert kept == ["bitsandbytes/libbitsandbytes_cpu.so",
                    "bitsandbytes/libbitsandbytes_cuda130.so"]
    assert [line.split(",")[0] for line in record.splitlines()
            if ".so" in line] == kept
    assert {p.name for p in (folder / "hub").rglob("*") if p.is_file()} == {
        "tokenizer.json"}
    done = subprocess.run( # pip takes the wheel that was cut down
        [sys.executable, "-m", "pip", "install", "-q", "--no-index",
         "--no-deps", "--target", tmp_path / "to",
         *folder.glob("wheels/*.whl")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "to" / "bitsandbytes" / "__init__.py").is_file()


def test_packs_that_cannot_be(house, tmp_path):
    with pytest.raises(ValueError, match="MiB are beyond 0.5; the largest"):
        cuda_pack.pack(tmp_path / "pack", limit=0.5, **house)
    with pytest.raises(ValueError, match="no libbitsandbytes_cuda999.so"):
        cuda_pack.pack(tmp_path / "pack", cuda="999", **house)
    with pytest.raises(FileNotFoundError, match="name another Hugging Face"):
        cuda_pack.pack(tmp_path / "pack", **house | dict(hub=tmp_path))


def test_real_requirements_are_installed_here():
    "What would be fetched has a version, and torch is never among it."
    found = cuda_pack.lacking(cuda_pack.wanted(), cuda_pack.THERE.split(),
                              "3.12")
    assert {"trl", "bitsandbytes", "datasets", "nbclient"} <= {*found}
    assert not {"torch", "transformers", "numpy", "pyarrow"} & {*found}
