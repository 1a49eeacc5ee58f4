"""Configuration of the frozen language model."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A decoder-only language model of the LLaMA family."""

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
    activation: Literal["silu_gated", "gelu"] = "silu_gated"
    """Feed-forward activation: gated SiLU (LLaMA) or GeLU (Chinchilla)."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation before attention, before the feed-forward part and before the head."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation."""
    rope_base: float = 10000.0
    """Base of the rotary position frequencies."""
    tied: bool = True
    """Whether the head uses the embedding's weights."""
    weights: str | None = None
    """A `.gguf` file or a folder of Hugging Face safetensors; None draws random frozen weights."""

    extra_like: tuple[int | None, int | None] = (None, None)
    """Ids whose published rows `<image>` and `<EOC>` start from; None starts near the mean of all rows. A token
    that ends a line is a good start for `<EOC>`: the LM already knows where one comes."""

    def __post_init__(self) -> None:
        """Reject shapes that no layout could run."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key/value head must serve the same number of query heads."
            )
        for name in ("vocab_size", "num_layers", "width", "num_heads", "head_dim", "ffn_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions need pairs of channels.")
