"The wheel holds all it needs, and trains without the tools of development."
import importlib
import subprocess
import sys
import zipfile

import pytest

TRAIN = """
import sys
for name in ("nbdev", "fastcore", "execnb", "jupyter", "jupyterlab",
             "notebook", "nbclient", "pytest", "openai", "fastapi", "rwkv"):
    sys.modules[name] = None # importing it now fails
import tiny_reason
assert "torch" not in sys.modules
assert tiny_reason.__file__.startswith(sys.argv[1]), tiny_reason.__file__

assert not {"peft", "bitsandbytes", "trl"} & {*sys.modules}
from tiny_reason import data, demo, eval, many, model, pretrain
from tiny_reason.lib import loading, teachers
from tiny_reason import rwkv, train, transformer
from tiny_reason.lib import disk
try: teachers.endpoint_teacher("http://127.0.0.1:9/v1", "nobody")
except ImportError as e: assert "tiny_reason[teacher]" in str(e)
else: raise AssertionError("an extra was not missed")
base, tokenizer = loading.load_base("student", device="cpu")
rows, held, report = data.prepare("arithmetic", 40, tokenizer=tokenizer)
args = train.sft_config(sys.argv[2], device="cpu", max_steps=2, eval_steps=1,
                        save_steps=1)
assert disk.committed("ladder.json").startswith("{") # no clone is near
run = train.train(model.add_lora(base), tokenizer, rows, held, args)
assert run.steps == 2 and run.best_checkpoint
"""

IMPORT_EACH = """
import importlib, logging, os, pkgutil, sys
import datasets, tiny_reason, torch, transformers # and the rest in each child
for module in pkgutil.walk_packages(tiny_reason.__path__, "tiny_reason."):
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]: sys.exit(module.name)
        continue
    importlib.import_module(module.name)
    for name, logger in [*logging.root.manager.loggerDict.items()]:
        if name.startswith("bitsandbytes"):
            assert not getattr(logger, "level", 0), name
            assert not getattr(logger, "disabled", 0), name
    sys.stdout.write(module.name + "\\n")
    sys.stdout.flush()
    os._exit(0)
"""


def test_importing_is_silent_and_changes_no_logging():
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {"tiny_reason.model", "tiny_reason.lib.fast", "tiny_reason.cli"} < set(done.stdout.split())


# What other people's code relies on, wherever it is defined.
CONTRACT = dict(
    data="load_problems make_problems parse_answer strip_calculator "
         "to_messages build_prompt prepare overlap show_mask",
    model="nf4_codebook quantize_nf4 dequantize_nf4 LoRALinear memory_budget "
          "compute_dtype load_base add_lora load_tuned merge",
    train="sft_config train last_checkpoint save_run plot_run",
    eval="extract_answer parse_number is_correct generate evaluate wilson "
         "mcnemar check_steps self_consistency perplexity",
    demo="stream demo chat", cli="main",
    distill="generate_traces filter_traces endpoint_teacher local_teacher")


@pytest.mark.parametrize("module, names", CONTRACT.items(), ids=CONTRACT)
def test_contract_names_are_where_they_were(module, names):
    found = importlib.import_module(f"tiny_reason.{module}")
    assert not [n for n in names.split() if not callable(getattr(found, n, 0))]


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps",
                    "-w", out, copy], check=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_configs_and_student(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in ("stories.yaml", "configs/student.yaml",
                   "configs/qwen2.5-1.5b.yaml", "configs/distill.yaml",
                   "configs/pretrain.yaml", "benchmarks/ladder.json",
                   "benchmarks/knobs.md",
                   "configs/accelerate/fsdp.yaml",
                   "student/model.safetensors",
                   "student/tokenizer.json", "student/chat_template.jinja"):
        assert f"tiny_reason/{needed}" in names
    assert not [n for n in names if n.startswith(("nbs", "tests"))]


def test_trains_without_development_tools(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps",
                    "--target", target, wheel], check=True)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(target), str(tmp_path / "run")],
        cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin",
                           "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
