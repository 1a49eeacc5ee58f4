"""`flamingo evaluate`: few-shot captioning, question answering and classification of a network."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro

from data_pipeline.batch import Skip
from flamingo_dist.parallel.topology import single_process
from jobs.evaluate.answering import Work, answer_share, answers_file, wanted
from jobs.evaluate.examples import Examples, read_examples, shared_classes
from jobs.evaluate.media import check_room
from jobs.evaluate.results import RESULT, Outcome, score, write_outcome
from jobs.evaluate.settings import EvaluateArguments
from jobs.inference_source import Source, open_source
from jobs.local_ranks import on_local_ranks
from jobs.report.environment import commit
from jobs.tables import table_console

_NAMED = 5
"""Left-out examples that are named on the console; the file has all."""


def evaluate(arguments: EvaluateArguments) -> Outcome:
    """Evaluate a network and write the results.

    Raises:
        ValueError: settings, data and network do not fit; says which.
        MissingShardError: a shard does not exist.
        CheckpointError: no such checkpoint.
        BadDataError: a shard vanished while it was read.
        RunFailedError: one of several processes ended without an error of its own.
    """
    _check_out(arguments)
    source = open_source(arguments.run, arguments.checkpoint)
    folder = _folder(arguments, source)
    examples = read_examples(arguments)
    names = shared_classes(arguments, examples)
    _check_support(arguments, examples)
    with tempfile.TemporaryDirectory(prefix="flamingo-evaluate-") as scratch:
        work = Work(arguments=arguments, source=source, examples=examples, names=names, folder=Path(scratch))
        check_room(work.folder, len(wanted(arguments, examples)), source.model, source.dtype)
        bad = run_work(work)
        lines = [
            json.loads(line)
            for rank in range(arguments.data)
            for line in answers_file(Path(scratch), rank).read_text().splitlines()
        ]
    outcome = _outcome(arguments, examples, names, lines, bad, folder)
    write_outcome(
        outcome,
        arguments,
        commit=commit(),
        checkpoint=None if source.checkpoint is None else str(source.checkpoint),
        queries=len(examples.queries),
    )
    return outcome


def run_work(work: Work) -> list[Skip]:
    """Answer all queries in one process or several, and return what could not be shown."""
    arguments = work.arguments
    if arguments.data * arguments.tensor == 1:
        with single_process() as topology:
            return answer_share(topology, work)
    found: list[Skip] = on_local_ranks(answer_share, work, tensor=arguments.tensor, data=arguments.data)
    return found


def _outcome(
    arguments: EvaluateArguments,
    examples: Examples,
    names: Sequence[str],
    lines: Sequence[dict[str, Any]],
    bad: Sequence[Skip],
    folder: Path,
) -> Outcome:
    """Score what was answered; every query that can be shown has one answer for each number of shots."""
    queries = {query.key: query for query in examples.queries}
    by_shots = {
        shots: sorted((line for line in lines if line["shots"] == shots), key=lambda line: line["key"])
        for shots in arguments.shots
    }
    unseen = {skip.key for skip in bad}
    for found in by_shots.values():
        keys = [line["key"] for line in found]
        assert len(keys) == len(set(keys)), "a query was answered twice"
        assert set(keys) >= set(queries) - unseen, "a query was not answered"
    figures = {shots: score(arguments, queries, names, found) for shots, found in by_shots.items()}
    return Outcome(
        figures=figures,
        predictions=[line for found in by_shots.values() for line in found],
        left_out=(*examples.damaged, *bad),
        support=len(examples.support),
        folder=folder,
    )


def _check_out(arguments: EvaluateArguments) -> None:
    """Refuse to write results beside a network that lies elsewhere.

    Raises:
        ValueError: no folder is given for them.
    """
    if not arguments.out and "://" in arguments.run:
        raise ValueError(
            f"{arguments.run} is no folder of this machine: say by --out where results are written."
        )


def _folder(arguments: EvaluateArguments, source: Source) -> Path:
    """Return the folder of the results: equal settings and checkpoints have one, where they overwrite equal results."""
    if arguments.out:
        return Path(arguments.out)
    checkpoint = None if source.checkpoint is None else source.checkpoint.name
    settings = {**asdict(arguments), "checkpoint": checkpoint}
    for without_effect in ("batch", "rows", "data", "tensor", "out"):
        del settings[without_effect]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(arguments.run) / "evaluations" / f"{arguments.task}-{digest}"


def _check_support(arguments: EvaluateArguments, examples: Examples) -> None:
    """Refuse more demonstrations than there are examples, before anything is built.

    Raises:
        ValueError: says how many there are.
    """
    keys = {example.key for example in examples.support}
    overlap = any(query.key in keys for query in examples.queries)
    there, most = len(keys) - overlap, arguments.most_examples
    if most > there:
        beside = " beside a query that is one of them" if overlap else ""
        why = (
            f"--shots {list(arguments.shots)}"
            if max(arguments.shots) == most
            else f"--text-examples {most} at 0 shots"
        )
        raise ValueError(
            f"{why} with a support set of {there} examples{beside}: ask for fewer, or give more by --support, "
            "--support-size and --support-per-class."
        )


def command(arguments: Sequence[str]) -> int:
    """Evaluate a network: `flamingo evaluate --run FOLDER --task caption --queries URL --support URL`."""
    given = tyro.cli(EvaluateArguments, args=list(arguments), prog="flamingo evaluate")
    outcome = evaluate(given)
    console = table_console()
    console.print(outcome.table())
    if outcome.left_out:
        console.print(f"{len(outcome.left_out)} left out, for what they hold cannot be shown:")
        for skip in outcome.left_out[:_NAMED]:
            console.print(f"  {skip.key or skip.shard}: {skip.cause} ({skip.detail})", markup=False)
    console.print(f"Results: {outcome.folder / RESULT}", markup=False)
    return 0
