import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the repository's own files, without what was built from them."
    to = tmp_path_factory.mktemp("copy") / "tiny_reason"
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(
        ".*", "_build", "build", "dist", "outputs", "*.egg-info",
        "__pycache__"))
    return to
