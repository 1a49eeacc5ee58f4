"""A few random convolutions: an encoder that needs no download and next to no time."""

import torch
from torch import Tensor, nn

from flamingo_dist.models.init import ParamTag, draw
from flamingo_dist.models.vision.base import FrozenConv, VisionEncoder, flatten_grid
from flamingo_dist.models.vision.config import VisionConfig


class TinyEncoder(VisionEncoder):
    """Three convolutions of stride 2, so a feature stands for 8x8 pixels.

    Random features still tell colours and shapes apart, which is all that a smoke run needs to learn from.
    """

    def __init__(self, config: VisionConfig) -> None:
        """Draw the weights from `config.tiny_seed` and their names: equal on every rank and in every run."""
        super().__init__(config)
        channels = (3, config.width // 4, config.width // 2, config.width)
        layers = []
        for number in range(3):
            shape = torch.Size((channels[number + 1], channels[number], 3, 3))
            # He's scale for ReLU keeps the features near unit size.
            tag = ParamTag(std=(2.0 / shape[1:].numel()) ** 0.5)
            weight = draw(f"vision.tiny.{number}", tag, shape, seed=config.tiny_seed, tp_rank=0, tp_size=1)
            layers.append(FrozenConv(weight, torch.zeros(shape[0]), config.torch_dtype, stride=2))
        self.layers = nn.ModuleList(layers)

    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        """Return features [N, h * w, C] of uint8 pixels [N, 3, H, W]."""
        x = (pixels_N3HW.to(self.dtype) - 127.5) / 64.0
        for layer in self.layers:
            x = nn.functional.relu(layer(x))
        return flatten_grid(x)
