"""The scale-down of the large recipes: the same code path on four CPU processes in under two minutes."""

from typing import Any

from data_pipeline.actors import ReaderConfig
from data_pipeline.config import DatasetConfig
from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.gated_block import GatedBlockConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.resampler import ResamplerConfig
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.parallel.topology import ParallelConfig
from flamingo_dist.training.config import OptimizerConfig, TrainConfig
from jobs.config import CaptionConfig, DataConfig, ResourceConfig, RunConfig
from jobs.demo.fetch import cache_folder
from jobs.shapes import FRAMES, SIZE, VERSION, write_shapes

VOCAB = 260
"""256 bytes, BOS, EOS, padding, and one more so that two tensor-parallel ranks share it evenly."""


def prepare_smoke() -> None:
    """Generate the shapes that the recipe trains on."""
    write_shapes(cache_folder() / "shapes" / f"v{VERSION}")


def smoke() -> RunConfig:
    """Return the smoke run: random tiny LM, tensor parallel 2 x data parallel 2, ZeRO-3, all three kinds of data."""
    folder = cache_folder() / "shapes" / f"v{VERSION}"
    vision = VisionConfig(name="tiny", image_size=SIZE, tiny_width=32)
    common: dict[str, Any] = {
        "image_size": SIZE,
        "pad_colour": vision.pad_colour,
        "hflip_p": 0.0,
        "video_fps": None,
    }
    return RunConfig(
        recipe="smoke",
        name="smoke",
        model=FlamingoConfig(
            lm=LMConfig(
                vocab_size=VOCAB,
                num_layers=4,
                width=64,
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
                ffn_width=128,
            ),
            vision=vision,
            resampler=ResamplerConfig(
                feature_width=32, width=48, depth=2, latents=8, heads=4, head_dim=16, frames=FRAMES
            ),
            gated=GatedBlockConfig(width=64, media_width=48, heads=4, head_dim=16, ffw_hidden=256),
            cross_every=2,
        ),
        train=TrainConfig(
            steps=20,
            dtype="fp32",
            optimizer=OptimizerConfig(lr=3e-3, warmup_steps=5, gate_lr_scale=10.0),
            checkpoint_every=10,
            keep_checkpoints=2,
            probe_every=0,
            probe_batches=1,
        ),
        parallel=ParallelConfig(tensor=2, zero_stage=3, frozen="partitioned", activation_checkpointing=True),
        resources=ResourceConfig(workers=4, max_failures=1),
        data=DataConfig(
            train={
                "documents": DatasetConfig(
                    name="documents",
                    kind="interleaved",
                    urls=(str(folder / "documents"),),
                    batch_size=4,
                    weight=1.0,
                    seq_len=96,
                    max_media=3,
                    **common,
                ),
                "pairs": DatasetConfig(
                    name="pairs",
                    kind="pair",
                    urls=(str(folder / "pairs"),),
                    batch_size=8,
                    weight=0.2,
                    seq_len=32,
                    **common,
                ),
                "videos": DatasetConfig(
                    name="videos",
                    kind="video",
                    urls=(str(folder / "videos"),),
                    batch_size=4,
                    weight=0.03,
                    seq_len=40,
                    frames=FRAMES,
                    **common,
                ),
            },
            held_out={
                "held_out": DatasetConfig(
                    name="held_out",
                    kind="pair",
                    mode="eval",
                    urls=(str(folder / "held_out"),),
                    batch_size=8,
                    seq_len=32,
                    **common,
                )
            },
            tokenizer=TokenizerConfig(kind="bytes", vocab_size=VOCAB),
            readers=ReaderConfig(readers=2, cpus_per_reader=0.25, prefetch=2),
        ),
        captions=CaptionConfig(dataset="held_out", count=4, shots=2, max_new_tokens=12, candidates=6),
    )
