"""The configuration of a whole run: what a recipe returns, what the command line overrides."""

import dataclasses
import hashlib
import json
import warnings
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.actors import ReaderConfig
from data_pipeline.config import DatasetConfig
from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.planning.parameters import check_fp8_shapes
from flamingo_dist.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything that a run reads."""

    train: dict[str, DatasetConfig]
    """Training data sets by name; one backward each, in this order."""
    held_out: dict[str, DatasetConfig] = field(default_factory=dict)
    """Held-out data sets of the grounding probe, in mode "eval"."""
    tokenizer: TokenizerConfig
    """The language model's tokenizer."""
    readers: ReaderConfig = field(default_factory=ReaderConfig)
    """Reader actors and read-ahead."""
    encode_features: bool = False
    """Encode the media of all data sets once by the frozen vision encoder and stream the features; flips and
    colour augmentation then have nothing to act on and must be off."""
    cache: str = ""
    """Folder of encoded features, any fsspec URL; "" is `features` in the cache folder."""

    def __post_init__(self) -> None:
        """Check names and modes."""
        for part, datasets in (("train", self.train), ("held_out", self.held_out)):
            for name, dataset in datasets.items():
                mode = "train" if part == "train" else "eval"
                if dataset.name != name or dataset.mode != mode:
                    raise ValueError(
                        f"data.{part}.{name} has name={dataset.name!r} and mode={dataset.mode!r}; "
                        f"it must have name={name!r} and mode={mode!r}."
                    )
                if self.encode_features and (dataset.hflip_p or dataset.colour_jitter):
                    raise ValueError(
                        f"data.{part}.{name} augments pixels, but data.encode_features=True encodes them once; "
                        "set hflip_p and colour_jitter to 0, or encode_features to False."
                    )
        if not self.train:
            raise ValueError("data.train is empty; give at least one data set.")


@dataclass(frozen=True, kw_only=True)
class ResourceConfig:
    """Processes of a run and what each gets."""

    workers: int = 1
    """Training processes in all, one per GPU where there are GPUs: data parallel x tensor parallel."""
    cpus_per_worker: float = 1
    """Logical CPUs that Ray reserves for a training process."""
    threads_per_worker: int = 1
    """Threads of torch's CPU operators in a training process."""
    use_gpu: bool = False
    """Give each training process one GPU and use NCCL; otherwise gloo on CPUs."""
    peak_tflops: float | None = None
    """Dense matrix peak of one training process's device in the run's dtype, TFLOP/s, which MFU is a share of. None is
    the data sheet's of a known GPU; on a CPU the speed of a product that all processes run at once at the start."""
    max_failures: int = 0
    """Times that the training processes are started again from the last checkpoint after one of them died; not after
    an error in what was given, which would come again."""

    def __post_init__(self) -> None:
        """Reject values that start nothing."""
        if self.workers < 1 or self.threads_per_worker < 1 or self.max_failures < 0:
            raise ValueError(
                f"resources.workers={self.workers} and threads_per_worker={self.threads_per_worker} must be at "
                f"least 1, max_failures={self.max_failures} not negative."
            )
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"resources.peak_tflops={self.peak_tflops} must be positive.")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Captions of held-out media that the run writes at its end, and candidate scoring."""

    dataset: str = ""
    """Held-out data set to caption; "" writes none."""
    count: int = 12
    """Media captioned; each data-parallel rank captions as many, so the data set must hold a multiple of the ranks."""
    support: str = ""
    """Held-out data set that the few-shot examples come from; "" takes them from `dataset`'s own end."""
    shots: int = 2
    """Few-shot examples in each prompt."""
    beams: int = 1
    """Beam width; 1 is greedy (paper: 3)."""
    max_new_tokens: int = 16
    """Longest caption."""
    candidates: int = 0
    """Names ranked against each other for each held-out medium; 0 leaves the scoring out."""

    def __post_init__(self) -> None:
        """Reject numbers of nothing."""
        least = {"count": 1, "shots": 0, "beams": 1, "max_new_tokens": 1, "candidates": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"captions.{name}={getattr(self, name)} must be at least {smallest}.")


