"""One stored sample -> one formatted sample with its media, as a pure function of (seed, position)."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import BadSampleError
from data_pipeline.formatting import TokenizedSample, format_caption, format_document, parse_document
from data_pipeline.media import (
    FEATURE_EXTENSION,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Augmentation,
    decode_features,
    decode_image,
    decode_video,
    draw_augmentation,
)
from data_pipeline.order import make_rng
from data_pipeline.reading import SampleReader
from data_pipeline.tokenizer import Tokenizer

_MAX_TEXT_BYTES = 8 << 20
"""Bytes of a sample's text or document: far more than any window, less than what tokenizing would hang on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedSample:
    """A sample whose media are in their slots of a batch."""

    key: str
    text: TokenizedSample


class SampleLoader:
    """Turns stored samples of one data set into tokens and media."""

    def __init__(self, config: DatasetConfig, tokenizer: Tokenizer, seed: int) -> None:
        """Hold what every sample needs."""
        self._config, self._tokenizer, self._seed = config, tokenizer, seed

    def load(self, reader: SampleReader, position: int, media: np.ndarray) -> LoadedSample:
        """Load one sample.

        Args:
            reader: the sample's members.
            position: its place in the endless order, from which all random draws follow.
            media: the sample's slots, uint8 [M, F, 3, H, W] or float16 [M, F, S, C]; the first ones are written.

        Raises:
            BadSampleError: when the sample cannot be used.
        """
        config = self._config
        train = config.mode == "train"
        rng = make_rng(self._seed, config.name, "text", position)
        if config.kind == "interleaved":
            text = format_document(
                parse_document(reader.get("json", max_bytes=_MAX_TEXT_BYTES)),
                self._tokenizer,
                seq_len=config.seq_len,
                max_media=config.max_media,
                next_image=train and bool(rng.random() < config.p_next),
                rng=rng if train else None,
                loss_before_first_image=config.loss_before_first_image,
                window_needs_image=config.window_needs_image,
            )
        else:
            captions = read_captions(reader)
            text = format_caption(
                captions[int(rng.integers(len(captions))) if train else 0],
                self._medium(reader),
                self._tokenizer,
                seq_len=config.seq_len,
                leading_space=train and bool(rng.random() < config.leading_space_p),
            )
        draws: list[Augmentation | None] = [None] * len(text.media)
        if train and (config.hflip_p or config.colour_jitter or config.kind == "video"):
            media_rng = make_rng(self._seed, config.name, "media", position)
            draws = [draw_augmentation(config, media_rng) for _ in text.media]
        for name, draw, slot in zip(text.media, draws, media, strict=False):
            self._decode(reader, name, draw, slot)
        return LoadedSample(key=reader.record.key, text=text)

    def _medium(self, reader: SampleReader) -> str:
        """Find the member that holds the image or video of a captioned sample."""
        if self._config.media == "features":
            wanted: tuple[str, ...] = (FEATURE_EXTENSION,)
        else:
            wanted = IMAGE_EXTENSIONS if self._config.kind == "pair" else VIDEO_EXTENSIONS
        for extension in wanted:
            if reader.has(extension):
                return extension
        detail = f"none of {', '.join(wanted)} among {sorted(reader.record.members)}"
        if reader.has(FEATURE_EXTENSION):
            detail += "; for .npy set media='features'"
        raise BadSampleError("missing member", detail)

    def _decode(
        self, reader: SampleReader, member: str, augmentation: Augmentation | None, slot: np.ndarray
    ) -> None:
        """Decode one medium into uint8 [F, 3, H, W] or float16 [F, S, C]."""
        config = self._config
        if config.media == "features":
            if not member.endswith(FEATURE_EXTENSION):
                # A document names its pictures; features keep the name and change the ending.
                member = f"{member.rpartition('.')[0]}.{FEATURE_EXTENSION}"
            assert config.num_features is not None, "checked by the configuration"
            assert config.width is not None, "checked by the configuration"
            slot[:] = decode_features(reader.get(member), config.frames, config.num_features, config.width)
        elif config.kind == "video":
            ending = member.rpartition(".")[2]
            decode_video(reader.get(member), ending, config.frames, config, augmentation, slot)
        else:
            decode_image(reader.get(member), config, augmentation, slot[0])


def read_captions(reader: SampleReader) -> list[str]:
    """Read the alternates of a caption that are not empty; the `.txt` comes first.

    Raises:
        BadSampleError: "empty caption", "bad text", or "missing member".
    """
    captions: list[str] = []
    if reader.has("txt"):
        try:
            captions.append(reader.get("txt", max_bytes=_MAX_TEXT_BYTES).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadSampleError("bad text", f"not UTF-8: {error}") from error
    if reader.has("json"):
        try:
            document = json.loads(reader.get("json", max_bytes=_MAX_TEXT_BYTES))
        except (ValueError, RecursionError) as error:
            raise BadSampleError("bad document", f"{type(error).__name__}: {error}"[:300]) from error
        # Other writers keep metadata in .json; only a list named captions concerns us.
        alternates = document.get("captions") if isinstance(document, dict) else None
        captions += [c for c in alternates if isinstance(c, str)] if isinstance(alternates, list) else []
    elif not captions:
        raise BadSampleError(
            "missing member", f"neither .txt nor .json among {sorted(reader.record.members)}"
        )
    # NUL bytes are no text; tokenizers treat what follows them in ways of their own.
    kept = [caption for caption in (c.replace("\0", "") for c in captions) if caption.strip()]
    if not kept:
        raise BadSampleError("empty caption", f"{len(captions)} captions, none with text")
    return kept
