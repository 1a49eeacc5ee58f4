"""Text generation for a batch of prompts (paper, section "Evaluation": beam of 3, stop at `<EOC>`).

Under data parallelism with ZeRO-3 every rank must call the model equally often, in the same way: each call
gathers the parameters of the modules that it runs. Generation is therefore a sequence of turns, each one call
with media (which runs the resampler) followed by calls with latents, and both loops end when all ranks say
so. A rank that ran out of prompts repeats its last ones and drops the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.inference.calls import AllDone, Forward, alone, evaluating
from flamingo_dist.inference.search import BeamSearch, SampleSearch, Search


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How texts are generated."""

    stop_ids: tuple[int, ...]
    """Ids that end a text: `<EOC>` and EOS (`PromptIds.stop_ids`)."""
    suppressed_ids: tuple[int, ...] = ()
    """Ids that are never generated (`PromptIds.never_generated`): a new `<image>` would have no medium."""
    max_new_tokens: int = 20
    """Length limit, the stop id included. OpenFlamingo takes 20 for captions and 5 for answers; the paper
    does not say."""
    beams: int = 1
    """1: greedy decoding or sampling. 3: the paper's beam search for open-ended tasks."""
    length_penalty: float = 0.0
    """Beams are ranked by log-likelihood / length ** length_penalty. 0 (no normalisation) is OpenFlamingo's;
    the paper does not say."""
    temperature: float = 0.0
    """0 takes the most likely token; above, tokens are drawn from softmax(logits / temperature)."""
    seed: int = 0
    """Seed of the drawing; equal on the ranks of a tensor-parallel group."""
    batch_size: int = 16
    """Most prompts in one call of the model; a beam search holds `beams` times as many rows."""
    use_cache: bool = True
    """Keep keys and values of earlier tokens (`model.new_cache()`) instead of running the whole text at each
    token."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, least in (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("beams", self.beams, 1),
            ("batch_size", self.batch_size, 1),
            ("length_penalty", self.length_penalty, 0),
            ("temperature", self.temperature, 0),
        ):
            if value < least:
                raise ValueError(f"GenerationConfig.{name} is {value}: it must be at least {least}")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(
                f"GenerationConfig has beams={self.beams} and temperature={self.temperature}: beam search "
                "draws nothing, set temperature=0 or beams=1"
            )


def generate(
    model: Forward,
    prompt_tokens: Sequence[Sequence[int]],
    media_index: Sequence[Sequence[int]],
    media: Tensor | None,
    media_mask: Tensor,
    config: GenerationConfig,
    *,
    latents_NMRE: Tensor | None = None,
    all_done: AllDone = alone,
) -> list[list[int]]:
    """Continue each prompt until a stop id or the length limit.

    New tokens see the medium that the prompt's last token sees. Prompts of equal length run together; there
    is no padding. Where ranks work in step, all of them must call this function, each with at least one
    prompt.

    Args:
        model: `Flamingo.forward`: the module or the engine around it. With `config.use_cache` it offers
            `new_cache()`, and for beam search the cache offers `reorder(rows_N)`, which keeps the given rows
            (repeats allowed).
        prompt_tokens: Token ids of N prompts, of any lengths, at least one token each.
        media_index: phi for each prompt token, of the same lengths.
        media: [N, M, F, ...], as in a batch, on the model's device; None where latents are given.
        media_mask: bool [N, M], which slots hold a real medium.
        config: How texts are generated.
        latents_NMRE: Instead of the media, what the model made of them in an earlier call, [N, M, R, E].
        all_done: Logical AND over the ranks that must stay in step.

    Returns:
        N lists of generated ids, without the stop id.

    Raises:
        ValueError: No prompts, an empty prompt, or arguments whose lengths do not match.
    """
    if (media is None) == (latents_NMRE is None):
        raise ValueError("generate() takes either media or latents_NMRE; pass None for the other.")
    shown = media if latents_NMRE is None else latents_NMRE
    assert shown is not None, "one of the two was given"
    _check(prompt_tokens, media_index, shown, media_mask)
    turns = groups_of_equal_length([len(tokens) for tokens in prompt_tokens], config.batch_size)
    texts: list[list[int]] = [[] for _ in prompt_tokens]
    with evaluating(model):
        turn = 0
        while not all_done(turn >= len(turns)):
            idle = turn >= len(turns)
            rows = turns[min(turn, len(turns) - 1)]
            tokens_NT = torch.tensor([list(prompt_tokens[row]) for row in rows], device=shown.device)
            index_NT = torch.tensor(
                [list(media_index[row]) for row in rows], device=shown.device, dtype=torch.int32
            )
            feed = _Feed(model, tokens_NT, index_NT, media_mask[rows], config)
            logits_NV = feed.start(
                None if media is None else media[rows], None if latents_NMRE is None else latents_NMRE[rows]
            )
            found = _run_turn(feed, logits_NV, len(rows), config, idle=idle, all_done=all_done)
            if not idle:
                for row, text in zip(rows, found, strict=True):
                    texts[row] = text
            turn += 1
    return texts


def _run_turn(
    feed: "_Feed",
    logits_NV: Tensor,
    sequences: int,
    config: GenerationConfig,
    *,
    idle: bool,
    all_done: AllDone,
) -> list[list[int]]:
    """Generate for one group of prompts of equal length, after which the logits are given.

    An idle rank only keeps the others company.
    """
    search = _new_search(sequences, config)
    rows_K, next_K = search.advance(logits_NV)
    while not all_done(idle or search.done):
        rows_K, next_K = search.advance(feed.extend(rows_K, next_K))
    return search.results()


def _new_search(sequences: int, config: GenerationConfig) -> Search:
    """Make the search that the configuration asks for."""
    if config.beams == 1:
        return SampleSearch(
            sequences,
            max_new_tokens=config.max_new_tokens,
            stop_ids=config.stop_ids,
            temperature=config.temperature,
            seed=config.seed,
        )
    return BeamSearch(
        sequences,
        beams=config.beams,
        max_new_tokens=config.max_new_tokens,
        stop_ids=config.stop_ids,
        length_penalty=config.length_penalty,
    )


class _Feed:
    """Feeds the rows of a search to the model: the whole text each time, or new tokens and a cache."""

    def __init__(
        self,
        model: Forward,
        tokens_NT: Tensor,
        index_NT: Tensor,
        media_mask_NM: Tensor,
        config: GenerationConfig,
    ) -> None:
        self._model = model
        self._tokens_NT = tokens_NT
        self._index_NT = index_NT
        self._media_mask_NM = media_mask_NM
        self._suppressed = list(config.suppressed_ids)
        self._cache = _new_cache(model, config)
        self._latents_NMRE: Tensor | None = None

    def start(self, media: Tensor | None, latents_NMRE: Tensor | None) -> Tensor:
        """Run the prompts with media [N, M, F, ...] or latents; return the logits [N, V] after the last token."""
        output = self._model(
            self._tokens_NT,
            self._index_NT,
            media,
            self._media_mask_NM,
            latents_BMRE=latents_NMRE,
            cache=self._cache,
            last_only=True,
        )
        self._latents_NMRE = output.latents_BMRE
        return self._last(output.logits_BTV)

    def extend(self, rows_K: Tensor, next_K: Tensor) -> Tensor:
        """Continue the rows rows_K [K] with the tokens next_K [K]; return the logits [K, V]."""
        assert self._latents_NMRE is not None, "start() comes before extend()"
        rows_K, next_K = rows_K.to(self._tokens_NT.device), next_K.to(self._tokens_NT.device)
        if not torch.equal(rows_K, torch.arange(len(self._tokens_NT), device=rows_K.device)):
            self._select(rows_K)
        self._tokens_NT = torch.cat([self._tokens_NT, next_K[:, None]], 1)
        self._index_NT = torch.cat([self._index_NT, self._index_NT[:, -1:]], 1)
        fed = slice(None) if self._cache is None else slice(-1, None)
        output = self._model(
            self._tokens_NT[:, fed],
            self._index_NT[:, fed],
            None,
            self._media_mask_NM,
            latents_BMRE=self._latents_NMRE,
            cache=self._cache,
            last_only=True,
        )
        return self._last(output.logits_BTV)

    def _select(self, rows_K: Tensor) -> None:
        """Let the rows become the given ones of the present rows, the cache's included."""
        assert self._latents_NMRE is not None
        self._tokens_NT, self._index_NT = self._tokens_NT[rows_K], self._index_NT[rows_K]
        self._latents_NMRE, self._media_mask_NM = self._latents_NMRE[rows_K], self._media_mask_NM[rows_K]
        if self._cache is not None:
            self._cache.reorder(rows_K)

    def _last(self, logits_NTV: Tensor) -> Tensor:
        """Logits [N, V] after the last token, in fp32, the suppressed ids ruled out."""
        logits_NV = logits_NTV[:, -1].float()
        logits_NV[:, self._suppressed] = -torch.inf
        return logits_NV


