"""VQA accuracy by the official rules, one case a rule, and exact match."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_dist.evaluation.answers import exact_match, normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A Dog", "dog"),  # case and articles
        ("the an a", ""),
        ("two dogs", "2 dogs"),  # number words
        ("None", "0"),
        ("twenty", "twenty"),
        ("ten.", "10"),
        ("yes.", "yes"),  # periods, but in numbers
        ("3.5", "3.5"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("dont", "don't"),  # contractions get their apostrophes
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # the official table has this one turned round
        ("someonell", "someone'll"),
        ("don't", "don't"),
        ("red-blue", "red blue"),  # a sign between words parts them
        ("red - blue", "red blue"),  # beside a space it goes: all of its kind
        ("t-shirt - red", "tshirt red"),
        ("1,000", "1000"),  # a comma between digits: every sign goes
        ("1,000/day", "1000day"),
        ("left/right", "left right"),
        ("what?!", "what"),
        ('"stop"', "stop"),
        ("it's", "it's"),
        ("a: b", "a: b"),  # a colon is none of their signs
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_ten_annotators(agreeing: int, expected: float) -> None:
    """Of ten, n who agree give min(n / 3, 1) over the ten ways to leave one out."""
    annotators = ["cat"] * agreeing + [f"dog {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("cat", annotators) == pytest.approx(expected)


def test_people_who_all_wrote_the_same_are_compared_as_they_are() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy("two", ["2"] * 5 + ["two"] * 5) == 1.0


@given(st.text("abc .,'?-12", max_size=12), st.lists(st.text("ab 12", max_size=4), min_size=1, max_size=10))
def test_accuracy_is_a_share_and_does_not_depend_on_the_order(answer: str, annotators: list[str]) -> None:
    accuracy = vqa_accuracy(answer, annotators)
    assert 0 <= accuracy <= 1
    assert accuracy == pytest.approx(vqa_accuracy(answer, annotators[::-1]))
    assert exact_match(annotators[0], annotators) == 1.0


def test_exact_match() -> None:
    assert exact_match("The Cat.", ["cat"]) == 1.0
    assert exact_match("a black cat", ["cat"]) == 0.0
    assert exact_match("2", ["dog", "two"]) == 1.0


def test_no_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="no annotators"):
        vqa_accuracy("cat", [])
    with pytest.raises(ValueError, match="no accepted answers"):
        exact_match("cat", [])
