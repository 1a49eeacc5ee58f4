"""From a configuration to an encoder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flamingo_dist.models.vision.base import VisionEncoder, is_without_values
from flamingo_dist.models.vision.config import VisionConfig
from flamingo_dist.models.vision.efficientnet import ABSENT as NO_EFFICIENTNET
from flamingo_dist.models.vision.efficientnet import EfficientNetLite0
from flamingo_dist.models.vision.files import open_tensors
from flamingo_dist.models.vision.nfnet import NFNet
from flamingo_dist.models.vision.nfnet_weights import ABSENT as NO_NFNET
from flamingo_dist.models.vision.tiny import TinyEncoder
from flamingo_dist.models.weights.source import Opening, WeightSource, opened_here


def build_vision(config: VisionConfig, *, opening: Opening = opened_here) -> VisionEncoder:
    """Return the encoder that `config` asks for, with its weights, in evaluation mode on the CPU.

    Args:
        config: the encoder.
        opening: how the file of weights is opened: by this process alone, or by all ranks of a run together.

    Raises:
        FileNotFoundError: the weights are not there; the message says how to fetch them.
        ValueError: the weights are another network's.
    """
    with _outside_zero_init():
        return _build(config, opening).eval()


def _build(config: VisionConfig, opening: Opening) -> VisionEncoder:
    if config.name == "tiny":
        return TinyEncoder(config)
    if config.is_vit:
        # Imported late: transformers takes a second, and the other encoders do without.
        from flamingo_dist.models.vision.vit import ABSENT, ViTEncoder

        return ViTEncoder(config, None if is_without_values() else _open(config, opening, ABSENT))
    if config.is_nfnet:
        is_drawn = not config.weights or is_without_values()
        return NFNet(config, None if is_drawn else _open(config, opening, NO_NFNET))
    # It reads its shapes off the file; in a dry run there is no other rank that would hand it on.
    opening = opened_here if is_without_values() else opening
    return EfficientNetLite0(config, _open(config, opening, NO_EFFICIENTNET))


def _open(config: VisionConfig, opening: Opening, absent: str) -> WeightSource:
    return opening(lambda: open_tensors(config.weights, absent=absent.format(config.weights)))


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
