from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_dist.inference.prompt import (
    PLAIN_CAPTION,
    QUESTION_ANSWERING,
    PromptIds,
    PromptTemplate,
    answer_tokens,
    few_shot_prompt,
    phi,
    prompt_of_texts,
    zero_shot_prompt,
)

IDS = PromptIds(bos=300, image=301, eoc=302, eos=303)
CAPTIONS = st.lists(st.text(alphabet="abc ", min_size=1, max_size=6), max_size=5)


def encode(text: str) -> list[int]:
    return list(text.encode())


def spell(tokens: tuple[int, ...]) -> str:
    names = {300: "<BOS>", 301: "<image>", 302: "<EOC>", 303: "<EOS>"}
    return "".join(names.get(token) or chr(token) for token in tokens)


def test_few_shot_prompt_reads_as_in_the_paper() -> None:
    prompt = few_shot_prompt([{"caption": "a cat"}, {"caption": "a dog"}], ids=IDS, encode=encode)
    expected = "<BOS><image>Output: a cat<EOC><image>Output: a dog<EOC><image>Output:"
    assert spell(prompt.tokens) == expected
    assert prompt.num_media == 3


def test_zero_shot_prompt_has_two_texts_without_images() -> None:
    prompt = zero_shot_prompt([{"caption": "a cat"}, {"caption": "a dog"}], ids=IDS, encode=encode)
    assert spell(prompt.tokens) == "<BOS>Output: a cat<EOC>Output: a dog<EOC><image>Output:"
    image = prompt.tokens.index(301)
    assert set(prompt.media_index[:image]) == {0}
    assert set(prompt.media_index[image:]) == {1}


def test_question_template_and_plain_captions() -> None:
    shots = [{"question": "What?", "answer": "a cat"}]
    prompt = few_shot_prompt(shots, {"question": "Who?"}, ids=IDS, encode=encode, template=QUESTION_ANSWERING)
    assert (
        spell(prompt.tokens) == "<BOS><image>Question: What? Answer: a cat<EOC><image>Question: Who? Answer:"
    )
    prompt = few_shot_prompt([{"caption": "a cat"}], ids=IDS, encode=encode, template=PLAIN_CAPTION)
    assert spell(prompt.tokens) == "<BOS><image>a cat<EOC><image>"


def test_vocabulary_without_bos_and_eos() -> None:
    ids = PromptIds(bos=None, image=301, eoc=302, eos=None)
    assert few_shot_prompt([], ids=ids, encode=encode).tokens[0] == 301
    assert (ids.stop_ids, ids.never_generated) == ((302,), (301,))
    assert (IDS.stop_ids, IDS.never_generated) == ((302, 303), (301, 300))


def test_texts_with_an_image_each() -> None:
    texts = ["a cat", "look at <image>a dog", "Question: what? Answer:"]
    prompt = prompt_of_texts(texts, ids=IDS, encode=encode)
    assert spell(prompt.tokens) == (
        "<BOS><image>a cat<EOC>look at <image>a dog<EOC><image>Question: what? Answer:"
    )
    assert prompt.num_media == 3
    assert prompt_of_texts([""], ids=IDS, encode=encode).tokens == (300, 301)
    with pytest.raises(ValueError, match="more than once"):
        prompt_of_texts(["<image> and <image>"], ids=IDS, encode=encode)


def test_wrapped_images() -> None:
    """As IDEFICS: the token that closes an example opens the next image, if it comes at once."""
    ids = replace(IDS, wrapped=True, further=(304,))
    prompt = prompt_of_texts(["a", "b <image>", "c"], ids=ids, encode=encode)
    assert spell(prompt.tokens) == "<BOS><EOC><image><EOC>a<EOC>b <EOC><image><EOC><image><EOC>c"
    shots = [{"caption": "a cat"}]
    wrapped = few_shot_prompt(shots, ids=ids, encode=encode, template=PLAIN_CAPTION)
    assert spell(wrapped.tokens) == "<BOS><EOC><image><EOC>a cat<EOC><image><EOC>"

    def encode_turns(text: str) -> list[int]:
        return [304 if character == "|" else ord(character) for character in text]

    dialogue = prompt_of_texts(["a|b|", "c"], ids=ids, encode=encode_turns)
    assert spell(dialogue.tokens) == "<BOS><EOC><image><EOC>a|b|<EOC><image><EOC>c".replace("|", chr(304))


def test_one_text_only_example_warns() -> None:
    with pytest.warns(UserWarning, match="harmful"):
        zero_shot_prompt([{"caption": "a"}], ids=IDS, encode=encode)


@settings(deadline=None)
@given(CAPTIONS)
def test_phi_points_each_shot_at_its_own_medium(captions: list[str]) -> None:
    prompt = few_shot_prompt([{"caption": caption} for caption in captions], ids=IDS, encode=encode)
    assert len(prompt.media_index) == len(prompt.tokens)
    assert prompt.media_index[0] == 0
    assert prompt.num_media == len(captions) + 1
    for medium in range(1, len(captions) + 1):
        seen_by = tuple(
            token for token, index in zip(prompt.tokens, prompt.media_index, strict=True) if index == medium
        )
        assert spell(seen_by) == f"<image>Output: {captions[medium - 1]}<EOC>"


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 2, 301])))
def test_phi_counts_the_images_so_far(tokens: list[int]) -> None:
    assert phi(tokens, 301) == tuple(tokens[: place + 1].count(301) for place in range(len(tokens)))


@settings(deadline=None)
@given(CAPTIONS.filter(bool))
def test_an_answer_continues_the_query(captions: list[str]) -> None:
    fields = {"caption": captions[0]}
    query = few_shot_prompt([], ids=IDS, encode=encode).tokens
    shot = few_shot_prompt([fields], ids=IDS, encode=encode).tokens
    whole = query + answer_tokens(fields, ids=IDS, encode=encode)
    assert shot[: len(whole)] == whole


def test_a_query_that_ends_inside_a_token_is_refused() -> None:
    def encode_words(text: str) -> list[int]:
        # Tokens are words with the space before them, as byte-pair encodings have them.
        return [hash(word) for word in text.replace(" ", "| ").split("|")]

    template = PromptTemplate(shot="Output: {caption}", query="Output: ")
    with pytest.raises(ValueError, match="token boundary"):
        answer_tokens({"caption": "cat"}, ids=IDS, encode=encode_words, template=template)
    assert len(answer_tokens({"caption": "a cat"}, ids=IDS, encode=encode_words)) == 3
