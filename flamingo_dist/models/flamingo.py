"""Flamingo: a frozen LM that sees images through gated cross-attention (arXiv 2204.14198, section 2).

Dimension letters: B batch, T text tokens, M media, F frames, S features of a frame, C feature channels,
R latents, E resampler width, D LM width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flamingo_dist.models.attention import KeyValueCache
from flamingo_dist.models.gated_block import GatedBlockConfig, GatedCrossAttentionBlock, MediaKV
from flamingo_dist.models.linear import replicated_linear
from flamingo_dist.models.lm import BlockInputs, LanguageModel, run_layer
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.ranges import part
from flamingo_dist.models.recompute import Keeper, Recompute
from flamingo_dist.models.resampler import PerceiverLayer, PerceiverResampler, ResamplerConfig
from flamingo_dist.models.vision import VisionConfig, VisionEncoder, build_vision
from flamingo_dist.models.vision.batches import encode_in_batches
from flamingo_dist.models.vision.split import encode_split
from flamingo_dist.models.vocabulary import IGNORE
from flamingo_dist.models.weights.source import Opening, opened_here

RunLayer = Callable[[nn.Module, Tensor, BlockInputs], Tensor]
"""Runs a decoder block on the stream, as `run_layer` does."""
SHAPES = 128
"""Variants of a compiled block at most: one for each shape of a data set's batch, and of an encoder's blocks one for
each kind and size of a sub-batch (NFNet: nine kinds, seven sizes up to 64). torch's own limit is 8."""


@dataclass(frozen=True, kw_only=True)
class FlamingoConfig:
    """A whole network: frozen LM, frozen vision encoder, trainable parts between them."""

    lm: LMConfig
    """The frozen language model."""
    vision: VisionConfig
    """The frozen vision encoder."""
    resampler: ResamplerConfig
    """The Perceiver Resampler; its feature width must be the encoder's."""
    gated: GatedBlockConfig
    """The GATED XATTN-DENSE blocks; their widths must be the LM's and the resampler's."""
    cross_every: int = 1
    """A gated block stands before every n-th LM block (paper: 1, 4, 7)."""
    cross_phase: Literal["first", "last"] = "first"
    """Which block of every n: the first (paper, IDEFICS: i mod n = 0) or the last (OpenFlamingo)."""
    vision_batch: int = 64
    """Frames encoded at once."""
    weights: str | None = None
    """A folder at any fsspec URL that `flamingo export` or `flamingo import` wrote, whose parameters the network starts
    from; None starts from random trainable parameters and `lm.weights`."""

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        pairs = [
            ("resampler.feature_width", self.resampler.feature_width, "vision.width", self.vision.width),
            ("gated.width", self.gated.width, "lm.width", self.lm.width),
        ]
        for left, a, right, b in pairs:
            if a != b:
                raise ValueError(f"{left}={a} must equal {right}={b}.")
        if not 1 <= self.cross_every <= self.lm.num_layers:
            raise ValueError(
                f"cross_every={self.cross_every} must lie between 1 and lm.num_layers={self.lm.num_layers}."
            )

    @property
    def maps_media(self) -> bool:
        """Whether a linear map stands between the resampler and the gated blocks, as their widths differ.

        Table 5 counts keys and values of the gated blocks as reading the LM's width, so the paper's networks have one.
        """
        return self.gated.media_width != self.resampler.width

    def gated_positions(self) -> list[int]:
        """Return the LM blocks that a gated block stands before."""
        remainder = 0 if self.cross_phase == "first" else self.cross_every - 1
        return [i for i in range(self.lm.num_layers) if i % self.cross_every == remainder]

    def tensor_sizes(self) -> dict[str, int]:
        """Return every size that tensor parallelism cuts, by the name of its setting."""
        return {
            "lm.num_heads": self.lm.num_heads,
            "lm.num_kv_heads": self.lm.num_kv_heads,
            "lm.ffn_width": self.lm.ffn_width,
            "resampler.heads": self.resampler.heads,
            "resampler.ffw_mult * width": self.resampler.ffw_mult * self.resampler.width,
            "gated.heads": self.gated.heads,
            "gated.ffw_hidden": self.gated.ffw_hidden,
        }


