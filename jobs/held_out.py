"""Held-out data during and after training: the grounding probe, candidate scoring, captions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.dataset import DatasetStream
from data_pipeline.tokenizer import Tokenizer
from flamingo_dist.evaluation.candidates import rank_candidates, score_candidates
from flamingo_dist.evaluation.probe import probe
from flamingo_dist.inference.generate import GenerationConfig, generate
from flamingo_dist.inference.prompt import (
    PLAIN_CAPTION,
    Prompt,
    PromptIds,
    answer_tokens,
    few_shot_prompt,
)
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.parallel.topology import MegatronMPU, Topology
from flamingo_dist.training.loop import Record
from jobs.batches import to_train_batch
from jobs.config import RunConfig
from jobs.pictures import PictureBook


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """One held-out medium with its caption."""

    key: str
    """Sample key."""
    caption: str
    """The caption that the data hold."""
    media: Tensor
    """[1, F, ...] as in a batch."""


def prompt_ids(tokenizer: Tokenizer, lm: LMConfig, *, wrapped: bool = False) -> PromptIds:
    """Return the special ids of `tokenizer`, and those that `lm` has besides.

    Args:
        tokenizer: of the language model.
        lm: its configuration.
        wrapped: whether an `<EOC>` stands on either side of an image.
    """
    return PromptIds(
        bos=tokenizer.bos_id,
        image=tokenizer.image_id,
        eoc=tokenizer.eoc_id,
        eos=tokenizer.eos_id,
        further=tuple(range(lm.vocab_size + 2, lm.vocab_size + lm.extra_tokens)),
        wrapped=wrapped,
    )


class HeldOut:
    """Runs everything that held-out data are for; all ranks call its methods together."""

    def __init__(
        self, engine: Any, config: RunConfig, topology: Topology, device: torch.device, pictures: PictureBook
    ) -> None:
        """Open the held-out data sets.

        Args:
            engine: the DeepSpeed engine around `Flamingo`.
            config: the run.
            topology: this rank's place.
            device: where the network is.
            pictures: gives the pictures of the report.
        """
        self.engine, self.config, self.topology, self.device = engine, config, topology, device
        self.pictures = pictures
        self.tokenizer = config.data.tokenizer.load()
        self.streams = {
            name: DatasetStream(dataset, self.tokenizer, config.train.seed)
            for name, dataset in config.data.held_out.items()
        }

    def probe(self) -> Record:
        """Return the grounding probe's losses of every held-out data set, and candidate scores if asked for."""
        losses = {}
        for name, stream in self.streams.items():
            batches = [
                to_train_batch(stream.batch(i, self.topology.data_rank, self.topology.data), self.device)
                for i in range(self.config.train.probe_batches)
            ]
            result = probe(
                self.engine,
                batches,
                reduce_sum=self._reduce_sum,
                gates_off=self.engine.module.gates_off,
            )
            losses[name] = result.as_dict()
        return {"data": losses, "candidates": self._score() if self.config.captions.candidates else {}}

    def write_captions(self, run_dir: Path) -> None:
        """Caption held-out media from a few-shot prompt and write `samples.json` with their pictures."""
        wanted = self.config.captions
        shots = self._captioned(wanted.support or wanted.dataset, wanted.shots, from_end=not wanted.support)
        # Every rank captions as many, so that all stay in step; what is beyond `count` is dropped.
        each = -(-wanted.count // self.topology.data)
        queries = self._captioned(wanted.dataset, each * self.topology.data)[
            self.topology.data_rank :: self.topology.data
        ]
        ids = prompt_ids(self.tokenizer, self.config.model.lm)
        prompt = few_shot_prompt(
            [{"caption": shot.caption} for shot in shots],
            ids=ids,
            encode=self.tokenizer.encode,
            template=PLAIN_CAPTION,
        )
        media, mask = _stack([[*(s.media for s in shots), q.media] for q in queries], self.device)
        texts = generate(
            self.engine,
            [prompt.tokens] * len(queries),
            [prompt.media_index] * len(queries),
            media,
            mask,
            GenerationConfig(
                stop_ids=ids.stop_ids,
                suppressed_ids=ids.never_generated,
                max_new_tokens=wanted.max_new_tokens,
                beams=wanted.beams,
            ),
            all_done=self._all_done,
        )
        entries = [
            {
                "dataset": wanted.dataset,
                "key": query.key,
                "caption": query.caption,
                "generated": self.tokenizer.decode(text).strip(),
                "shots": [shot.caption for shot in shots],
            }
            for query, text in zip(queries, texts, strict=True)
        ]
        self._write_samples(run_dir, entries, wanted.count)

    def _write_samples(self, run_dir: Path, entries: list[dict[str, Any]], count: int) -> None:
        parts: list[list[dict[str, Any]]] = [[] for _ in range(self.topology.world)]
        dist.all_gather_object(parts, entries if self.topology.tensor_rank == 0 else [])
        if self.topology.rank == 0:
            kept = [entry for part in parts for entry in part][:count]
            for entry in kept:
                entry["image"] = self.pictures.save(entry["dataset"], entry["key"], run_dir)
            (run_dir / "samples.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False))

    def _score(self) -> dict[str, Any]:
        """Rank the names of held-out media of the captioned data set by log-likelihood."""
        name, number = self.config.captions.dataset, self.config.captions.candidates
        named = {entry.caption: entry for entry in reversed(self._captioned(name, 4 * number, least=2))}
        chosen = list(named.values())[-number:]
        if len(chosen) < 2:
            raise ValueError(
                f"captions.candidates={number}: {name} has {len(chosen)} different captions to rank, 2 are needed."
            )
        ids = prompt_ids(self.tokenizer, self.config.model.lm)
        # As many queries on every rank, so that all stay in step.
        each = len(chosen) // self.topology.data or 1
        start = min(self.topology.data_rank * each, len(chosen) - each)
        mine = list(range(start, start + each))
        media, mask = _stack([[chosen[i].media] for i in mine], self.device)
        scores = score_candidates(
            self.engine,
            [self._bare_prompt(ids)] * len(mine),
            media,
            mask,
            [
                answer_tokens(
                    {"caption": entry.caption},
                    ids=ids,
                    encode=self.tokenizer.encode,
                    template=PLAIN_CAPTION,
                )
                for entry in chosen
            ],
        )
        return {name: rank_candidates(scores, mine, reduce_sum=self._reduce_sum).as_dict()}

    def _bare_prompt(self, ids: PromptIds) -> Prompt:
        return few_shot_prompt([], ids=ids, encode=self.tokenizer.encode, template=PLAIN_CAPTION)

    def _captioned(
        self, name: str, count: int, *, from_end: bool = False, least: int | None = None
    ) -> list[Captioned]:
        """Return the first (or last) `count` readable media of a held-out data set with their captions.

        Raises:
            ValueError: there are fewer than `least`, by default than `count`.
        """
        stream = self.streams[name]
        size = stream.config.batch_size
        last = (stream.num_samples - 1) // size
        found: list[Captioned] = []
        seen: set[str] = set()
        for step in range(last, -1, -1) if from_end else range(last + 1):
            batch = stream.batch(step)
            rows = range(len(batch.keys))
            for row in reversed(rows) if from_end else rows:
                key = batch.keys[row]
                if key and key not in seen and len(found) < count:
                    seen.add(key)
                    found.append(_captioned_row(batch, row, self.tokenizer))
            if len(found) == count:
                break
        if len(found) < (count if least is None else least):
            raise ValueError(
                f"{name} has {len(found)} readable samples, {count} are wanted; lower captions.*."
            )
        return found

    def _reduce_sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value, group=MegatronMPU().get_data_parallel_group())
        return value

    def _all_done(self, done: bool) -> bool:
        pending = torch.tensor(int(not done), device=self.device)
        dist.all_reduce(pending, op=dist.ReduceOp.MAX)
        return not pending.item()


def _captioned_row(batch: Batch, row: int, tokenizer: Tokenizer) -> Captioned:
    """Take the caption back out of the tokens of a pair or video: what follows `<image>` up to `<EOC>`."""
    tokens = batch.tokens_BT[row].tolist()
    start = tokens.index(tokenizer.image_id) + 1
    end = tokens.index(tokenizer.eoc_id, start) if tokenizer.eoc_id in tokens[start:] else len(tokens)
    caption = tokenizer.decode(tokens[start:end]).strip()
    return Captioned(key=batch.keys[row], caption=caption, media=torch.from_numpy(batch.media[row].copy()))


def _stack(media: Sequence[Sequence[Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack lists of media, each [1, F, ...], into [N, M, F, ...] with a full mask [N, M]."""
    stacked = torch.stack([torch.cat(list(row)) for row in media]).to(device)
    return stacked, torch.ones(stacked.shape[:2], dtype=torch.bool, device=device)
