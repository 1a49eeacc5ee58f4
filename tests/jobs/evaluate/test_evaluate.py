"""`flamingo evaluate`: every query once, and the same figures by any number of processes and any batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluate.results import Outcome
from jobs.evaluate.settings import EvaluateArguments
from tests.jobs.evaluate import tasks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shards")
    return {
        "support": tasks.write(folder / "support", range(8)),
        "queries": tasks.write(folder / "queries", range(20, 27)),
    }


def arguments(shards: dict[str, str], folder: Path, **changes: Any) -> EvaluateArguments:
    given: dict[str, Any] = {
        "run": "tiny",
        "task": "caption",
        "queries": (shards["queries"],),
        "support": (shards["support"],),
        "shots": (0, 2, 4),
        "max_new_tokens": 4,
        "out": str(folder),
    }
    return EvaluateArguments(**(given | changes))


def said(outcome: Outcome) -> dict[tuple[int, str], tuple[str, tuple[str, ...]]]:
    return {
        (line["shots"], line["key"]): (line["answer"], tuple(line["demonstrations"]))
        for line in outcome.predictions
    }


def scores(outcome: Outcome) -> list[float]:
    return [value for line in outcome.predictions for value in line.get("scores", {}).values()]


@pytest.fixture(scope="module", params=["caption", "classify"])
def alone(
    request: pytest.FixtureRequest, shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluateArguments, Outcome]:
    """One process, one query at a time; RICES, and for classes three orders."""
    changes = {"select": "rices"} if request.param == "caption" else {"orders": 3, "max_new_tokens": 0}
    given = arguments(shards, tmp_path_factory.mktemp("alone"), task=request.param, batch=1, **changes)
    return given, tasks.evaluate(given)


@pytest.mark.parametrize(("data", "tensor", "batch"), [(1, 1, 8), (2, 1, 2), (1, 2, 8), (2, 2, 3)])
def test_the_same_by_any_layout_and_batch(
    alone: tuple[EvaluateArguments, Outcome], tmp_path: Path, data: int, tensor: int, batch: int
) -> None:
    given, expected = alone
    spread = replace(given, data=data, tensor=tensor, batch=batch, rows=batch, out=str(tmp_path))
    outcome = tasks.evaluate(spread)
    assert said(outcome) == said(expected)
    assert len(set(said(outcome).values())) > 7, "the network says one thing whatever it is shown"
    assert scores(outcome) == pytest.approx(scores(expected), rel=1e-3)
    for shots, figures in expected.figures.items():
        for one, other in zip(figures, outcome.figures[shots], strict=True):
            assert (one.value, one.low, one.count) == pytest.approx((other.value, other.low, 7))


def test_what_a_process_refuses_is_said(shards: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a prompt of .* tokens, .* and 40 are allowed"):
        tasks.evaluate(arguments(shards, tmp_path, context=40, data=2))


def test_more_processes_than_queries(shards: dict[str, str], tmp_path: Path) -> None:
    outcome = tasks.evaluate(arguments(shards, tmp_path, limit=1, data=3, shots=(2,), task="vqa"))
    assert [(figure.metric, figure.count) for figure in outcome.figures[2]] == [("VQA accuracy", 1)]
