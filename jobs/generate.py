"""`flamingo generate`: captions or answers for images after a few-shot prompt, by a trained run or a network folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import BadSampleError
from data_pipeline.media import MediaConfig, decode_image, decode_video
from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.inference.generate import GenerationConfig, generate
from flamingo_dist.inference.prompt import Prompt, prompt_of_texts
from flamingo_dist.models.exchange.folder import network_of, read_stated
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process, world_device
from flamingo_dist.training.build import build_model
from flamingo_dist.training.checkpoint_folder import CheckpointError, find_checkpoint
from flamingo_dist.training.config import DTYPES
from flamingo_dist.training.stored_state import load_trainable
from jobs.encode import media_config
from jobs.held_out import prompt_ids
from jobs.local_ranks import on_local_ranks
from jobs.network_source import local_folder
from jobs.network_tokenizer import encoding, further_tokens, read_tokenizer
from jobs.run_file import load_run_config


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Arguments of `flamingo generate`."""

    run: str
    """Run folder of a trained run, or a folder that `flamingo export` or `flamingo import` wrote, at any fsspec URL."""
    image: tuple[str, ...]
    """Images, or clips of which the first frame counts, each asked about by itself."""
    prompt: str = ""
    """Text that the network continues, such as "Question: how many? Answer:"; empty for a caption. The image comes
    before it, or where it says `<image>`; an instruct model's `<end_of_utterance>` is that token."""
    shot: tuple[str, ...] = ()
    """Few-shot examples, each FILE=TEXT, in the order in which they are shown; a text is whole, answer included."""
    checkpoint: str = "latest"
    """Checkpoint of a run: "latest", a step, or a path."""
    max_new_tokens: int = 20
    """Longest text in tokens."""
    beams: int = 1
    """Beam width; 1 is greedy (paper: 3)."""
    temperature: float = 0.0
    """Above 0 tokens are drawn, from softmax(logits / temperature)."""
    seed: int = 0
    """Of the drawing."""
    tensor: int = 1
    """Processes of this machine, a GPU each where there are GPUs, that share the network by tensor parallelism."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    model: FlamingoConfig
    tokenizer: TokenizerConfig
    dtype: torch.dtype
    seed: int
    checkpoint: Path | None
    wrapped: bool = False
    """Whether the network was trained with an `<EOC>` on either side of an image."""


def _source(run: str, wanted: str) -> _Source:
    """Return what is generated from: a run's checkpoint, or a network folder at any fsspec URL."""
    stated = read_stated(run)
    if stated is not None:
        tokenizer = read_tokenizer(run, stated)
        if tokenizer is None:
            raise ValueError(
                f"{run} holds no tokenizer; export it from a run, or import a folder that has one."
            )
        return _Source(
            model=network_of(stated, run),
            tokenizer=tokenizer,
            dtype=DTYPES[stated.get("dtype", "bf16")],
            seed=0,
            checkpoint=None,
            wrapped=stated.get("images_wrapped", False),
        )
    folder = local_folder(run)
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
    """Return (image path, text) for every image.

    Raises:
        ValueError: a shot that is not FILE=TEXT, a file that is no image, or a run that cannot be read.
        CheckpointError: no such checkpoint.
        RunFailedError: one of several processes ended without an error of its own.
    """
    shots = [_split_shot(text) for text in arguments.shot]
    source = _source(arguments.run, arguments.checkpoint)
    media = media_config(source.model.vision)
    shot_frames = [_frames(file, media) for file, _ in shots]
    images = [_frames(file, media) for file in arguments.image]
    tokenizer = source.tokenizer.load()
    ids = prompt_ids(tokenizer, source.model.lm, wrapped=source.wrapped)
    texts = [*(text for _, text in shots), arguments.prompt]
    encode = encoding(tokenizer.encode, further_tokens(source.tokenizer, ids.further))
    prompt = prompt_of_texts(texts, ids=ids, encode=encode)
    settings = GenerationConfig(
        stop_ids=ids.stop_ids,
        suppressed_ids=ids.never_generated,
        max_new_tokens=arguments.max_new_tokens,
        beams=arguments.beams,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    stacked = torch.stack([torch.stack([*shot_frames, image]) for image in images])
    parallel = ParallelConfig(zero_stage=0, tensor=arguments.tensor)
    task = (parallel, source, prompt, stacked, settings)
    if parallel.tensor == 1:
        with single_process() as topology:
            found = _continued(topology, *task)
    else:
        found = on_local_ranks(_continued, *task, tensor=parallel.tensor)
    return [(file, tokenizer.decode(text).strip()) for file, text in zip(arguments.image, found, strict=True)]


def _continued(
    topology: Topology,
    parallel: ParallelConfig,
    source: _Source,
    prompt: Prompt,
    media: torch.Tensor,
    settings: GenerationConfig,
) -> list[list[int]]:
    """Return the ids that continue the prompt for each of N images.

    Args:
        topology: this process's place; the groups are initialised.
        parallel: how the network is spread.
        source: the network.
        prompt: the same for all.
        media: uint8 [N, M, 1, 3, H, W], the shots' and the image.
        settings: how.
    """
    model = build_model(source.model, parallel, topology, dtype=source.dtype, seed=source.seed)
    if source.checkpoint is not None:
        load_trainable(model, source.checkpoint)
    media = media.to(world_device())
    return generate(
        model,
        [prompt.tokens] * len(media),
        [prompt.media_index] * len(media),
        media,
        torch.ones(media.shape[:2], dtype=torch.bool, device=media.device),
        settings,
    )


def _split_shot(text: str) -> tuple[str, str]:
    file, separator, words = text.partition("=")
    if not separator or not file or not words:
        raise ValueError(f"--shot {text!r}: give FILE=TEXT.")
    return file, words


def _frames(file: str, config: MediaConfig) -> torch.Tensor:
    """Return uint8 [1, 3, H, W], the image (or the first frame of a clip) as the encoder takes it."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file} does not exist; give image files.")
    blob = path.read_bytes()
    extension = path.suffix.lstrip(".").lower()
    moving = extension in ("mp4", "webm", "mkv", "mov", "avi")
    try:
        pixels: Any = decode_video(blob, extension, 1, config) if moving else decode_image(blob, config)[None]
    except BadSampleError as error:
        raise ValueError(
            f"{file} cannot be shown: {error.cause} ({error.detail}); give image files."
        ) from error
    return torch.from_numpy(pixels.copy())
