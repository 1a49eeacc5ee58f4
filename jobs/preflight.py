"""What the driver looks at before it starts any process, so that a run that cannot be right fails at once."""

import warnings

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
