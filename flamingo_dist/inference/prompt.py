"""Prompts for few-shot and zero-shot evaluation (paper, section "Evaluation" and appendix on prompts).

A prompt of two shots and a query reads `<BOS><image>Output: a cat<EOC><image>Output: a
dog<EOC><image>Output:`. Token ids and the text encoder come in as arguments, so this module knows no
tokenizer.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Encode: TypeAlias = Callable[[str], list[int]]
"""Text to token ids, without any special token of its own."""

Fields: TypeAlias = Mapping[str, str]
"""What a template is filled with, such as {"caption": "a cat"}."""


@dataclass(frozen=True, kw_only=True)
class PromptIds:
    """Ids of the special tokens."""

    bos: int | None
    """Start of a sequence; None for a vocabulary without one."""
    image: int
    """`<image>`: stands where a medium (an image or a video) was."""
    eoc: int
    """`<EOC>`, end of chunk: closes the text that belongs to one medium."""
    eos: int | None
    """End of a document; None for a vocabulary without one."""
    further: tuple[int, ...] = ()
    """Further tokens of the network, such as an instruct model's `<end_of_utterance>`."""
    wrapped: bool = False
    """Whether an `<EOC>` stands before and after every `<image>`, as IDEFICS has its `<fake_token_around_image>`."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text: `<EOC>`, EOS where there is one, and the further ones."""
        return (self.eoc, *(() if self.eos is None else (self.eos,)), *self.further)

    @property
    def never_generated(self) -> tuple[int, ...]:
        """Ids that must not be generated: a new `<image>` would point at a medium that does not exist."""
        return (self.image,) if self.bos is None else (self.image, self.bos)


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Text around an answer, as `str.format` templates."""

    shot: str = "Output: {caption}"
    """Text of one complete example."""
    query: str = "Output:"
    """Text up to where the answer starts: the beginning of `shot`, in tokens as well."""


CAPTIONING = PromptTemplate()
"""The paper's captioning prompt."""

QUESTION_ANSWERING = PromptTemplate(
    shot="Question: {question} Answer: {answer}", query="Question: {question} Answer:"
)
"""The paper's visual question answering prompt."""

PLAIN_CAPTION = PromptTemplate(shot="{caption}", query="")
"""Captions as they stand in image-text training data: `<image>{caption}<EOC>`."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens of a prompt and, for each, the medium it sees."""

    tokens: tuple[int, ...]
    """Token ids."""
    media_index: tuple[int, ...]
    """phi of the paper: 0 = sees nothing, m in 1..M = sees medium m only; one entry a token."""

    @property
    def num_media(self) -> int:
        """Number of media that the prompt speaks of, the query's included."""
        return max(self.media_index, default=0)


def phi(tokens: Sequence[int], image_id: int) -> tuple[int, ...]:
    """Index of the last medium at or before each token (paper, section 2.3; `<image>` sees its own medium).

    Args:
        tokens: Token ids, length T.
        image_id: Id of `<image>`.

    Returns:
        T integers: 0 before the first `<image>`, then the number of `<image>` met so far.
    """
    index, seen = [], 0
    for token in tokens:
        seen += token == image_id
        index.append(seen)
    return tuple(index)


def few_shot_prompt(
    shots: Sequence[Fields],
    query: Fields | None = None,
    *,
    ids: PromptIds,
    encode: Encode,
    template: PromptTemplate = CAPTIONING,
) -> Prompt:
    """Build `<BOS>` + one `<image>shot<EOC>` per shot + `<image>query`.

    Args:
        shots: Support examples in the order in which they are shown; with RICES the most similar comes last.
            Their media are 1..len(shots), the query's medium is len(shots) + 1. May be empty: a bare query.
        query: Fields of the query's template, such as {"question": ...}; none for captioning.
        ids: Ids of the special tokens.
        encode: Text to token ids.
        template: Text around an answer.

    Returns:
        The prompt, which ends where the answer starts.
    """
    examples = [("", True, template.shot.format(**shot)) for shot in shots]
    return _assemble([*examples, _query(query, template)], ids, encode)


