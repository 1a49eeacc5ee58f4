"""What the driver looks at before it starts any process, so that a run that cannot be right fails at once."""

from jobs.config import RunConfig
from jobs.doctor.data import check_tokenizer


def check_vocabulary(config: RunConfig) -> None:
    """Load the tokenizer and compare its vocabulary with the language model's.

    With another, `<image>` and `<EOC>` would be rows of other tokens, and nothing would say so.

    Raises:
        ValueError: they differ, or the tokenizer cannot be loaded.
    """
    finding = check_tokenizer(config.data.tokenizer, config.model.lm.vocab_size)
    if finding.level == "fail":
        raise ValueError(f"{finding.check}: {finding.says}; {finding.remedy}.")
