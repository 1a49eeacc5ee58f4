"""`flamingo generate`: captions or answers for images after a few-shot prompt, by a trained run or a network folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import BadSampleError
from data_pipeline.media import MediaConfig, decode_image, decode_video
from flamingo_dist.inference.generate import GenerationConfig, generate
from flamingo_dist.inference.prompt import Prompt, prompt_of_texts
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process, world_device
from jobs.encode import media_config
from jobs.held_out import prompt_ids
from jobs.inference_source import Source, build_source, open_source
from jobs.local_ranks import on_local_ranks
from jobs.network_tokenizer import encoding, further_tokens


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


def generate_captions(arguments: GenerateArguments) -> list[tuple[str, str]]:
    """Return (image path, text) for every image.

    Raises:
        ValueError: a shot that is not FILE=TEXT, a file that is no image, or a run that cannot be read.
        CheckpointError: no such checkpoint.
        RunFailedError: one of several processes ended without an error of its own.
    """
    shots = [_split_shot(text) for text in arguments.shot]
    source = open_source(arguments.run, arguments.checkpoint)
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
    source: Source,
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
    model = build_source(source, parallel, topology)
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
