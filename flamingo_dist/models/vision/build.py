"""From a configuration to an encoder."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flamingo_dist.models.vision.base import VisionEncoder
from flamingo_dist.models.vision.config import VisionConfig
from flamingo_dist.models.vision.efficientnet import EfficientNetLite0
from flamingo_dist.models.vision.nfnet import NFNet
from flamingo_dist.models.vision.tiny import TinyEncoder


def build_vision(config: VisionConfig) -> VisionEncoder:
    """Return the encoder that `config` asks for, with its weights, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: the weights are not there; the message says how to fetch them.
        ValueError: the weights are another network's.
    """
    with _outside_zero_init():
        return _encoder_class(config)(config).eval()


def _encoder_class(config: VisionConfig) -> Callable[[VisionConfig], VisionEncoder]:
    if config.is_vit:
        # Imported late: transformers takes a second, and the other encoders do without.
        from flamingo_dist.models.vision.vit import ViTEncoder

        return ViTEncoder
    if config.is_nfnet:
        return NFNet
    return TinyEncoder if config.name == "tiny" else EfficientNetLite0


@contextmanager
def _outside_zero_init() -> Iterator[None]:
    """Lift DeepSpeed's `zero.Init` for a while, if the network is being built under it.

    It replaces torch's tensor constructors by ones that cast, which `torch.load` does not survive and which
    would round the drawn weights.
    """
    # Only who has imported DeepSpeed can be inside its context: models/ itself needs no DeepSpeed.
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is None or not zero.zero_init_context:
        yield
        return
    zero.shutdown_init_context()
    try:
        yield
    finally:
        zero.restore_init_context()
