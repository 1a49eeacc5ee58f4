"""The contender of the step benchmark: the same network from transformers' Idefics classes, with the same weights."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_dist.models.exchange.idefics import VISION_PREFIX, idefics_config, rules
from flamingo_dist.models.exchange.rules import read_theirs
from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.training.batch import TrainBatch
from jobs.bench.contender import LeftOutError

NAME = "IDEFICS (transformers)"
_TRAINED = ("gated_cross_attn_layers", "perceiver_resampler", "additional_")
"""Parts of the names of what Flamingo trains."""


class IdeficsNetwork(nn.Module):
    """transformers' network on ready features; its vision tower is a stub that never runs."""

    def __init__(self, ours: Flamingo) -> None:
        """Build it and copy the weights of `ours`, whose dtype and device it takes.

        Raises:
            LeftOutError: transformers is missing, or its classes cannot be this network.
        """
        super().__init__()
        if importlib.util.find_spec("transformers") is None:
            raise LeftOutError("transformers is not installed")
        from transformers import IdeficsConfig, IdeficsForVisionText2Text

        config, weight = ours.config, ours.lm.final_norm.weight
        assert isinstance(weight, Tensor), "the final norm has a weight"
        tower = {
            "embed_dim": config.vision.width,
            "image_size": 32,
            "patch_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 1,
        }
        try:
            stated = idefics_config(config, tower)
        except ValueError as error:
            raise LeftOutError(str(error)) from error
        before = torch.get_default_dtype()
        torch.set_default_dtype(weight.dtype)
        try:
            with weight.device:
                self.network: Any = IdeficsForVisionText2Text(IdeficsConfig(**stated, use_cache=False))
        finally:
            torch.set_default_dtype(before)
        parameters = dict(ours.named_parameters())
        theirs = dict(read_theirs(rules(config), lambda name: parameters[name].detach()))
        missing, surplus = self.network.load_state_dict(theirs, strict=False)
        left = [name for name in missing if not name.startswith(VISION_PREFIX)]
        assert not left, f"weights that ours does not give: {left[:5]}"
        assert not surplus, f"weights that they do not take: {surplus[:5]}"
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(any(part in name for part in _TRAINED))
        self._image_ids = (config.lm.vocab_size, config.lm.vocab_size + 1)

    def forward(self, batch: TrainBatch, targets_BT: Tensor) -> Tensor:
        """Return the sum of the losses of the targets that are not ignored, 0-dim.

        Args:
            batch: with features [B, M, 1, S, C] as media.
            targets_BT: int64 [B, T], -100 where no loss is wanted.
        """
        ours, theirs = self._image_ids
        tokens = torch.where(batch.tokens_BT == ours, theirs, batch.tokens_BT)
        media = torch.arange(1, batch.media.shape[1] + 1, device=tokens.device)
        out = self.network(
            input_ids=tokens,
            image_encoder_embeddings=batch.media.flatten(1, 2),
            image_attention_mask=(batch.media_index_BT[..., None] == media).long(),
        )
        # Its own loss cannot be asked for: with additional rows it reshapes the logits by the wrong size.
        return F.cross_entropy(
            out.logits.float().flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum"
        )
