"""Explicit pages (paper: removed): by the words of their text and of their host's name.

The word lists are those of glin-profanity, which come down from the list that C4 was filtered with. C4 drops a
page for a single word, medicine and news among them; here a page must be full of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from urllib.parse import urlsplit

from data_pipeline.building.config import TextConfig

MIN_TERMS = 3
"""Different listed terms that an explicit text holds at least: a report about one crime repeats one word."""
_LISTS = {
    "cs": "czech",
    "da": "danish",
    "de": "german",
    "en": "english",
    "eo": "esperanto",
    "es": "spanish",
    "fi": "finnish",
    "fr": "french",
    "hu": "hungarian",
    "it": "italian",
    "nl": "dutch",
    "no": "norwegian",
    "pl": "polish",
    "pt": "portuguese",
    "ru": "russian",
    "sv": "swedish",
    "tr": "turkish",
}
"""Lists by language; those of languages that put no spaces between words are of no use here."""
_WORD = re.compile(r"[^\W_]+")
_PLAIN = re.compile(r"[\w\s'-]+")
_HOST_PARTS = re.compile(
    r"porn|xxx|hentai|camgirl|sexcam|xvideo|(?<![^\W_])(?:sex|nudes?|milf|bdsm|nsfw|erotica?)(?![^\W_])"
)
"""Parts of a host's name that mean one thing wherever they stand, and words that do so only by themselves."""


def explicit_fault(text: str, url: str, config: TextConfig) -> tuple[str, str] | None:
    """Return why a page counts as explicit, or None.

    Args:
        text: all text of the page.
        url: its address, or "".
        config: the languages whose lists count, and the largest share of listed words.
    """
    host = _host(url)
    if found := _HOST_PARTS.search(host):
        return "explicit address", f"{host}: {found.group()}"
    words = _WORD.findall(text.lower())
    hits = _hits(words, _terms(tuple(sorted(config.languages))))
    listed, different = sum(map(len, hits)), len(set(hits))
    if different >= MIN_TERMS and listed > config.max_explicit * len(words):
        return "explicit text", f"{listed} of {len(words)} words, {different} different terms"
    return None


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _hits(words: Sequence[str], terms: dict[str, tuple[tuple[str, ...], ...]]) -> list[tuple[str, ...]]:
    """Find listed terms, of those that begin at one word the longest."""
    hits = []
    for start, word in enumerate(words):
        for term in terms.get(word, ()):
            if tuple(words[start : start + len(term)]) == term:
                hits.append(term)
                break
    return hits


@lru_cache(maxsize=8)
def _terms(languages: tuple[str, ...]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Load the lists of languages, of all without any: terms as words, by their first, longest first."""
    names = [name for code, name in _LISTS.items() if not languages or code in languages]
    by_first: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        blob = files("glin_profanity").joinpath(f"data/dictionaries/{name}.json").read_text(encoding="utf-8")
        for term in json.loads(blob)["words"]:
            if _PLAIN.fullmatch(term):  # others spell a listed word with signs in place of letters
                term_words = tuple(_WORD.findall(term.lower()))
                by_first.setdefault(term_words[0], set()).add(term_words)
    return {first: tuple(sorted(found, key=len, reverse=True)) for first, found in by_first.items()}
