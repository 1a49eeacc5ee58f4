"""Frozen vision encoders: pixels in, a grid of features out."""

from flamingo_dist.models.vision.base import VisionConfig, VisionEncoder
from flamingo_dist.models.vision.build import build_vision

__all__ = ["VisionConfig", "VisionEncoder", "build_vision"]