def zero_shot_prompt(
    text_examples: Sequence[Fields],
    query: Fields | None = None,
    *,
    ids: PromptIds,
    encode: Encode,
    template: PromptTemplate = CAPTIONING,
) -> Prompt:
    """Build the paper's zero-shot prompt: two examples of the task without their images, then the query.

    `<BOS>Output: {caption 1}<EOC>Output: {caption 2}<EOC><image>Output:`. The examples show the form of the
    answer and no image. The paper found one example harmful (the model copies it) and more than two of little
    use.

    Args:
        text_examples: The examples, two in the paper.
        query: Fields of the query's template.
        ids: Ids of the special tokens.
        encode: Text to token ids.
        template: Text around an answer.

    Returns:
        The prompt; the query's medium is the only one, index 1.
    """
    if len(text_examples) == 1:
        warnings.warn(
            "zero_shot_prompt got 1 text-only example, which the paper found harmful: give 2, or none",
            stacklevel=2,
        )
    examples = [("", False, template.shot.format(**example)) for example in text_examples]
    return _assemble([*examples, _query(query, template)], ids, encode)


IMAGE = "<image>"
"""Says in a user's own text where its image stands."""


def prompt_of_texts(texts: Sequence[str], *, ids: PromptIds, encode: Encode) -> Prompt:
    """Build a prompt of texts that have an image each, the last of which is to be continued.

    Examples are closed by `<EOC>`, or by the further token that they end with, such as `<end_of_utterance>`.

    Args:
        texts: Examples in their order and the query; the image stands where `<image>` does, or before the text.
        ids: Ids of the special tokens.
        encode: Text to token ids.

    Returns:
        The prompt; text m has medium m, counted from 1.

    Raises:
        ValueError: A text has more than one `<image>`.
    """
    pieces = []
    for text in texts:
        before, found, after = text.partition(IMAGE)
        if IMAGE in after:
            raise ValueError(
                f"{text!r} holds {IMAGE} more than once; a text has one image, here or in front."
            )
        pieces.append((before, True, after) if found else ("", True, text))
    return _assemble(pieces, ids, encode)


def answer_tokens(
    fields: Fields, *, ids: PromptIds, encode: Encode, template: PromptTemplate = CAPTIONING
) -> tuple[int, ...]:
    """Tokens that continue a prompt's query with an answer, closed by `<EOC>`.

    The answer is cut out of the encoded example instead of being encoded alone: `Output: cat` holds the token
    " cat", which "cat" by itself does not give.

    Args:
        fields: Fields of the whole example, the answer included, such as {"caption": "a cat"}.
        ids: Ids of the special tokens.
        encode: Text to token ids.
        template: Text around an answer.

    Returns:
        Token ids of the answer and `<EOC>`.

    Raises:
        ValueError: The tokens of the template's query are no beginning of the example's tokens.
    """
    example, opening = encode(template.shot.format(**fields)), encode(template.query.format(**fields))
    if example[: len(opening)] != opening:
        raise ValueError(
            f"the query {template.query!r} gives tokens {opening}, but the example {template.shot!r} starts "
            f"with {example[: len(opening)]}: write the template so that the query ends at a token boundary, "
            "without a trailing space"
        )
    return (*example[len(opening) :], ids.eoc)


_Piece: TypeAlias = tuple[str, bool, str]
"""Text before the image, whether there is an image, text after it."""


def _query(fields: Fields | None, template: PromptTemplate) -> _Piece:
    return "", True, template.query.format(**(fields or {}))


def _assemble(pieces: Sequence[_Piece], ids: PromptIds, encode: Encode) -> Prompt:
    """Join examples and the query, which comes last; an example is closed unless it ends in a token that closes it."""
    tokens = [] if ids.bos is None else [ids.bos]
    for number, (before, has_image, after) in enumerate(pieces, start=1):
        start = len(tokens)
        tokens += encode(before) if before else []
        if has_image:
            _show(tokens, ids)
        tokens += encode(after) if after else []
        closed = tokens[start:] and tokens[-1] in (ids.eoc, *ids.further)
        if number < len(pieces) and not closed:
            tokens.append(ids.eoc)
    return Prompt(tokens=tuple(tokens), media_index=phi(tokens, ids.image))


def _show(tokens: list[int], ids: PromptIds) -> None:
    """Append an image; where images are wrapped, the `<EOC>` that closes an example is the next image's first."""
    if ids.wrapped and tokens[-1:] != [ids.eoc]:
        tokens.append(ids.eoc)
    tokens += [ids.image, ids.eoc] if ids.wrapped else [ids.image]
