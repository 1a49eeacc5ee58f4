"""Configuration of the frozen language model."""

from dataclasses import dataclass
from typing import Literal

from flamingo_dist.choices import check_choices

Naming = Literal["llama", "opt", "gpt2", "mpt", "mosaic_gpt"]
WeightStorage = Literal["same", "int8", "fp8"]
MatrixProducts = Literal["same", "fp8"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """LLaMA-3's stretching of the slow rotary frequencies ("llama3" in Hugging Face configurations)."""

    factor: float = 1.0
    """Frequencies with wavelengths beyond `original_positions / low_freq` are divided by this; 1 leaves all alone."""
    low_freq: float = 1.0
    """Turns in the original context below which a frequency is divided whole."""
    high_freq: float = 4.0
    """Turns in the original context above which a frequency stays; between the two it is blended."""
    original_positions: int = 8192
    """Context length of the first pretraining."""

    def __post_init__(self) -> None:
        """Reject a blend without a range."""
        if not 0 < self.low_freq < self.high_freq or self.factor <= 0:
            raise ValueError(
                f"rope_scaling has factor={self.factor}, low_freq={self.low_freq}, high_freq={self.high_freq}; "
                "the factor must be positive and 0 < low_freq < high_freq."
            )


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A decoder-only language model: pre-norm blocks of attention and feed-forward part, in settings.

    LLaMA, Qwen2, Qwen3, OPT, GPT-2, MPT and Chinchilla are values of these fields, not classes;
    `flamingo_dist.models.weights.read_lm_config` sets them from a published configuration.
    """

    vocab_size: int
    """Entries of the frozen vocabulary; `<image>` and `<EOC>` come after them."""
    num_layers: int
    """Decoder blocks."""
    width: int
    """Model width D."""
    num_heads: int
    """Query heads H."""
    num_kv_heads: int
    """Key/value heads; fewer than `num_heads` is grouped-query attention."""
    head_dim: int
    """Head width K."""
    ffn_width: int
    """Hidden width of the feed-forward part."""
    activation: Literal["silu_gated", "gelu", "gelu_tanh", "relu"] = "silu_gated"
    """Feed-forward activation: gated SiLU (LLaMA, Qwen), GeLU (Chinchilla, MPT), its tanh form (GPT-2), ReLU (OPT)."""
    norm: Literal["rms", "layer", "layer_no_bias"] = "rms"
    """Normalisation before attention, before the feed-forward part and before the head: RMSNorm (LLaMA, Qwen,
    Chinchilla), LayerNorm (OPT, GPT-2), LayerNorm without a shift (MPT)."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Linear layers with a bias: none, queries, keys and values (Qwen2), or all of a block (OPT, GPT-2)."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """Normalise queries and keys: each head by itself (Qwen3), or all heads together (MPT-1B)."""
    clip_qkv: float | None = None
    """Clamp queries, keys and values to this magnitude (some MPT models); None does not."""
    positions: Literal["rotary", "relative", "alibi", "learned"] = "rotary"
    """How positions enter: rotary (LLaMA, Qwen), Transformer-XL's relative ones (Chinchilla), ALiBi's slopes (MPT),
    or a learned table beside the embedding (OPT, GPT-2)."""
    rope_base: float = 10000.0
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """LLaMA-3's stretching of the rotary frequencies."""
    alibi_max: float = 8.0
    """ALiBi: minus the binary logarithm of the flattest slope."""
    max_positions: int = 2048
    """Learned positions: the longest text; the other kinds have no table to run out of."""
    position_offset: int = 0
    """Learned positions: rows of the table before position 0 (2 in OPT)."""
    tied: bool = True
    """Whether the head uses the embedding's weights."""
    weights: str | None = None
    """A `.gguf` file, or a folder of Hugging Face safetensors at any fsspec URL; None draws random frozen weights."""
    naming: Naming = "llama"
    """Whose tensor names the published weights have; Qwen's are LLaMA's."""
    weight_storage: WeightStorage = "same"
    """What the blocks' matrices are kept in: the run's dtype, or one byte a value and one fp32 scale an output channel,
    int8 or fp8 (e4m3). Needs parallel.frozen="resident"."""
    matrix_products: MatrixProducts = "same"
    """What the blocks' matrices are multiplied in: the run's dtype, or fp8, of which Hopper and later GPUs do twice as
    many; activations and their gradients are then quantised by row. "fp8" needs weight_storage="fp8", and keeps the
    codes a second time, transposed."""

    extra_like: tuple[int | None, int | None] = (None, None)
    """Ids whose published rows `<image>` and `<EOC>` start from; None starts near the mean of all rows. A token
    that ends a line is a good start for `<EOC>`: the LM already knows where one comes."""

    further_tokens: int = 0
    """Trainable rows after `<image>` and `<EOC>`, from id `vocab_size + 2` on: tokens that a published model has
    besides, such as `<end_of_utterance>` of IDEFICS' instruct models. No data's text is tokenised into them, a
    user's prompt may name them, and generation ends at them."""

    @property
    def extra_tokens(self) -> int:
        """Trainable rows after the frozen vocabulary: `<image>`, `<EOC>` and the further ones."""
        return 2 + self.further_tokens

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part has a gate projection."""
        return self.activation == "silu_gated"

    @property
    def table_rows(self) -> int:
        """Rows of the table of learned positions, 0 where there is none."""
        return self.max_positions + self.position_offset if self.positions == "learned" else 0

    def __post_init__(self) -> None:
        """Reject shapes that no layout could run."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key/value head must serve the same number of query heads."
            )
        sizes = ("vocab_size", "num_layers", "width", "num_heads", "head_dim", "ffn_width", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.further_tokens < 0:
            raise ValueError(f"further_tokens is {self.further_tokens}, but must be at least 0.")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions need pairs of channels.")
        if self.positions == "relative" and self.width % 2:
            raise ValueError(f"width {self.width} is odd: relative positions need pairs of sine and cosine.")
        check_choices(self)
        if self.matrix_products == "fp8" and self.weight_storage != "fp8":
            raise ValueError(
                f"matrix_products='fp8' needs weight_storage='fp8', not {self.weight_storage!r}: set both, or neither."
            )
        if self.rope_scaling.factor != 1 and self.positions != "rotary":
            raise ValueError(f"rope_scaling.factor needs positions='rotary', not {self.positions!r}.")
