import shutil
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A script's background job starts with Ctrl-C ignored, and hands that down.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the repository's own files, without what was built from them."
    to = tmp_path_factory.mktemp("copy") / "tiny_reason"
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(
        ".*", "_build", "build", "dist", "outputs", "*.egg-info",
        "__pycache__"))
    return to


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    "A folder with a one-layer model of Qwen2's architecture, random weights."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from tiny_reason.lib.folders import find_base, load_tokenizer
    student, folder = find_base("student")[0], tmp_path_factory.mktemp("base")
    config = AutoConfig.from_pretrained(student)
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(student).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    from tiny_reason.lib.folders import find_base, load_tokenizer
    return load_tokenizer(find_base("student")[0])


@pytest.fixture(scope="session")
def rwkv_folder(tokenizer, tmp_path_factory):
    "A folder with a small RWKV-7 of random weights."
    import torch
    from tiny_reason.rwkv import RWKV7Config, RWKV7ForCausalLM
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rwkv")
    RWKV7ForCausalLM(RWKV7Config(1152, 64, 2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_configure(config):
    config.addinivalue_line("markers", "many: more processes than a laptop "
                            "likes; run by `pytest -m many tests`")


def pytest_collection_modifyitems(config, items):
    "The slowest files first: two workers then end at about the same time."
    if "many" not in config.option.markexpr:
        items[:] = [i for i in items if not i.get_closest_marker("many")]
    slow = ["test_train", "test_browser", "test_cli", "test_many", "test_model"]
    items.sort(key=lambda i: slow.index(i.path.stem)
               if i.path.stem in slow else len(slow))
