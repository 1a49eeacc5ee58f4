"""What each query is asked: its demonstrations, its prompt and the media that it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from flamingo_dist.evaluation.demonstrations import drawn, nearest, shuffles
from flamingo_dist.inference.prompt import (
    Prompt,
    PromptIds,
    PromptTemplate,
    answer_tokens,
    few_shot_prompt,
    zero_shot_prompt,
)
from flamingo_dist.models.lm_config import LMConfig
from jobs.evaluate.examples import Example
from jobs.evaluate.media import MediaStore, place_of
from jobs.evaluate.settings import EvaluateArguments
from jobs.network_tokenizer import encoding

_FIRST_MARK = 0xE000
"""Unicode's first sign for private use."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One query with a number of shots."""

    query: Example
    """The query."""
    demonstrations: tuple[Example, ...]
    """What its prompt shows before it, in order."""
    prompts: tuple[Prompt, ...]
    """One, or several of equal length with the demonstrations in other orders."""
    media: tuple[tuple[str, ...], ...]
    """For each prompt the media of the store that it shows, in order."""


class Prompter:
    """Makes the prompts of an evaluation; equal for equal keys, whatever rank or batch asks."""

    def __init__(
        self,
        arguments: EvaluateArguments,
        tokenizer: Tokenizer,
        ids: PromptIds,
        lm: LMConfig,
        *,
        support: Sequence[Example],
        store: MediaStore,
        names: Mapping[str, int] | None = None,
    ) -> None:
        """Hold what prompts are made of.

        Args:
            arguments: the evaluation's.
            tokenizer: of the language model.
            ids: its special ids.
            lm: the language model.
            support: the support set, without examples whose media cannot be shown.
            store: where media's features are.
            names: ids of further tokens that a template may name, such as `<end_of_utterance>`; data cannot.
        """
        self.arguments, self.tokenizer, self.ids, self.lm = arguments, tokenizer, ids, lm
        self._support, self._keys, self._store = support, [example.key for example in support], store
        self._pooled_NC: Tensor | None = None
        if arguments.select == "rices" and max(arguments.shots):
            self._pooled_NC = store.pooled_NC[[store.row[place_of(example)] for example in support]]
        self._orders: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}
        self._answers: dict[tuple[str, str], tuple[int, ...]] = {}
        # In a template a named token is a sign that no data keep, so that what data spell stays text.
        marks = {chr(_FIRST_MARK + i): name for i, name in enumerate(names or {})}
        self._marked = {mark: (names or {})[name] for mark, name in marks.items()}
        self.template = arguments.template
        for mark, name in marks.items():
            self.template = PromptTemplate(
                shot=self.template.shot.replace(name, mark), query=self.template.query.replace(name, mark)
            )

    def _fields(self, example: Example) -> dict[str, str]:
        """Return what a template is filled with."""
        removed = dict.fromkeys(map(ord, self._marked))
        return {name: value.translate(removed) for name, value in example.fields.items()}

    def ask(self, query: Example, shots: int) -> Asked:
        """Return the prompt of a query with so many shots.

        Raises:
            ValueError: a template's field is in no example, or the support set is too small.
        """
        text_shots = self.arguments.text_shots if shots == 0 else 0
        most = shots or text_shots
        if self._pooled_NC is not None and shots:
            nearest_last = self._nearest(query, self._pooled_NC)
            chosen = nearest_last[max(len(nearest_last) - most, 0) :]
        else:
            chosen = drawn(query.key, self._keys, seed=self.arguments.seed)[:most]
        if len(chosen) < most:
            raise ValueError(
                f"{most} demonstrations of query {query.key}: the support set has {len(chosen)} readable examples "
                "beside the query itself; ask for fewer --shots, or give more --support."
            )
        shown = [self._support[place] for place in chosen]
        if text_shots:
            return self._asked(query, shown, [[]], text_only=True)
        orders = shuffles(query.key, shots, self.arguments.orders, seed=self.arguments.seed)
        return self._asked(query, shown, [[shown[place] for place in order] for order in orders])

    def _nearest(self, query: Example, pooled_NC: Tensor) -> list[int]:
        """Return the nearest of the support set for the most shots, of which fewer shots take the last ones."""
        if query.key not in self._orders:
            query_C = self._store.pooled_NC[self._store.row[place_of(query)]]
            self._orders[query.key] = nearest(
                query.key, query_C, self._keys, pooled_NC, most=max(self.arguments.shots)
            )
        return self._orders[query.key]

    def _encode(self, text: str) -> list[int]:
        """Encode a text; those of the support set come again and again."""
        if text not in self._tokens:
            self._tokens[text] = self._encode_marked(text)
        return self._tokens[text]

    def _encode_marked(self, text: str) -> list[int]:
        return encoding(self.tokenizer.encode, self._marked)(text)

    def _asked(
        self,
        query: Example,
        shown: Sequence[Example],
        orders: Sequence[Sequence[Example]],
        *,
        text_only: bool = False,
    ) -> Asked:
        """Make the prompts, one for each order; text-only examples show no media."""
        make = zero_shot_prompt if text_only else few_shot_prompt
        try:
            prompts = tuple(
                make(
                    [self._fields(example) for example in (shown if text_only else order)],
                    self._fields(query),
                    ids=self.ids,
                    encode=self._encode,
                    template=self.template,
                )
                for order in orders
            )
        except (KeyError, IndexError) as error:
            known = sorted(set(query.fields).intersection(*(example.fields for example in shown)))
            raise ValueError(
                f"the prompt {self.arguments.template.shot!r} wants the field {error}, and the example "
                f"{query.key} or one of its demonstrations lacks it; all have {known}. Write a literal brace twice."
            ) from error
        media = tuple(tuple(place_of(example) for example in (*order, query)) for order in orders)
        return Asked(query=query, demonstrations=tuple(shown), prompts=prompts, media=media)

    def answers(self, query: Example, names: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the tokens that continue a query's prompt with each name, closed by `<EOC>`."""
        fields = self._fields(query)
        opening = self.template.query.format(**fields)
        return [self._answer(fields, opening, name) for name in names]

    def _answer(self, fields: Mapping[str, str], opening: str, name: str) -> tuple[int, ...]:
        found = self._answers.get((opening, name))
        if found is None:
            found = self._answers[opening, name] = answer_tokens(
                {**fields, "label": name},
                ids=self.ids,
                encode=self._encode_marked,
                template=self.template,
            )
        return found

    def check_length(self, asked: Asked, names: Sequence[str]) -> None:
        """Refuse a prompt that leaves no room for its answer.

        Raises:
            ValueError: says how many tokens there are, and may be.
        """
        table = self.lm.max_positions if self.lm.positions == "learned" else 0
        limits = [limit for limit in (table, self.arguments.context) if limit]
        if not limits:
            return
        if self.arguments.is_open_ended:
            longest = self.arguments.new_tokens
        else:
            longest = max(map(len, self.answers(asked.query, names)))
        tokens = len(asked.prompts[0].tokens)
        if tokens + longest > min(limits):
            raise ValueError(
                f"query {asked.query.key} with {len(asked.demonstrations)} demonstrations has a prompt of {tokens} "
                f"tokens, {tokens + longest} with its answer, and {min(limits)} are allowed "
                f"({'the table of learned positions' if min(limits) == table else '--context'}): ask for fewer --shots."
            )
