"""Frozen vision encoders: pixels in, a grid of features out."""

from flamingo_dist.models.vision.base import VisionEncoder
from flamingo_dist.models.vision.build import build_vision
from flamingo_dist.models.vision.config import VisionConfig

__all__ = ["VisionConfig", "VisionEncoder", "build_vision"]