@dataclass(frozen=True, kw_only=True)
class OtherBorder:
    """A data set whose borders are not of the encoder's mean, which may be meant."""

    setting: str
    """Dotted name of the colour."""
    given: tuple[int, int, int]
    """The colour, RGB."""
    mean: tuple[int, int, int]
    """What the encoder's own would be."""
    encoder: str
    """The encoder's name."""

    @property
    def says(self) -> str:
        """What is so."""
        return f"{self.setting}={self.given} is not the border colour of {self.encoder}, {self.mean}"

    @property
    def remedy(self) -> str:
        """What to do unless it is meant."""
        return f"unless it is meant, set --{self.setting.replace('_', '-')} {' '.join(map(str, self.mean))}"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    recipe: str
    """Name of the recipe that this started from."""
    name: str
    """Name of the run and of its folder."""
    runs_dir: str = "runs"
    """Folder of run folders, on a file system that all nodes share."""
    model: FlamingoConfig
    """The network."""
    train: TrainConfig
    """How it is trained."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it is spread over processes."""
    resources: ResourceConfig = ResourceConfig()
    """Processes and what each gets."""
    data: DataConfig
    """What it reads."""
    captions: CaptionConfig = CaptionConfig()
    """Captions and candidate scoring at the end."""

    def __post_init__(self) -> None:
        """Check what no part can check alone, before any process starts."""
        topology = Topology(world=self.resources.workers, rank=0, tensor=self.parallel.tensor)
        topology.check_divisible(self.model.tensor_sizes())
        self.parallel.check_storage(self.model.lm.weight_storage)
        check_fp8_shapes(self.model.lm, self.parallel.tensor)
        self._check_precision()
        for name, dataset in {**self.data.train, **self.data.held_out}.items():
            topology.check_batch(name, dataset.batch_size)
            dataset.local_batch_size(topology.data)
            self._check_media(name, dataset)
        self._check_held_out(topology.data)
        for wanted in (self.captions.dataset, self.captions.support):
            if wanted and wanted not in self.data.held_out:
                raise ValueError(
                    f"captions name the data set {wanted!r}; held-out data sets are {list(self.data.held_out)}."
                )
        if self.train.probe_every and not self.data.held_out:
            warnings.warn(
                f"train.probe_every={self.train.probe_every} has no effect: data.held_out names no data set to probe; "
                "hold some data out, or set --train.probe-every 0.",
                stacklevel=3,
            )
        for border in self.other_borders():
            warnings.warn(f"{border.says}; {border.remedy}", stacklevel=3)

    def other_borders(self) -> list["OtherBorder"]:
        """Return the data sets whose pictures get borders of another colour than the encoder's mean.

        Features have their borders already, and where they are encoded first, the encoder's colour is taken.
        """
        mean = self.model.vision.pad_colour
        return [
            OtherBorder(
                setting=f"data.{part}.{name}.pad_colour",
                given=dataset.pad_colour,
                mean=mean,
                encoder=self.model.vision.name,
            )
            for part, datasets in (("train", self.data.train), ("held_out", self.data.held_out))
            for name, dataset in datasets.items()
            if dataset.media == "pixels" and not self.data.encode_features and dataset.pad_colour != mean
        ]

    def _check_held_out(self, data: int) -> None:
        """Check that the grounding probe, which exchanges media within a rank's batch, has two rows to exchange.

        Args:
            data: data-parallel degree.
        """
        for name, dataset in self.data.held_out.items():
            if dataset.batch_size < 2 * data:
                raise ValueError(
                    f"data.held_out.{name}.batch_size={dataset.batch_size} leaves {dataset.batch_size // data} row for "
                    f"each of the {data} data-parallel ranks, but the grounding probe needs 2 to exchange media; set "
                    f"it to {2 * data} or more."
                )

    def _check_precision(self) -> None:
        """Check that DeepSpeed can sum the run's gradients in fp32, as `deepspeed_config` asks it to."""
        if self.train.dtype == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "train.dtype='bf16' needs parallel.zero_stage of at least 1: without ZeRO, DeepSpeed cannot sum bf16 "
                "gradients in fp32. Set parallel.zero_stage=1, or train.dtype='fp32'."
            )

    def _check_media(self, name: str, dataset: DatasetConfig) -> None:
        vision = self.model.vision
        if dataset.media == "features":
            if (dataset.num_features, dataset.width) != (vision.num_features, vision.width):
                raise ValueError(
                    f"data set {name}: features are [{dataset.num_features}, {dataset.width}], the vision encoder "
                    f"gives [{vision.num_features}, {vision.width}]."
                )
        elif dataset.image_size != vision.image_size:
            raise ValueError(
                f"data set {name}: image_size={dataset.image_size}, the vision encoder takes {vision.image_size}."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the resolved configuration as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must share with the one it goes on with.

        Left out: names and places, settings that change no number (how often to save, readers, threads), and the
        parallel layout, which changes rounding alone. Data sets are compared by the data pipeline itself.
        """
        whole = self.to_json()
        train = whole["train"]
        for free in ("checkpoint_every", "keep_checkpoints", "probe_every", "probe_batches", "max_bad_steps"):
            del train[free]
        del train["steps"]  # a longer run is the same run
        del whole["model"]["weights"], whole["model"]["lm"]["weights"]
        del whole["model"]["vision"]["weights"], whole["model"]["vision"]["statistics"]
        # Settings from before which there are checkpoints.
        for name, before in {
            "further_tokens": 0,
            "weight_storage": "same",
            "matrix_products": "same",
        }.items():
            if whole["model"]["lm"][name] == before:
                del whole["model"]["lm"][name]
        weights = {
            name: [list(point) for point in dataset.weight_schedule.points] or dataset.weight
            for name, dataset in self.data.train.items()
        }
        return {"model": whole["model"], "train": train, "weights": weights}

    def fingerprint(self) -> str:
        """Return a short hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]
