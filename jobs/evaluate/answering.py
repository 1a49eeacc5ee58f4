"""One process of an evaluation: encode a share of the media, answer a share of the queries, write what was answered."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import Skip
from data_pipeline.storage import Storage
from flamingo_dist.evaluation.candidates import CandidateConfig
from flamingo_dist.evaluation.continuations import score_continuations
from flamingo_dist.inference.generate import GenerationConfig, generate, groups_of_equal_length
from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.parallel.topology import ParallelConfig, Topology, world_device
from jobs.encode import media_config
from jobs.evaluate.examples import Example, Examples
from jobs.evaluate.media import MediaReader, MediaStore, encode_media, place_of, without
from jobs.evaluate.prompts import Asked, Prompter
from jobs.evaluate.settings import EvaluateArguments
from jobs.held_out import prompt_ids
from jobs.inference_source import Source, build_source
from jobs.network_tokenizer import further_tokens


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every process is given."""

    arguments: EvaluateArguments
    """What was asked for."""
    source: Source
    """The network."""
    examples: Examples
    """Support set and queries."""
    names: tuple[str, ...]
    """Class names that queries share."""
    folder: Path
    """Scratch on this machine: media of the store, and what the processes have to say."""


def answer_share(topology: Topology, work: Work) -> list[Skip]:
    """Answer this data-parallel rank's share of the queries, into `answers_file`.

    Data-parallel ranks hold whole networks, so they need not keep step: they meet once, when all media are encoded.

    Args:
        topology: this process's place; the groups are initialised.
        work: the evaluation.

    Returns:
        Examples whose media cannot be shown, of all ranks; they are in no prompt.

    Raises:
        ValueError: prompts that cannot be made, or are too long.
        BadDataError: a shard is gone or its storage fails.
    """
    arguments, examples, config = work.arguments, work.examples, work.source.model
    parallel = ParallelConfig(
        zero_stage=0, tensor=topology.tensor, split_vision=topology.tensor > 1
    )  # each frame is encoded by one process
    model = build_source(work.source, parallel, topology)
    shown = {place_of(example): example for example in wanted(arguments, examples)}
    store = MediaStore(work.folder, list(shown), config, model.dtype)
    said = _Said(topology)
    bad = encode_media(
        model,
        list(shown.values()),
        media_reader(arguments, work.source),
        store,
        topology,
        work.folder,
    )
    said.done(f"{len(shown) - len(bad)} media encoded")
    support, queries = without(examples.support, bad), without(examples.queries, bad)
    tokenizer = work.source.tokenizer.load()
    ids = prompt_ids(tokenizer, config.lm, wrapped=work.source.wrapped)
    names = further_tokens(work.source.tokenizer, ids.further)
    prompter = Prompter(arguments, tokenizer, ids, config.lm, support=support, store=store, names=names)
    mine = queries[topology.data_rank :: topology.data]
    # All prompts once, before the first is answered: one that cannot be asked should not cost hours.
    lengths = {shots: [_checked(prompter, work, query, shots) for query in mine] for shots in arguments.shots}
    answering = _Answering(model, prompter, store, work)
    with answers_file(work.folder, topology.data_rank, peer=topology.tensor_rank).open("w") as file:
        for shots, found in lengths.items():
            for line in answering.answer(shots, dict(zip(mine, found, strict=True))):
                file.write(json.dumps({"shots": shots, **line}, ensure_ascii=False) + "\n")
            said.done(f"{shots} shots: {len(found)} of {len(queries)} queries answered by this process")
    return list(bad.values())


class _Said:
    """Tells a person how far the first process is, on stderr: the table alone goes to stdout."""

    def __init__(self, topology: Topology) -> None:
        self._speaks, self._started = topology.rank == 0, time.monotonic()

    def done(self, what: str) -> None:
        """Say that something is done, and how long it took since the last."""
        now = time.monotonic()
        if self._speaks:
            print(f"{what} in {now - self._started:.1f} s", file=sys.stderr, flush=True)
        self._started = now


