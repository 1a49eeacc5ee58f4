"""What a training process does with its errors, without Ray: `FakeControl` is the actor, called at once."""

import json
from typing import Any

import pytest
import torch

from data_pipeline.errors import ResumeError
from data_pipeline.feed import LocalFeed
from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.training.checkpoint_folder import CheckpointError
from jobs import driver, worker
from jobs.control import Control
from jobs.errors import RunFailedError
from jobs.recipes.smoke import smoke
from tests.data_pipeline.corpora import one_of_each


class _Method:
    def __init__(self, call: Any) -> None:
        self.remote = call


class FakeControl:
    """The actor's methods by `.remote`."""

    def __init__(self) -> None:
        self.actor = Control()

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self.actor, name))


@pytest.fixture
def control(monkeypatch):
    """A control actor, and this process as rank 0."""
    monkeypatch.setattr(worker.ray, "get", lambda answer: answer)
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(worker.dist, "barrier", lambda: None)
    return FakeControl()


def started(control: FakeControl, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[Any]:
    """Start the worker as Ray does; return what each call of `train_process` was asked to resume."""
    resumed = []

    def train(task: worker.WorkerTask) -> str:
        resumed.append(task.resume)
        if error is not None:
            raise error
        return "outcome"

    monkeypatch.setattr(worker, "train_process", train)
    task = worker.WorkerTask(
        config=smoke(), run_dir="", feeds={}, pictures={}, control=control, resume=None, description={}
    )
    worker.ray_train_entry({"task": task})
    return resumed


@pytest.mark.parametrize("error", [ValueError("a wrong setting"), FileNotFoundError("no weights")])
def test_an_error_for_users_is_told_raised_and_not_tried_again(control, monkeypatch, error):
    with pytest.raises(type(error), match=str(error)):
        started(control, monkeypatch, error)
    assert control.actor.error() is error
    assert started(control, monkeypatch, None) == [], "started again, it does nothing"
    assert control.actor.outcome() is None


def test_an_error_of_all_ranks_is_told_and_raises_nowhere(control, monkeypatch):
    error = CheckpointError("stale")
    assert started(control, monkeypatch, error) == [None]
    assert control.actor.error() is error


def test_other_failures_are_tried_again_from_the_last_checkpoint(control, monkeypatch):
    with pytest.raises(RuntimeError, match="peer is gone"):
        started(control, monkeypatch, RuntimeError("peer is gone"))
    assert started(control, monkeypatch, None) == ["auto"]
    assert control.actor.outcome() == "outcome"


def test_an_error_that_cannot_travel_is_told_in_words(control, monkeypatch):
    held = control.actor.fail

    def fail(error: Exception) -> None:
        if hasattr(error, "heavy"):
            raise TypeError("cannot pickle")
        held(error)

    control.actor.fail = fail
    error = ValueError("of a library")
    error.heavy = True
    with pytest.raises(ValueError, match="of a library"):
        started(control, monkeypatch, error)
    assert str(control.actor.error()) == "ValueError: of a library"


class Trainer:
    """Ray Train's trainer: fails, or ends without an outcome."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def fit(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("raised", [None, RuntimeError("worker group failed")])
def test_the_driver_raises_what_it_was_told(control, raised):
    control.actor.fail(FileNotFoundError("no weights at /x"))
    with pytest.raises(FileNotFoundError, match="no weights at /x"):
        driver._fit(Trainer(raised), control, smoke())


def test_the_driver_sums_up_what_it_was_not_told(control):
    with pytest.raises(RunFailedError, match="a training process failed: worker group failed"):
        driver._fit(Trainer(RuntimeError("worker group failed")), control, smoke())


def test_data_sets_that_take_turns_are_read_whole(tmp_path):
    """Each read a batch in every step, and lost all but those of its turns."""
    datasets = one_of_each(tmp_path)

    def feed() -> LocalFeed:
        return LocalFeed(datasets, TokenizerConfig(), seed=3)

    turns, cpu = len(datasets), torch.device("cpu")
    assert turns == 3
    whole, source = feed(), worker.FeedSource(feed(), cpu, turns=turns)
    for step in range(2 * turns):
        (name, batch), *others = source.next(step).items()
        assert others == []
        assert name == datasets[step % turns].name
        assert torch.equal(batch.tokens_BT, torch.from_numpy(whole.next(step // turns)[name].tokens_BT))
    saved = json.loads(json.dumps(source.state(turns + 2)))
    later = worker.FeedSource(feed(), cpu, turns=turns)
    assert later.check_state(saved) == turns + 2
    assert list(later.next(turns + 2)) == [datasets[2].name]
    with pytest.raises(ResumeError, match="train.mixing"):
        worker.FeedSource(feed(), cpu).check_state(saved)


def test_a_position_of_all_data_sets_is_the_feeds(tmp_path):
    feed = LocalFeed(one_of_each(tmp_path), TokenizerConfig(), seed=3)
    source = worker.FeedSource(feed, torch.device("cpu"))
    assert len(source.next(0)) == 3
    assert source.check_state(source.state(5)) == source.check_state(feed.state(5)) == 5
