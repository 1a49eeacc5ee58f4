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


def test_captions(shards: dict[str, str], tmp_path: Path) -> None:
    outcome = tasks.evaluate(arguments(shards, tmp_path))
    assert [figures[0].count for figures in outcome.figures.values()] == [7, 7, 7]
    assert len(said(outcome)) == 21
