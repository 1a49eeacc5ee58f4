"""How a vision encoder is asked for."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch

from flamingo_dist.models.vision.files import content_hash
from flamingo_dist.models.vision.nfnet_shape import NFNETS
from flamingo_dist.models.vision.nfnet_shape import STRIDE as NFNET_STRIDE

if TYPE_CHECKING:
    from flamingo_dist.models.vision.vit_shape import ViTShape

VisionName = Literal[
    "tiny",
    "efficientnet-lite0",
    "nfnet-tiny",
    "nfnet-f0",
    "nfnet-f1",
    "nfnet-f2",
    "nfnet-f3",
    "nfnet-f4",
    "nfnet-f5",
    "nfnet-f6",
    "nfnet-f7",
    "clip",
    "siglip",
    "dinov2",
]
EFFICIENTNET_WIDTH = 1280
"""Channels of EfficientNet-Lite0's head."""
EFFICIENTNET_STRIDE = 32
TINY_STRIDE = 8
"""The tiny encoder halves its input three times."""
VITS = ("clip", "siglip", "dinov2")
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
"""Of pixels from 0 to 255, as the published code of NFNets writes it."""
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
"""Of the same pixels."""
WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Which frozen encoder turns pixels into features."""

    name: VisionName = "tiny"
    """`tiny`: a few random convolutions, for smoke runs and tests. `efficientnet-lite0`: ImageNet weights.
    `nfnet-f0` ... `nfnet-f7`: the published NFNets, F6 being the paper's; `nfnet-tiny`: their layers, narrow, for
    tests. `clip`, `siglip`, `dinov2`: vision transformers through transformers."""
    weights: str = ""
    """`tiny` has none. `efficientnet-lite0`: path of the state dict (`.pth`). `nfnet-*`: DeepMind's haiku file, timm's
    safetensors, or "" for random weights. `clip`, `siglip`, `dinov2`: a Hugging Face folder, of the whole model or of
    its vision part. All at any fsspec URL; a run reads each file once and hands it on to its ranks."""
    image_size: int = 0
    """Height and width of the input in pixels; a multiple of 8 for `tiny`, of 32 for the convolutional encoders, of
    the patch for transformers, whose position embeddings are interpolated where they were trained at another size.
    0: the encoder's own (32, 224, 320; what the folder says)."""
    tiny_width: int = 32
    """Feature channels of `tiny`."""
    tiny_seed: int = 0
    """`tiny` is drawn from this seed alone, so that stored features fit every run."""
    nfnet_seed: int = 0
    """`nfnet-*` without `weights` is drawn from this seed alone."""
    class_token: bool = False
    """`clip`, `dinov2`: pass the class token before the patches (IDEFICS does, OpenFlamingo does not)."""
    final_norm: bool | None = None
    """`clip`, `siglip`, `dinov2`: whether features go through the final LayerNorm. None: as transformers'
    `last_hidden_state`, with it but for `clip`, which is what IDEFICS and OpenFlamingo take."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the encoder computes in. bfloat16 is about 2.5 times as fast on a CPU with AVX512-BF16, and moves
    the features of EfficientNet-Lite0 by about 5 percent of their norm."""
    statistics: str = ""
    """Path or URL of a `.safetensors` file with `mean` and `std`, fp32 [C], of the features of a corpus
    (`jobs.statistics` writes it): features are then standardised channel by channel, so that what all its images
    share does not drown what tells them apart. "" leaves them as the encoder gives them."""

    def __post_init__(self) -> None:
        if self.name not in get_args(VisionName):
            raise ValueError(f"vision encoder {self.name!r}: give one of {', '.join(get_args(VisionName))}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"vision dtype {self.dtype!r}: give 'float32' or 'bfloat16'")
        if self.tiny_width < 8 or self.tiny_width % 4:
            raise ValueError(f"tiny_width {self.tiny_width}: give a multiple of 4, at least 8")
        self._check_weights()
        self._check_tokens()
        if self.image_size == 0:
            object.__setattr__(self, "image_size", self._own_size)
        if self.image_size < self._stride or self.image_size % self._stride:
            raise ValueError(
                f"image_size {self.image_size} for {self.name}: give a positive multiple of {self._stride}"
            )

    def _check_weights(self) -> None:
        if self.name == "tiny" and self.weights:
            raise ValueError(f"weights {self.weights!r} for tiny: it has none")
        if not self.weights and (self.is_vit or self.name == "efficientnet-lite0"):
            kind = "a Hugging Face folder" if self.is_vit else "a path of a state dict"
            raise ValueError(f"weights '' for {self.name}: give {kind}")

    def _check_tokens(self) -> None:
        if not self.is_vit and (self.class_token or self.final_norm is not None):
            raise ValueError(
                f"class_token {self.class_token} and final_norm {self.final_norm} for {self.name}: they are for "
                f"{', '.join(VITS)}"
            )
        if self.name == "siglip" and self.class_token:
            raise ValueError("class_token True for siglip: it has none")

    @property
    def is_vit(self) -> bool:
        """Whether the encoder is a vision transformer."""
        return self.name in VITS

    @property
    def is_nfnet(self) -> bool:
        """Whether the encoder is an NFNet."""
        return self.name in NFNETS

    @property
    def vit(self) -> "ViTShape":
        """Shape of the vision transformer in the folder `weights`.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds another kind of model.
        """
        # Imported late: transformers takes a second, and the other encoders do without.
        from flamingo_dist.models.vision.vit_shape import ViTName, vit_shape

        return vit_shape(cast(ViTName, self.name), self.weights)

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """RGB that the borders of an image which is not square are filled with.

        The mean that the encoder subtracts, as the paper pads; white, as transparency is, for the encoders of the
        laptop runs.
        """
        if not self.is_vit and not self.is_nfnet:
            return WHITE
        mean = self.vit.mean if self.is_vit else IMAGENET_MEAN
        return (round(mean[0]), round(mean[1]), round(mean[2]))

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def _stride(self) -> int:
        if self.is_vit:
            return self.vit.patch
        return NFNET_STRIDE if self.is_nfnet else {"tiny": TINY_STRIDE}.get(self.name, EFFICIENTNET_STRIDE)

    @property
    def _own_size(self) -> int:
        if self.is_vit:
            return self.vit.image_size
        return {"tiny": 32, "efficientnet-lite0": 224, "nfnet-tiny": 64}.get(self.name, 320)

    @property
    def num_features(self) -> int:
        """S, the features of one image: its patches, and the class token; known without building the encoder."""
        return (self.image_size // self._stride) ** 2 + self.class_token

    @property
    def width(self) -> int:
        """C, the channels of a feature; known without building the encoder."""
        if self.is_vit:
            return self.vit.width
        if self.is_nfnet:
            return NFNETS[self.name].features
        return self.tiny_width if self.name == "tiny" else EFFICIENTNET_WIDTH

    def fingerprint(self) -> str:
        """Return a short hash of all that decides the features: settings, and the bytes of the weights.

        Raises:
            FileNotFoundError: the weights are not there.
        """
        settings = asdict(self) | {"weights": content_hash(self.weights) if self.weights else ""}
        del settings["statistics"]
        if self.statistics:
            settings["statistics"] = content_hash(self.statistics)
        # What an encoder does not read must not make its features stale.
        if self.name != "tiny":
            del settings["tiny_width"], settings["tiny_seed"]
        if not self.is_nfnet or self.weights:
            del settings["nfnet_seed"]
        if self.is_vit:
            norm = self.vit.norm_of_last_hidden_state if self.final_norm is None else self.final_norm
            settings["final_norm"] = norm
        else:
            del settings["class_token"], settings["final_norm"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