class FlamingoOutput(NamedTuple):
    """What a forward returns; a named tuple, whose tensors ZeRO-3's hooks find."""

    logits_BTV: Tensor | None
    """[B, T, vocab_size + extra_tokens], where no targets were given."""
    nll_BT: Tensor | None
    """fp32 [B, T] nats, zero at ignored targets, where targets were given."""
    latents_BMRE: Tensor
    """[B, M, R, E] (of the gated blocks' media width), to be passed back instead of the media."""


class Flamingo(nn.Module):
    """The network. Everything goes through `forward`, so that ZeRO-3's hooks see every use of a weight."""

    def __init__(
        self,
        config: FlamingoConfig,
        *,
        dtype: torch.dtype,
        activation_checkpointing: Recompute = False,
        split_vision: bool = False,
        opening: Opening = opened_here,
    ) -> None:
        """Build the network empty, sliced for this rank of Megatron's tensor-parallel group.

        Args:
            config: the network.
            dtype: parameters' dtype.
            activation_checkpointing: what of every LM block, with its gated block, the backward pass recomputes.
            split_vision: whether each tensor-parallel rank encodes a share of the frames.
            opening: how the vision encoder's weights are opened.
        """
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.split_vision = split_vision
        self.vision = build_vision(config.vision, opening=opening)
        self.vision.requires_grad_(False)
        self.resampler = PerceiverResampler(config.resampler, dtype=dtype)
        self.media_map: nn.Module | None = None
        if config.maps_media:
            # Of normalised latents it makes values of variance 1.
            self.media_map = replicated_linear(
                config.resampler.width,
                config.gated.media_width,
                std=config.resampler.width**-0.5,
                dtype=dtype,
            )
        self.lm = LanguageModel(config.lm, dtype)
        self.gated = nn.ModuleDict(
            {str(i): GatedCrossAttentionBlock(config.gated, dtype=dtype) for i in config.gated_positions()}
        )
        self._gates_off = False
        self._run_trained: RunLayer = run_layer
        """Runs the blocks of the LM in training; elsewhere they stay as they are."""

    def compile_frozen(self, backend: str = "inductor") -> None:
        """Have torch.compile make kernels of frozen blocks: the LM's where gradients are wanted, and the encoder's.

        All blocks of the LM share their code. Shapes of batches are constants of the data sets, so there is one
        compilation for each. Generation and probes run the blocks as they are, so that they compile nothing. The
        weights must be buffers (`parallel.zero.make_frozen_resident`): what ZeRO-3 gathers and frees around a block,
        compiled code would keep.

        Args:
            backend: of torch.compile.
        """
        torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
        # A graph break is an error: it would cost what compiling is to win, without a word.
        self._run_trained = torch.compile(run_layer, backend=backend, fullgraph=True, dynamic=False)
        self.vision.compile_blocks(backend)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the trainable parts compute in."""
        return next(self.resampler.parameters()).dtype

    @property
    def gather_units(self) -> tuple[type[nn.Module], ...]:
        """Classes of modules whose weights are wanted together: what ZeRO-3 gathers at once.

        A layer of the Resampler, or the whole of it where all its layers' weights are wanted at its start. Not
        the vocabulary, which runs twice in a forward: DeepSpeed would reduce its gradients twice.
        """
        resampler = PerceiverResampler if self.config.resampler.shared_feature_kv else PerceiverLayer
        return (TransformerLayer, GatedCrossAttentionBlock, resampler, VisionEncoder)

    def new_cache(self) -> KeyValueCache:
        """Return an empty key/value cache for generation."""
        return KeyValueCache()

    @contextmanager
    def gates_off(self) -> Iterator[None]:
        """Run the bare LM inside: the gated blocks are left out, as if every gate were 0."""
        self._gates_off = True
        try:
            yield
        finally:
            self._gates_off = False

    def gate_values(self) -> dict[str, list[Tensor]]:
        """Return tanh of the gates by kind ("attn", "ffw"), as the last forward used them.

        Returns:
            For each kind one detached fp32 tensor per gated block, 0-dim (scalar gates) or [D].
        """
        gates = [block.gates() for block in self._gated_blocks().values()]
        return {"attn": [g[0] for g in gates], "ffw": [g[1] for g in gates]}

    def _gated_blocks(self) -> dict[int, GatedCrossAttentionBlock]:
        """Return the gated blocks by the number of the LM block that they stand before."""
        blocks = {int(name): block for name, block in self.gated.items()}
        return cast(dict[int, GatedCrossAttentionBlock], blocks)

    def forward(
        self,
        tokens_BT: Tensor,
        media_index_BT: Tensor,
        media: Tensor | None = None,
        media_mask_BM: Tensor | None = None,
        *,
        latents_BMRE: Tensor | None = None,
        targets_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
        num_media: int | None = None,
        num_targets: int | None = None,
        last_only: bool = False,
    ) -> FlamingoOutput:
        """Run the network.

        Args:
            tokens_BT: ids below vocab_size + extra_tokens, int64 [B, T], right-padded.
            media_index_BT: the one medium (1 ... M) that each token sees, 0 for none, integer [B, T].
            media: pixels uint8 [B, M, F, 3, H, W] or encoder features [B, M, F, S, C].
            media_mask_BM: which media are real, bool [B, M].
            latents_BMRE: the resampler's output of an earlier call, instead of `media`.
            targets_BT: the token that follows each position, int64 [B, T]; -100 where no loss is wanted.
            segments_BT: which of several packed samples each token belongs to, integer [B, T]; tokens of different
                samples do not attend to one another, and positions begin anew with each. None: one a row.
            cache: keys and values of earlier tokens; `tokens_BT` then holds the new tokens alone.
            num_media: how many of `media_mask_BM` are set. Who knows it spares the host to wait for the device, which
                would then stand still while the host catches up.
            num_targets: how many of `targets_BT` are not -100, likewise.
            last_only: whether logits of the last position are all that is wanted, [B, 1, V]: generation spares a long
                prompt the widest product.

        Returns:
            Losses where targets are given, else logits; and the latents.

        Raises:
            ValueError: neither or both of media and latents are given, media without its mask, or segments with
                a cache.
        """
        if (media is None) == (latents_BMRE is None):
            raise ValueError("give either media or latents_BMRE, not both and not neither.")
        if latents_BMRE is None:
            if media is None or media_mask_BM is None:
                raise ValueError("media needs media_mask_BM, which says which of its slots are real.")
            latents_BMRE = self._encode_media(media, media_mask_BM, num_media)
        if segments_BT is not None and cache is not None:
            raise ValueError(
                "segments_BT with a cache: packed rows are for training; generate from one sample a row."
            )
        offset = 0 if cache is None else cache.length
        with part("frozen LM"):
            x_TBD, inputs = self.lm.embed(tokens_BT, segments_BT=segments_BT, offset=offset)
        with self.lm.caching(cache):
            x_TBD = self._run_blocks(x_TBD, latents_BMRE, media_index_BT, inputs, cache)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        with part("loss"):
            x_TBD = self.lm.final_norm(x_TBD[-1:] if last_only and targets_BT is None else x_TBD)
            logits = self.lm.vocabulary(x_TBD.transpose(0, 1), as_head=True) if targets_BT is None else None
            nll = None if targets_BT is None else self._nll(x_TBD, targets_BT, num_targets)
        return FlamingoOutput(logits_BTV=logits, nll_BT=nll, latents_BMRE=latents_BMRE)

    def _run_blocks(
        self,
        x_TBD: Tensor,
        latents_BMRE: Tensor,
        media_index_BT: Tensor,
        inputs: BlockInputs,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Run all blocks on the stream x_TBD [T, B, D]; the others as in `forward`."""
        blocks = self._gated_blocks()
        run = self._run_trained if torch.is_grad_enabled() and cache is None else run_layer
        for i, layer in enumerate(self.lm.layers):
            gated = None if self._gates_off else blocks.get(i)
            media_kv = None if cache is None else cache.media.setdefault(i, MediaKV())
            rest = (latents_BMRE, media_index_BT, inputs, media_kv)
            if not (self.activation_checkpointing and torch.is_grad_enabled()):
                x_TBD = _run_block(run, gated, layer, None, x_TBD, *rest)
                continue
            selective = self.activation_checkpointing == "selective" and gated is not None
            keeper = Keeper() if selective else None
            # The modules are arguments: a closure over the loop's variable would recompute the last block.
            x_TBD = checkpoint(
                _run_block,
                run,
                gated,
                layer,
                keeper,
                x_TBD,
                *rest,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return x_TBD

    def _nll(self, x_TBD: Tensor, targets_BT: Tensor, count: int | None) -> Tensor:
        """Return [B, T] losses; the head, the widest product of all, runs on the wanted positions alone."""
        at_N = positions(targets_BT.flatten() != IGNORE, count)
        batch, length = targets_BT.shape
        # In memory the stream has the position first.
        x_ND = x_TBD.flatten(0, 1).index_select(0, at_N % length * batch + at_N // length)
        nll_N = self.lm.vocabulary(x_ND, targets_N=targets_BT.flatten()[at_N])
        return torch.zeros(batch * length, device=nll_N.device).index_copy(0, at_N, nll_N).view(batch, length)

    def _encode_media(self, media: Tensor, media_mask_BM: Tensor, count: int | None) -> Tensor:
        """Return latents [B, M, R, E]; empty slots are left out of the work and stay zero.

        A batch without any medium still sends one empty slot through the resampler, so that every rank runs
        the same modules whatever its batch holds.
        """
        slots_N = positions(media_mask_BM.flatten(), count)
        if slots_N.numel() == 0:
            slots_N = slots_N.new_zeros(1)
        chosen = media.flatten(0, 1).index_select(0, slots_N)
        features_NFSC = self.encode_pixels(chosen) if chosen.dtype == torch.uint8 else chosen
        # By the same name: the encoder's fp32 features would else stand beside all that the resampler keeps.
        features_NFSC = features_NFSC.to(self.dtype)
        with part("resampler"):
            latents_NRE = self.resampler(features_NFSC)
            if self.media_map is not None:
                latents_NRE = self.media_map(latents_NRE)
        batch, num_media = media_mask_BM.shape
        full = latents_NRE.new_zeros(batch * num_media, *latents_NRE.shape[1:])
        return full.index_copy(0, slots_N, latents_NRE).unflatten(0, (batch, num_media))

    @torch.no_grad()
    def encode_pixels(self, pixels_NF3HW: Tensor) -> Tensor:
        """Return features [N, F, S, C] of uint8 frames [N, F, 3, H, W], encoded `vision_batch` at a time.

        Without a graph, so that nothing of the encoder is kept for the backward.
        """

        def encode(frames: Tensor) -> Tensor:
            return encode_in_batches(self.vision, frames, self.config.vision_batch)

        frames = pixels_NF3HW.flatten(0, 1)
        with part("vision encoder"):
            features_NSC = encode_split(encode, frames) if self.split_vision else encode(frames)
            return features_NSC.unflatten(0, pixels_NF3HW.shape[:2])


def _run_block(
    run: RunLayer,
    gated: GatedCrossAttentionBlock | None,
    layer: nn.Module,
    keeper: Keeper | None,
    x_TBD: Tensor,
    latents_BMRE: Tensor,
    media_index_BT: Tensor,
    inputs: BlockInputs,
    media_kv: MediaKV | None,
) -> Tensor:
    """Run one LM block with the gated block before it; x_TBD and the result are [T, B, D]."""
    if gated is not None:
        with part("gated blocks"), keeper or nullcontext():
            x_TBD = gated(x_TBD, latents_BMRE, media_index_BT, media_kv=media_kv)
    with part("frozen LM"):
        return run(layer, x_TBD, inputs)


def positions(mask_N: Tensor, count: int | None) -> Tensor:
    """Return int64 [count], where a bool mask [N] is set, in order; without the count a device is waited for."""
    found = mask_N.nonzero() if count is None else torch.nonzero_static(mask_N, size=count)
    return found[:, 0]
