"""What the driver looks at before it starts any process, so that a run that cannot be right fails at once."""

import warnings

from data_pipeline.index import open_index
from jobs.config import RunConfig
from jobs.doctor.data import check_tokenizer

RANDOM_ON_PURPOSE = ("smoke",)
"""Recipes whose frozen parts are random because the run is to show that it runs, not to learn."""


def check_vocabulary(config: RunConfig) -> None:
    """Load the tokenizer and compare its vocabulary with the language model's.

    With another, `<image>` and `<EOC>` would be rows of other tokens, and nothing would say so.

    Raises:
        ValueError: they differ, or the tokenizer cannot be loaded.
    """
    finding = check_tokenizer(config.data.tokenizer, config.model.lm.vocab_size)
    if finding.level == "fail":
        raise ValueError(f"{finding.check}: {finding.says}; {finding.remedy}.")


def check_held_out(config: RunConfig) -> None:
    """Open the held-out data sets and compare their samples with what is captioned after the last step.

    Raises:
        FileNotFoundError: shards are missing.
        ValueError: a data set has too few samples, readable or not.
    """
    held_out = config.data.held_out
    samples = {name: open_index(d.urls, storage=d.storage()).num_samples for name, d in held_out.items()}
    captions, ranks = config.captions, config.resources.workers // config.parallel.tensor
    if not captions.dataset:
        return
    wanted = [
        ("count", captions.dataset, -(-captions.count // ranks) * ranks, captions.count),
        ("shots", captions.support or captions.dataset, captions.shots, captions.shots),
    ]
    for name, dataset, needed, given in wanted:
        if samples[dataset] < needed:
            raise ValueError(
                f"captions.{name}={given} needs {needed} samples of data.held_out.{dataset} ({ranks} data-parallel "
                f"ranks), which has {samples[dataset]}; lower --captions.{name}, or hold out more."
            )


def random_parts(config: RunConfig) -> dict[str, str]:
    """Return the frozen parts that no published weights fill, by what would name them on the command line."""
    model, vision = config.model, config.model.vision
    found = {}
    if model.weights is None and model.lm.weights is None:
        found["the frozen language model"] = "--model.lm.weights"
    if not vision.weights:
        other = "" if vision.is_nfnet else "--model.vision.name and "
        found[f"the frozen vision encoder ({vision.name})"] = f"{other}--model.vision.weights"
    return found


def warn_of_random_parts(config: RunConfig) -> None:
    """Warn where a run would train around frozen parts that know nothing; not where that is what it is for."""
    if config.recipe in RANDOM_ON_PURPOSE:
        return
    for part, setting in random_parts(config).items():
        warnings.warn(
            f"{part} is random: what is trained around it will be worth nothing; give {setting}, unless it is meant.",
            stacklevel=3,
        )
