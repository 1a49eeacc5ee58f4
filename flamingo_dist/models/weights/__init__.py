"""Weights of a published language model, read slice by slice for one tensor-parallel rank."""

from flamingo_dist.models.weights.extra import extra_start
from flamingo_dist.models.weights.open import open_lm_weights, read_lm_config
from flamingo_dist.models.weights.shards import lm_shard
from flamingo_dist.models.weights.source import WeightSource

__all__ = ["WeightSource", "extra_start", "lm_shard", "open_lm_weights", "read_lm_config"]
