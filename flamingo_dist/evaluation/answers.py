"""Accuracy of short answers: VQA accuracy with the official normalisation, and exact match.

Rules of https://visualqa.org/evaluation.html as the official code has them, oddities included: figures are compared
with those of others, which come from that code.
"""

import re
from collections.abc import Sequence

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS.split())} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official code passes a flag of this value where the number of replacements belongs."""

_BARE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
    "you'd you'll you're you've"
)
"""Contractions that are known without any apostrophe."""
_DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
)
"""Contractions that are known with one of their two apostrophes."""
_CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _BARE.split()},
    **{"".join(word.rsplit("'", 1)): word for word in _DOUBLE.split()},
    **{word.replace("'", "", 1): word for word in _DOUBLE.split()},
    **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
    **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
    "somebody'd": "somebodyd",
}


def normalised(answer: str) -> str:
    """Return an answer without punctuation, articles and case, numbers as digits, contractions with apostrophes."""
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(answer).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Return the VQA accuracy of one answer: min(n / 3, 1) of those who agree, averaged over leaving each one out.

    As in the official code nothing is normalised where all annotators wrote the same.

    Args:
        answer: what was generated.
        annotators: what people answered, one each (ten in VQAv2).

    Raises:
        ValueError: no annotator.
    """
    if not annotators:
        raise ValueError("vqa_accuracy() got no annotators' answers; give at least one.")
    answer, *people = (_one_line(text) for text in (answer, *annotators))
    if len(set(people)) > 1:
        answer, *people = (normalised(text) for text in (answer, *people))
    agreeing = [person == answer for person in people]
    return sum(min((sum(agreeing) - own) / 3, 1.0) for own in agreeing) / len(people)


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """Return 1 where a normalised answer equals one of the accepted ones, else 0.

    Args:
        answer: what was generated.
        answers: what is accepted; one in MSVDQA.

    Raises:
        ValueError: no accepted answer.
    """
    if not answers:
        raise ValueError("exact_match() got no accepted answers; give at least one.")
    return float(normalised(_one_line(answer)) in {normalised(_one_line(accepted)) for accepted in answers})


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Drop punctuation that stands beside a space, or all of it where a comma parts digits; else put a space."""
    drop_all = _DIGITS_AROUND_COMMA.search(text) is not None
    out = text
    for sign in _PUNCTUATION:
        drop = drop_all or f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if drop else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)
