"""What a run reads: shards, tokenizer, weights."""

import re
from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.config import DatasetConfig
from data_pipeline.index import ShardIndex, open_index
from data_pipeline.tokenizer import TokenizerConfig
from jobs.config import RunConfig
from jobs.console import first_line
from jobs.doctor.findings import Finding, fail, ok, warn
from jobs.doctor.weights import ATTEMPTS, check_all_weights


def check_data(run: RunConfig) -> list[Finding]:
    """Open every data set's index and compare it with the run; then the tokenizer and the weights."""
    found = []
    for dataset in {**run.data.train, **run.data.held_out}.values():
        found += check_dataset(run, dataset)
    found.append(check_tokenizer(run.data.tokenizer, run.model.lm.vocab_size))
    return found + check_all_weights(run.model)


def check_dataset(run: RunConfig, dataset: DatasetConfig) -> list[Finding]:
    """Open a data set's index and compare its shards and samples with readers, ranks and steps."""
    part = "train" if dataset.name in run.data.train else "held_out"
    setting, check = f"--data.{part}.{dataset.name}.urls", f"data {dataset.name}"
    try:
        index = open_index(dataset.urls, storage=replace(dataset, read_attempts=ATTEMPTS).storage())
        index.records(0)  # offsets lie in a file of their own
    except ImportError as error:
        remedy = "install the file system: pip install 'flamingo-dist[s3]' or '[gcs]'"
        return [fail(check, f"{dataset.urls[0]}: {error}", remedy)]
    except (ValueError, OSError) as error:
        remedy = (
            f"restore what is named, or set {setting}; credentials and endpoint come from the environment"
        )
        return [fail(check, first_line(error), remedy)]
    except Exception as error:  # file systems raise errors of libraries that need not be installed
        remedy = f"check {setting}, credentials and endpoint"
        return [fail(check, first_line(error, kind=True), remedy)]
    return _compare(run, dataset, index, check)


def _compare(run: RunConfig, dataset: DatasetConfig, index: ShardIndex, check: str) -> list[Finding]:
    """Compare an index with the run that reads it."""
    shards, samples = len(index.entries), index.num_samples
    says = f"{shards} shards, {samples} samples"
    found = []
    gaps = missing_numbers([entry.name for entry in index.entries])
    if gaps:
        remedy = "restore them, or go on if they were left out on purpose"
        found.append(warn(check, f"numbers of shards are missing: {', '.join(gaps)}", remedy))
    if index.skips:
        first = index.skips[0]
        remedy = "copy these shards anew: what is cut off is skipped, up to bad_sample_budget"
        found.append(
            warn(check, f"{len(index.skips)} damaged places, first {first.shard}: {first.detail}", remedy)
        )
    if samples < dataset.batch_size:
        remedy = f"lower batch_size of {dataset.name} to at most {samples}, or add data"
        found.append(
            warn(
                check, f"{says}: fewer than the batch of {dataset.batch_size}, so a step repeats some", remedy
            )
        )
    if dataset.mode == "train":
        readers, ranks = run.data.readers.readers, run.resources.workers // run.parallel.tensor
        epochs = run.train.steps * dataset.batch_size / samples
        says += (
            f" for {readers} readers and {ranks} data ranks; {epochs:.2g} epochs in {run.train.steps} steps"
        )
        found += _check_shards(run, dataset, shards, check)
    return found if any(f.level != "ok" for f in found) else [ok(check, says)]


def _check_shards(run: RunConfig, dataset: DatasetConfig, shards: int, check: str) -> list[Finding]:
    """Check the number of shards against readers, ranks and the shuffle.

    Any reader may read any sample, so a run with few shards is right; but all then read from few objects at once.
    """
    readers, ranks = run.data.readers.readers, run.resources.workers // run.parallel.tensor
    busy = max(readers, ranks)
    remote = any("://" in url and not url.startswith("file:") for url in dataset.urls)
    if shards < busy and remote:
        remedy = f"write smaller shards, {busy} or more, or lower --data.readers.readers"
        says = f"{shards} shards for {readers} readers and {ranks} data-parallel ranks: several read one object at once"
        return [warn(check, says, remedy)]
    return []


def missing_numbers(names: Sequence[str]) -> list[str]:
    """Return the names that a numbered series of shards lacks between its first and its last, the first few.

    Args:
        names: file names; those without a number before the suffix are left alone.
    """
    series: dict[tuple[str, int], set[int]] = {}
    for name in names:
        found = re.fullmatch(r"(.*?)(\d+)\.tar", name)
        if found:
            series.setdefault((found[1], len(found[2])), set()).add(int(found[2]))
    lacking = []
    for (prefix, digits), numbers in series.items():
        if max(numbers) - min(numbers) >= 10 * len(numbers):
            continue  # no series: dates, hashes
        lacking += [
            f"{prefix}{n:0{digits}d}.tar" for n in range(min(numbers), max(numbers)) if n not in numbers
        ]
    return lacking[:5]


def check_tokenizer(config: TokenizerConfig, vocab_size: int) -> Finding:
    """Load the tokenizer and compare its vocabulary with the language model's."""
    try:
        tokenizer = config.load()
        ids = tokenizer.encode("A flamingo.")
    except Exception as error:  # the tokenizers package raises bare exceptions
        remedy = "set --data.tokenizer.path to a GGUF file on every machine, or a folder with tokenizer.json at any URL"
        return fail("tokenizer", f"{config.kind} {config.path}: {first_line(error)}", remedy)
    if tokenizer.vocab_size != vocab_size or max(ids) >= vocab_size:
        remedy = f"set --data.tokenizer.vocab-size {vocab_size}, or the tokenizer of this language model"
        says = (
            f"{config.kind} {config.path} has {tokenizer.vocab_size} entries, the language model {vocab_size}"
        )
        return fail("tokenizer", says, remedy)
    return ok("tokenizer", f"{config.kind} {config.path or '(built in)'}: {tokenizer.vocab_size} entries")