def _new_cache(model: Forward, config: GenerationConfig) -> Any:
    """Ask the model for a cache, or explain what is missing."""
    if not config.use_cache:
        return None
    if not hasattr(model, "new_cache"):
        raise ValueError(f"{type(model).__name__} has no new_cache(): pass GenerationConfig(use_cache=False)")
    cache = model.new_cache()
    if config.beams > 1 and not hasattr(cache, "reorder"):
        raise ValueError(
            f"{type(cache).__name__} has no reorder(rows_N), which beam search needs: pass "
            "GenerationConfig(use_cache=False) or beams=1"
        )
    return cache


def groups_of_equal_length(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Cut rows, given by their lengths in tokens, into groups of equal length, at most `most` rows each."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(length, []).append(row)
    return [
        rows[first : first + most]
        for _, rows in sorted(by_length.items())
        for first in range(0, len(rows), most)
    ]


def _check(
    prompt_tokens: Sequence[Sequence[int]],
    media_index: Sequence[Sequence[int]],
    media: Tensor,
    media_mask: Tensor,
) -> None:
    """Refuse prompts that do not fit their media."""
    counts = {
        "prompt_tokens": len(prompt_tokens),
        "media_index": len(media_index),
        "media": len(media),
        "media_mask": len(media_mask),
    }
    if not prompt_tokens or len(set(counts.values())) > 1:
        raise ValueError(
            f"generate() needs one entry a prompt in every argument and at least one prompt, got {counts}; a "
            "rank without prompts of its own repeats another's"
        )
    for row, (tokens, index) in enumerate(zip(prompt_tokens, media_index, strict=True)):
        if not tokens or len(tokens) != len(index):
            raise ValueError(
                f"prompt {row} has {len(tokens)} tokens and {len(index)} media indices: both must be equal "
                "and at least 1 (start with BOS)"
            )
        if not 0 <= min(index) <= max(index) <= media_mask.shape[1]:
            raise ValueError(
                f"prompt {row} has media indices from {min(index)} to {max(index)}: with "
                f"{media_mask.shape[1]} media slots they must lie in 0..{media_mask.shape[1]}"
            )
