"""The import checker turns red on every wrong arrow, and stays green on the right ones."""

from pathlib import Path

import pytest

from tests.tools.trees import write_tree
from tools import check_imports

GOOD = {
    "kernels/attention.py": "import math, torch\nimport triton.language as tl\nfrom kernels import scan\n",
    "kernels/scan.py": "import torch\n",
    "data_pipeline/batch.py": "import numpy\nimport ray\nfrom data_pipeline import shard\n",
    "data_pipeline/shard.py": "import numpy\n",
    "data_pipeline/resize.py": "def f():\n    from torch.nn.functional import interpolate\n",
    "flamingo_dist/errors.py": "import sys\n",
    "flamingo_dist/models/lm.py": (
        "import kernels.attention\nfrom flamingo_dist.errors import X\nfrom .init import tag\n"
    ),
    "flamingo_dist/models/init.py": "import torch\n",
    "flamingo_dist/parallel/zero.py": "from flamingo_dist.models import lm\nimport kernels\n",
    "flamingo_dist/training/step.py": "from ..parallel.zero import Z\nfrom ..models.lm import LM\n",
    "flamingo_dist/cli.py": "import jobs.driver, data_pipeline.batch, flamingo_dist.training.step\n",
    "flamingo_dist/__main__.py": "from flamingo_dist.cli import main\n",
    "jobs/driver.py": "import data_pipeline.batch, flamingo_dist.training.step, kernels.attention\n",
}

WRONG = [
    ("kernels/bad.py", "import flamingo_dist\n", "kernels must not import flamingo_dist"),
    ("kernels/bad.py", "import data_pipeline.batch\n", "kernels must not import data_pipeline"),
    ("kernels/bad.py", "import numpy\n", "not numpy"),
    ("kernels/bad.py", "def f():\n    import einops\n", "not einops"),
    ("data_pipeline/bad.py", "from kernels import attention\n", "data_pipeline must not import kernels"),
    ("data_pipeline/bad.py", "import jobs.driver\n", "data_pipeline must not import jobs"),
    ("data_pipeline/bad.py", "import flamingo_dist\n", "data_pipeline must not import flamingo_dist"),
    (
        "data_pipeline/bad.py",
        "def f():\n    from torch.utils import data\n",
        "data_pipeline must not import torch",
    ),
    (
        "flamingo_dist/models/bad.py",
        "from flamingo_dist.parallel import zero\n",
        "flamingo_dist.parallel",
    ),
    ("flamingo_dist/models/bad.py", "from ..training import step\n", "flamingo_dist.training"),
    ("flamingo_dist/models/bad.py", "import data_pipeline\n", "must not import data_pipeline"),
    ("flamingo_dist/other.py", "from flamingo_dist.models import lm\n", "flamingo_dist.models"),
    ("flamingo_dist/training/bad.py", "import jobs.driver\n", "must not import jobs"),
    ("flamingo_dist/training/bad.py", "import data_pipeline.batch\n", "must not import data_pipeline"),
    (
        "flamingo_dist/evaluation/bad.py",
        "import importlib\nimportlib.import_module('jobs.driver')\n",
        "jobs",
    ),
    ("flamingo_dist/training/bad.py", "from flamingo_dist.cli import main\n", "flamingo_dist.cli"),
    ("flamingo_dist/__main__.py", "import jobs.driver\n", "must not import jobs"),
    ("flamingo_dist/fresh/__init__.py", "import torch\n", "no entry in ALLOWED"),
    ("jobs/bad.py", "from flamingo_dist import cli\n", "jobs must not import flamingo_dist.cli"),
    ("jobs/bad.py", "from tests.helpers import x\n", "must not import tests"),
    ("kernels/bad.py", "def f(:\n", "bad.py:1"),
]


def errors_with(tmp_path: Path, files: dict[str, str]) -> list[str]:
    return check_imports.check(write_tree(tmp_path, {**GOOD, **files}))


def test_right_arrows_are_green(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tree(tmp_path, GOOD)
    assert check_imports.check(root) == []
    assert check_imports.main([str(root)]) == 0
    assert "no wrong arrow" in capsys.readouterr().out


@pytest.mark.parametrize(("where", "source", "complaint"), WRONG)
def test_wrong_arrow_is_red(tmp_path: Path, where: str, source: str, complaint: str) -> None:
    errors = errors_with(tmp_path, {where: source})
    assert any(complaint in error for error in errors), errors
    assert len(errors) == 1, errors
    assert check_imports.main([str(tmp_path)]) == 1


def test_circle_is_red_even_through_late_imports(tmp_path: Path) -> None:
    errors = errors_with(
        tmp_path,
        {
            "flamingo_dist/training/a.py": "import flamingo_dist.parallel.b\n",
            "flamingo_dist/parallel/b.py": "def f():\n    from flamingo_dist.training import a\n",
        },
    )
    assert [error for error in errors if error.startswith("circle")], errors
    assert all(error.startswith("circle") for error in errors), errors


def test_long_file_is_red_and_blank_lines_are_free(tmp_path: Path) -> None:
    assert errors_with(tmp_path / "a", {"kernels/long.py": "x = 1\n\n" * 400}) == []
    errors = errors_with(tmp_path / "b", {"kernels/long.py": "x = 1\n" * 401})
    assert ["401 non-blank lines" in error for error in errors] == [True]


def test_empty_root_is_red(tmp_path: Path) -> None:
    assert check_imports.check(tmp_path)


def test_this_project_is_green() -> None:
    assert check_imports.check(Path(__file__).resolve().parents[2]) == []
