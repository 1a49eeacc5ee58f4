"""The docstring checker turns red on every missing piece."""

from pathlib import Path

import pytest

from tests.tools.trees import write_tree
from tools import check_docs

GOOD = '''"""Module."""
from dataclasses import dataclass
from typing import ClassVar
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Settings."""

    known: ClassVar[int] = 3
    width: int = 8
    """Width of the layer."""


class Layer:
    """A layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, T, D]."""
        return x

    def _private(self, x):
        return x


def suffixed(x_BTD: Tensor) -> Tensor:
    """Return what it is given, [B, T, D]."""
    return x_BTD


def with_a_function(make: Callable[[int], Tensor]) -> None:
    """Owes no shape."""


def outer(x: Tensor) -> None:
    """Take x of any shape."""
'''


def errors_of(tmp_path: Path, source: str) -> list[str]:
    return check_docs.check(write_tree(tmp_path, {"kernels/__init__.py": "", "kernels/m.py": source}))[0]


def test_documented_tree_is_green(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    padded = GOOD + "\n\ndef annotated(a: int, b: int, c: int, d: int) -> None:\n    '''Shape none.'''\n" * 5
    assert errors_of(tmp_path, padded) == []
    assert check_docs.main([str(tmp_path)]) == 0
    assert "arguments annotated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1\n", "module has no docstring"),
        ('"""M."""\ndef f() -> None:\n    pass\n', "f has no docstring"),
        ('"""M."""\nclass C:\n    x = 1\n', "class C has no docstring"),
        (
            '"""M."""\nclass C:\n    """C."""\n    def f(self) -> None:\n        pass\n',
            "C.f has no docstring",
        ),
        ('"""M."""\nasync def f() -> None:\n    pass\n', "f has no docstring"),
        ('"""M."""\ndef f(x: "Tensor") -> None:\n    """Do it."""\n', "says no shape"),
        ('"""M."""\ndef f(x: torch.Tensor | None) -> None:\n    """Do it."""\n', "says no shape"),
        (
            '"""M."""\n@dataclass\nclass AConfig:\n    """A."""\n    x: int\n    y: int\n    """Y."""\n',
            "AConfig.x has no docstring",
        ),
        (
            '"""M."""\n@dataclasses.dataclass(frozen=True)\nclass AConfig:\n    """A."""\n    x: int = 1\n',
            "AConfig.x has no docstring",
        ),
        ('"""M."""\ndef f(:\n', "m.py:2"),
    ],
)
def test_missing_piece_is_red(tmp_path: Path, source: str, complaint: str) -> None:
    errors = [error for error in errors_of(tmp_path, source) if "below its goal" not in error]
    assert len(errors) == 1, errors
    assert complaint in errors[0]
    assert check_docs.main([str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('"""M."""\ndef f(x) -> None:\n    """F."""\n', "arguments annotated, % is 0"),
        ('"""M."""\ndef f() -> None:\n    """F."""\n' + "    f()\n" * 60, "90th percentile is 62"),
        ('"""M."""\n' + "x = 1\n" * 401, "largest file, non-blank lines is 402"),
        (
            '"""M."""\ndef f() -> None:\n    """F."""\n    def g() -> None:\n        pass\n',
            "documented, % is 50",
        ),
        ('"""M."""\ndef f(x_BT: Tensor) -> None:\n    """F of x_BT."""\n', "docstrings with shapes, % is 0"),
    ],
)
def test_figure_below_goal_is_red(tmp_path: Path, source: str, complaint: str) -> None:
    errors = errors_of(tmp_path, source)
    assert len(errors) == 1, errors
    assert complaint in errors[0]


def test_what_owes_no_docstring(tmp_path: Path) -> None:
    source = (
        '"""M."""\n'
        "class C:\n"
        '    """C."""\n'
        "    def _f(self) -> None:\n"
        "        pass\n"
        "    def __len__(self) -> int:\n"
        "        return 0\n"
        "    @x.setter\n"
        "    def x(self, value: int) -> None:\n"
        '        """X."""\n'
    )
    assert errors_of(tmp_path, source) == []
