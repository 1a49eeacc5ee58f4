"""Words of a caption, as the Stanford tokenizer gives them to pycocoevalcap's metrics; in Python, without Java."""

import re


def caption_tokens(caption: str) -> list[str]:
    """Split a caption into lower-case words, without punctuation.

    Args:
        caption: as people or networks write it.
    """
    return re.findall(r"[\w]+", caption.lower())
