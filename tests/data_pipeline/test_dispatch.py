"""Whom the dispatcher asks, with readers that are plain objects: deaths, late answers, work shared out."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ActorUnavailableError

from data_pipeline.dispatch import Dispatcher, Unit
from data_pipeline.errors import NotOpenError


class Method:
    """A remote method of an actor."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, *, max_task_retries: int, num_returns: int = 1) -> "Method":
        assert max_task_retries == 0, "Ray would repeat the call at the reader that died"
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class FakeReader:
    """Answers one call after another; dies, or takes long, when told to."""

    def __init__(
        self, *, seconds: float = 0.001, deaths: tuple[int, ...] = (), for_good: bool = False
    ) -> None:
        self.seconds, self.deaths, self.for_good = seconds, deaths, for_good
        self.asked: list[int] = []
        self.opened, self.opens, self.gone = False, 0, False
        self._turn = asyncio.Lock()

    @property
    def make(self) -> Method:
        return Method(self._make)

    @property
    def open(self) -> Method:
        return Method(self._open)

    def _make(self, dataset: str, step: int, dp_rank: int, dp_size: int) -> tuple[Any, Awaitable[Any]]:
        self.asked.append(step)
        answer = asyncio.ensure_future(self._answer(len(self.asked)))
        return (dataset, step, dp_rank, dp_size), answer

    async def _answer(self, call: int) -> tuple[()]:
        async with self._turn:
            if self.gone:
                raise ActorDiedError
            if not self.opened:
                raise NotOpenError("not open")
            if call in self.deaths:
                self.opened, self.gone = False, self.for_good
                raise ActorUnavailableError("killed", b"0" * 16)
            await asyncio.sleep(self.seconds)
            return ()

    async def _open(self, loaded: Any) -> None:
        assert loaded == ["tokenizer", "indices"]
        self.opens += 1
        if self.gone:
            raise ActorDiedError
        if not self.opened and self.opens % 2 == 0 and not self.for_good:
            raise ActorUnavailableError("restarting", b"0" * 16)
        self.opened = True


def dispatch(
    readers: list[FakeReader], steps: int, *, window: int = 4, retries: int = 3, slow_after: float = 4.0
) -> tuple[list[Any], Dispatcher]:
    """Make units in order, `window` at a time; return what came for each, and the dispatcher."""

    async def work() -> tuple[list[Any], Dispatcher]:
        for reader in readers:
            reader._turn = asyncio.Lock()
        dispatcher = Dispatcher(
            readers, ("tokenizer", "indices"), first=0, retries=retries, slow_after=slow_after
        )
        made: list[Any] = []
        for start in range(0, steps, window):
            units = [Unit("d", step, 0, 1) for step in range(start, min(steps, start + window))]
            made += await asyncio.gather(*map(dispatcher.make, units), return_exceptions=True)
        return made, dispatcher

    return asyncio.run(work())


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was cancelled; the calls of plain objects cannot be."""
    cancelled: list[Any] = []
    monkeypatch.setattr("data_pipeline.dispatch.ray.cancel", cancelled.append)
    monkeypatch.setattr("data_pipeline.dispatch._RESTART_POLL_S", 0.001)
    monkeypatch.setattr("data_pipeline.dispatch._LEAST_PATIENCE_S", 0.02)
    return cancelled


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 5),
    deaths=st.lists(st.sets(st.integers(1, 12), max_size=6), min_size=5, max_size=5),
    window=st.integers(1, 6),
)
def test_every_unit_comes_once_whoever_dies(count: int, deaths: list[set[int]], window: int) -> None:
    readers = [FakeReader(deaths=tuple(deaths[n])) for n in range(count)]
    made, _ = dispatch(readers, 12, window=window, retries=40)
    assert [answer[0] for answer in made] == [("d", step, 0, 1) for step in range(12)]


def test_work_is_shared_out() -> None:
    readers = [FakeReader() for _ in range(3)]
    dispatch(readers, 30, window=6)
    assert all(8 <= len(reader.asked) <= 12 for reader in readers)
    assert all(reader.opens == 1 for reader in readers)


def test_a_slow_reader_is_passed_over_and_left_alone(no_ray: list[Any]) -> None:
    # 20 ms and 15 times: only a stall of 0.3 s would make a quick reader a slow one.
    slow, *quick = readers = [FakeReader(seconds=30), FakeReader(seconds=0.02), FakeReader(seconds=0.02)]
    made, dispatcher = dispatch(readers, 40, slow_after=15.0)
    assert [answer[0][1] for answer in made] == list(range(40))
    assert 1 <= len(slow.asked) <= 3, "it never answered, so it is busy"
    assert dispatcher.asked_twice == len(no_ray) == len(slow.asked)
    assert all(len(reader.asked) > 15 for reader in quick)


def test_nobody_is_asked_twice_when_all_are_slow_or_it_is_switched_off() -> None:
    readers = [FakeReader(), FakeReader()]

    async def work() -> Dispatcher:
        dispatcher = Dispatcher(readers, ("tokenizer", "indices"), first=0, retries=3, slow_after=4.0)
        for _ in range(4):
            await dispatcher.make(Unit("d", 0, 0, 1))
        for reader in readers:
            reader.seconds = 0.3  # the storage stumbles
        await asyncio.gather(*(dispatcher.make(Unit("d", step, 0, 1)) for step in (1, 2)))
        return dispatcher

    assert asyncio.run(work()).asked_twice == 0
    made, dispatcher = dispatch([FakeReader(seconds=0.3), FakeReader()], 8, slow_after=0)
    assert len(made) == 8
    assert dispatcher.asked_twice == 0


def test_a_unit_that_kills_everyone_is_given_up() -> None:
    readers = [FakeReader(deaths=tuple(range(1, 50))) for _ in range(3)]
    (fault,), _ = dispatch(readers, 1, retries=3)
    assert isinstance(fault, ActorUnavailableError)
    assert sum(len(reader.asked) for reader in readers) == 4


def test_readers_that_are_gone_for_good() -> None:
    gone, alive = readers = [FakeReader(deaths=(2,), for_good=True), FakeReader()]
    made, _ = dispatch(readers, 20)
    assert [answer[0][1] for answer in made] == list(range(20))
    assert len(gone.asked) < len(alive.asked)
    made, _ = dispatch([FakeReader(deaths=(1,), for_good=True)], 2, window=1)
    assert all(isinstance(fault, ActorDiedError) for fault in made)
