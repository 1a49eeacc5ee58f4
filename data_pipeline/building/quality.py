"""Text quality and repetition: the rules of MassiveWeb (Gopher, arXiv 2112.11446, table A1 and section A.1.1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from data_pipeline.building.config import CaptionConfig, TextConfig
from data_pipeline.building.explicit import explicit_fault

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
MIN_STOP_WORDS = 2
WORD_LENGTH = (3.0, 10.0)
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES = 0.9
MAX_ELLIPSIS_LINES = 0.3
MIN_ALPHABETIC_WORDS = 0.8
MAX_DUPLICATES = {
    "line": 0.30,
    "paragraph": 0.30,
    "characters in duplicate lines": 0.20,
    "characters in duplicate paragraphs": 0.20,
}
MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_BULLETS = ("•", "‣", "◦", "▪", "●", "-", "*", "·", "\u2013")
_ELLIPSES = ("...", "…")
_LETTERS = re.compile(r"[^\W\d_]")
_DETECTED_CHARS = 4000


def text_fault(text: str, config: TextConfig, url: str = "") -> tuple[str, str] | None:
    """Return the first rule that a document breaks, with what was found, or None.

    Args:
        text: all text of the document.
        config: which rules hold.
        url: address of the document, where it has one.
    """
    if len(text) > config.max_chars:
        return f"over {config.max_chars} characters", str(len(text))
    words = text.split()
    # Length first: of a few words no language can be told.
    if config.quality and (fault := length_fault(words, config)):
        return fault
    if config.languages and (
        fault := language_fault(text, config.languages, config.min_language_probability)
    ):
        return fault
    if config.explicit and (fault := explicit_fault(text, url, config)):
        return fault
    if config.quality and (fault := quality_fault(text, words, config)):
        return fault
    if config.repetition and (fault := repetition_fault(text, words)):
        return fault
    return None


def caption_fault(caption: str, config: CaptionConfig) -> tuple[str, str] | None:
    """Return why a caption is of no use, or None."""
    if not caption.strip():
        return "empty caption", ""
    if len(caption) > config.max_chars:
        return f"caption over {config.max_chars} characters", str(len(caption))
    if len(caption.split()) < config.min_words:
        return f"caption under {config.min_words} words", caption
    return language_fault(caption, config.languages, 0.0) if config.languages else None


@lru_cache(maxsize=1)
def _detector() -> Any:
    """Load the language model once a process; it comes with the package, as plain arrays."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_fault(text: str, languages: Sequence[str], least: float) -> tuple[str, str] | None:
    """Return the fault of a text that is not in one of the languages, or None."""
    found, probability = _detector().classify(text[:_DETECTED_CHARS])
    if found not in languages:
        return "language", f"{found} ({probability:.2f})"
    if probability < least:
        return "language uncertain", f"{found} ({probability:.2f})"
    return None


def length_fault(words: Sequence[str], config: TextConfig) -> tuple[str, str] | None:
    """Apply the limits of a document's length in words."""
    if len(words) < config.min_words:
        return f"under {config.min_words} words", str(len(words))
    if len(words) > config.max_words:
        return f"over {config.max_words} words", str(len(words))
    return None


def quality_fault(text: str, words: Sequence[str], config: TextConfig) -> tuple[str, str] | None:
    """Apply the quality rules to a text and its words, but those of length."""
    count = len(words)
    length = sum(map(len, words)) / max(1, count)
    if not WORD_LENGTH[0] <= length <= WORD_LENGTH[1]:
        return "mean word length outside 3 to 10", f"{length:.1f}"
    hashes, ellipses = text.count("#"), sum(text.count(mark) for mark in _ELLIPSES)
    if max(hashes, ellipses) > MAX_SYMBOLS_PER_WORD * count:
        return "too many symbols", f"{hashes} hashes, {ellipses} ellipses, {count} words"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    bullets = sum(line.startswith(_BULLETS) for line in lines)
    if bullets > MAX_BULLET_LINES * len(lines):
        return "bullet lines", f"{bullets} of {len(lines)}"
    open_ended = sum(line.endswith(_ELLIPSES) for line in lines)
    if open_ended > MAX_ELLIPSIS_LINES * len(lines):
        return "lines that end in an ellipsis", f"{open_ended} of {len(lines)}"
    alphabetic = sum(1 for word in words if _LETTERS.search(word))
    if alphabetic < MIN_ALPHABETIC_WORDS * count:
        return "words without letters", f"{count - alphabetic} of {count}"
    # Gopher's list is English; corpora of several languages are measured by the other rules alone.
    if config.languages == ("en",):
        found = STOP_WORDS.intersection(word.lower().strip(".,;:!?\"'()") for word in words)
        if len(found) < MIN_STOP_WORDS:
            return "too few stop words", ", ".join(sorted(found)) or "none"
    return None


def repetition_fault(text: str, words: Sequence[str]) -> tuple[str, str] | None:
    """Apply the repetition rules to a text and its words."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    shares = {
        "line": _duplicate_share(lines),
        "paragraph": _duplicate_share(paragraphs),
        "characters in duplicate lines": _duplicate_characters(lines, len(text)),
        "characters in duplicate paragraphs": _duplicate_characters(paragraphs, len(text)),
    }
    for name, share in shares.items():
        if share > MAX_DUPLICATES[name]:
            return f"repetition: {name}", f"{share:.2f}"
    lowered = [word.lower() for word in words]
    characters = max(1, sum(map(len, lowered)))
    for n, most in MAX_TOP_NGRAM.items():
        share = _top_ngram_characters(lowered, n) / characters
        if share > most:
            return f"repetition: top {n}-gram", f"{share:.2f}"
    for n, most in MAX_DUPLICATE_NGRAMS.items():
        share = _duplicate_ngram_characters(lowered, n) / characters
        if share > most:
            return f"repetition: duplicate {n}-grams", f"{share:.2f}"
    return None


def _duplicate_share(parts: Sequence[str]) -> float:
    """Share of the parts that occurred before."""
    return (len(parts) - len(set(parts))) / len(parts) if parts else 0.0


def _duplicate_characters(parts: Sequence[str], characters: int) -> float:
    """Share of a text's characters that lie in parts that occurred before."""
    seen: set[str] = set()
    repeated = 0
    for part in parts:
        repeated += len(part) if part in seen else 0
        seen.add(part)
    return repeated / max(1, characters)


def _top_ngram_characters(words: Sequence[str], n: int) -> int:
    """Characters in the occurrences of the most frequent n-gram; none where every n-gram occurs once."""
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not grams:
        return 0
    # Of equally frequent ones the longest: the outcome must not hang on the order of a dictionary.
    top = max(grams.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
    return top[1] * sum(map(len, top[0])) if top[1] > 1 else 0


def _duplicate_ngram_characters(words: Sequence[str], n: int) -> int:
    """Characters in n-grams that occurred before; one that lies in several of them counts once."""
    seen: set[tuple[str, ...]] = set()
    covered = repeated = 0
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            first = max(covered, start)
            repeated += sum(map(len, words[first : start + n]))
            covered = start + n
        seen.add(gram)
    return repeated
