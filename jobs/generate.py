"""`flamingo generate`: captions for images from a few-shot prompt, with a trained run's newest checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.media import MediaConfig, decode_image, decode_video
from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.inference.generate import GenerationConfig, generate
from flamingo_dist.inference.prompt import PLAIN_CAPTION, few_shot_prompt
from flamingo_dist.models.exchange.folder import is_network_folder, read_network_config
from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.parallel.topology import ParallelConfig, single_process
from flamingo_dist.training.build import build_model
from flamingo_dist.training.checkpoint_folder import CheckpointError, find_checkpoint
from flamingo_dist.training.config import DTYPES
from flamingo_dist.training.stored_state import load_trainable
from jobs.encode import media_config
from jobs.held_out import prompt_ids
from jobs.network_tokenizer import read_tokenizer
from jobs.run_file import load_run_config


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Arguments of `flamingo generate`."""

    run: str
    """Run folder of a trained run, or a folder that `flamingo export` or `flamingo import` wrote."""
    image: tuple[str, ...]
    """Images to caption."""
    shot: tuple[str, ...] = ()
    """Few-shot examples, each FILE=CAPTION, in the order in which they are shown."""
    checkpoint: str = "latest"
    """Checkpoint of a run: "latest", a step, or a path."""
    max_new_tokens: int = 20
    """Longest caption in tokens."""
    beams: int = 1
    """Beam width; 1 is greedy (paper: 3)."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    model: FlamingoConfig
    tokenizer: TokenizerConfig
    dtype: torch.dtype
    seed: int
    checkpoint: Path | None


def _source(folder: Path, wanted: str) -> _Source:
    """Return what is generated from: a run's checkpoint, or a network folder."""
    if is_network_folder(folder):
        tokenizer = read_tokenizer(folder)
        if tokenizer is None:
            raise ValueError(
                f"{folder} holds no tokenizer; export it from a run, or import a folder that has one."
            )
        dtype = DTYPES[json.loads((folder / "config.json").read_text()).get("dtype", "bf16")]
        model = read_network_config(folder)
        return _Source(model=model, tokenizer=tokenizer, dtype=dtype, seed=0, checkpoint=None)
    config = load_run_config(folder)
    path = find_checkpoint(folder / "checkpoints", wanted)
    if path is None:
        raise CheckpointError(f"{folder} has no checkpoint.")
    return _Source(
        model=config.model,
        tokenizer=config.data.tokenizer,
        dtype=config.train.torch_dtype,
        seed=config.train.seed,
        checkpoint=path,
    )


def generate_captions(arguments: GenerateArguments) -> list[tuple[str, str]]:
    """Return (image path, caption) for every image.

    Raises:
        ValueError: a shot that is not FILE=CAPTION, or a run that cannot be read.
        CheckpointError: no such checkpoint.
    """
    shots = [_split_shot(text) for text in arguments.shot]
    source = _source(Path(arguments.run), arguments.checkpoint)
    media = media_config(source.model.vision)
    shot_frames = [_frames(file, media) for file, _ in shots]
    images = [_frames(file, media) for file in arguments.image]
    with single_process() as topology:
        model = build_model(
            source.model, ParallelConfig(zero_stage=0), topology, dtype=source.dtype, seed=source.seed
        )
        if source.checkpoint is not None:
            load_trainable(model, source.checkpoint)
        return list(
            zip(
                arguments.image,
                _run(model, source.tokenizer, shots, shot_frames, images, arguments),
                strict=True,
            )
        )


def _run(
    model: Flamingo,
    tokenizer_config: TokenizerConfig,
    shots: list[tuple[str, str]],
    shot_frames: list[torch.Tensor],
    images: list[torch.Tensor],
    arguments: GenerateArguments,
) -> list[str]:
    tokenizer = tokenizer_config.load()
    ids = prompt_ids(tokenizer, model.config.lm)
    prompt = few_shot_prompt(
        [{"caption": caption} for _, caption in shots],
        ids=ids,
        encode=tokenizer.encode,
        template=PLAIN_CAPTION,
    )
    stacked = torch.stack([torch.stack([*shot_frames, image]) for image in images])
    texts = generate(
        model,
        [prompt.tokens] * len(images),
        [prompt.media_index] * len(images),
        stacked,
        torch.ones(stacked.shape[:2], dtype=torch.bool),
        GenerationConfig(
            stop_ids=ids.stop_ids,
            suppressed_ids=ids.never_generated,
            max_new_tokens=arguments.max_new_tokens,
            beams=arguments.beams,
        ),
    )
    return [tokenizer.decode(text).strip() for text in texts]


def _split_shot(text: str) -> tuple[str, str]:
    file, separator, caption = text.partition("=")
    if not separator or not file or not caption:
        raise ValueError(f"--shot {text!r}: give FILE=CAPTION.")
    return file, caption


def _frames(file: str, config: MediaConfig) -> torch.Tensor:
    """Return uint8 [1, 3, H, W], the image (or the first frame of a clip) as the encoder takes it."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file} does not exist; give image files.")
    blob = path.read_bytes()
    extension = path.suffix.lstrip(".").lower()
    moving = extension in ("mp4", "webm", "mkv", "mov", "avi")
    pixels: Any = decode_video(blob, extension, 1, config) if moving else decode_image(blob, config)[None]
    return torch.from_numpy(pixels.copy())