def _checked(prompter: Prompter, work: Work, query: Example, shots: int) -> int:
    """Return the tokens of a query's prompt, or refuse it."""
    asked = prompter.ask(query, shots)
    prompter.check_length(asked, query.choices or work.names)
    return len(asked.prompts[0].tokens)


def answers_file(folder: Path, data_rank: int, *, peer: int = 0) -> Path:
    """Return where a process writes its answers; tensor-parallel peers write the same, and the first one's count."""
    return folder / f"answers-{data_rank}-{peer}.jsonl"


def wanted(arguments: EvaluateArguments, examples: Examples) -> Sequence[Example]:
    """Return the examples whose media are shown: demonstrations of text alone show none."""
    return [*(examples.support if max(arguments.shots) > 0 else ()), *examples.queries]


def media_reader(arguments: EvaluateArguments, source: Source) -> MediaReader:
    """Return what decodes media as the network was trained on them."""
    vision = source.model.vision
    return MediaReader(
        config=media_config(vision, video_fps=arguments.video_fps),
        features=(vision.num_features, vision.width),
        trained_frames=source.model.resampler.frames,
        frames=arguments.frames,
        storage=Storage(),
    )


class _Answering:
    """Generates or chooses the answers of queries."""

    def __init__(self, model: Flamingo, prompter: Prompter, store: MediaStore, work: Work) -> None:
        self.model, self.prompter, self.store, self.work = model, prompter, store, work
        arguments, ids = work.arguments, prompter.ids
        self.candidates = CandidateConfig(
            rows=arguments.rows, queries=arguments.batch, normalise=arguments.normalise
        )
        self.generation = None
        if arguments.is_open_ended:
            self.generation = GenerationConfig(
                stop_ids=ids.stop_ids,
                suppressed_ids=ids.never_generated,
                max_new_tokens=arguments.new_tokens,
                beams=arguments.beams,
                length_penalty=arguments.length_penalty,
                batch_size=arguments.batch,
            )

    def answer(self, shots: int, lengths: Mapping[Example, int]) -> Iterator[dict[str, Any]]:
        """Give one line for each query, in any order; `lengths` has the tokens of their prompts."""
        if self.generation is None:
            for query in lengths:
                yield self._choose(self.prompter.ask(query, shots))
            return
        queries = list(lengths)
        for rows in groups_of_equal_length(list(lengths.values()), self.work.arguments.batch):
            yield from self._write([self.prompter.ask(queries[row], shots) for row in rows], self.generation)

    def _write(self, group: Sequence[Asked], config: GenerationConfig) -> Iterator[dict[str, Any]]:
        """Generate the answers of prompts of equal length."""
        prompts = [each.prompts[0] for each in group]
        latents, mask = self._latents([each.media[0] for each in group])
        texts = generate(
            self.model,
            [prompt.tokens for prompt in prompts],
            [prompt.media_index for prompt in prompts],
            None,
            mask,
            config,
            latents_NMRE=latents,
        )
        for each, text in zip(group, texts, strict=True):
            yield {**_line(each), "answer": self.prompter.tokenizer.decode(text).strip()}

    def _choose(self, asked: Asked) -> dict[str, Any]:
        """Score every name after a query's prompts; the mean over their orders counts."""
        names = asked.query.choices or self.work.names
        latents, mask = self._latents(asked.media)
        scores_QN = score_continuations(
            self.model,
            asked.prompts,
            latents,
            mask,
            self.prompter.answers(asked.query, names),
            self.candidates,
        )
        scores = dict(zip(names, scores_QN.mean(0).tolist(), strict=True))
        return {**_line(asked), "answer": max(scores, key=scores.__getitem__), "scores": scores}

    def _latents(self, media: Sequence[Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents [N, M, R, E] of N prompts' media on the device, and a full mask [N, M]."""
        latents = torch.stack([self.store.latents_of(keys) for keys in media]).to(world_device())
        return latents, torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)


def _line(asked: Asked) -> dict[str, Any]:
    return {
        "key": asked.query.key,
        "demonstrations": [example.key for example in asked.demonstrations],
        "prompt_tokens": len(asked.prompts[0].tokens),
    }
