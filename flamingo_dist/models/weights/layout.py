"""Which stored tensors a parameter of our LM is cut from, and how: one table for names, shapes and slices."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import Tensor

from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.weights.naming import NAMES, Names
from flamingo_dist.models.weights.source import ALL, WeightSource


class Piece(NamedTuple):
    """A matrix [rows, columns], or a vector [rows], that lies in a stored tensor."""

    name: str
    """The stored tensor."""
    rows: int
    """Its rows: outputs of a linear layer."""
    columns: int | None = None
    """Its columns; None for a vector."""
    first: int = 0
    """Where its rows begin in the stored tensor."""
    transposed: bool = False
    """Whether the stored tensor is [columns, rows]."""

    def read(self, source: WeightSource, rows: slice, columns: slice = ALL) -> Tensor:
        """Return the slice [rows, columns] of this piece."""
        start, stop, _ = rows.indices(self.rows)
        rows = slice(self.first + start, self.first + stop)
        if self.transposed and self.columns is not None:
            return source.read(self.name, columns, rows).T
        return source.read(self.name, rows) if self.columns is None else source.read(self.name, rows, columns)


class Cut(NamedTuple):
    """How a parameter of one tensor-parallel rank is cut from pieces."""

    how: Literal["whole", "rows", "columns", "heads", "vocabulary"]
    """Whole; each piece's rows or columns in even parts; queries, keys and values of each key/value head together
    (Megatron's fused layout); or rows in parts that are padded at the end."""
    pieces: tuple[Piece, ...]
    """Stacked along their rows."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All parameters of an LM."""

    cuts: dict[str, Cut]
    """By the parameter's name inside our LM, such as `layers.3.mlp.linear_fc1.weight`."""
    stored: dict[str, tuple[int, ...]]
    """Shape of every stored tensor, by its name."""


@lru_cache(maxsize=8)
def lm_layout(config: LMConfig) -> Layout:
    """Return the layout of an LM of this configuration, in the names of its family."""
    names = NAMES[config.naming]
    builder = _Builder(config, names)
    cuts = dict(builder.top())
    for i in range(config.num_layers):
        prefix = names.roots[0] + names.block.format(i)
        cuts |= {f"layers.{i}.{part}": cut for part, cut in builder.block(prefix)}
    return Layout(cuts=cuts, stored=builder.stored)


def embedding_piece(config: LMConfig, *, head: bool) -> Piece:
    """Return where the rows of the embedding lie, or those of the head."""
    name = "vocabulary.frozen_head.weight" if head and not config.tied else "vocabulary.frozen.weight"
    return lm_layout(config).cuts[name].pieces[0]


Parts = Iterator[tuple[str, Cut]]


class _Builder:
    """Writes down parameters; notes the shapes of the tensors that they lie in."""

    def __init__(self, config: LMConfig, names: Names) -> None:
        self.config, self.names = config, names
        self.stored: dict[str, tuple[int, ...]] = {}

    def top(self) -> Parts:
        """Yield what stands outside of the blocks."""
        config, root = self.config, self.names.roots[0]
        rows, width = config.vocab_size, config.width
        embedding = self._matrix(f"{root}{self.names.embedding}.weight", rows, width, transposed=False)
        yield "vocabulary.frozen.weight", Cut("vocabulary", (embedding,))
        if not config.tied:
            head = self._matrix("lm_head.weight", rows, width, transposed=False)
            yield "vocabulary.frozen_head.weight", Cut("vocabulary", (head,))
        if config.table_rows:
            table = f"{root}{self.names.positions}.weight"
            piece = self._matrix(table, config.table_rows, width, transposed=False)
            yield "positions.weight", Cut("whole", (piece,))
        yield from self._norm("final_norm", root + self.names.final_norm, width)

    def block(self, prefix: str) -> Parts:
        """Yield the parameters of one block, whose stored names begin with `prefix`."""
        config, names = self.config, self.names
        width, heads, groups = config.width, config.num_heads, config.num_kv_heads
        inner = heads * config.head_dim
        all_biased = config.bias == "all"
        yield from self._norm("input_layernorm", prefix + names.input_norm, width)
        yield from self._norm("pre_mlp_layernorm", prefix + names.mlp_norm, width)
        qkv = tuple(prefix + name for name in names.qkv)
        sizes = (inner, groups * config.head_dim, groups * config.head_dim)
        yield from self._linear(
            "self_attention.linear_qkv", "heads", qkv, sizes, width, config.bias != "none"
        )
        proj = (prefix + names.proj,)
        yield from self._linear("self_attention.linear_proj", "columns", proj, (width,), inner, all_biased)
        up = tuple(prefix + name for name in (names.up if config.gated else names.up[-1:]))
        hidden = (config.ffn_width,) * len(up)
        yield from self._linear("mlp.linear_fc1", "rows", up, hidden, width, all_biased)
        down = (prefix + names.down,)
        yield from self._linear("mlp.linear_fc2", "columns", down, (width,), config.ffn_width, all_biased)
        yield from self._query_key_norms(prefix)
        if config.positions == "relative":
            yield from self._relative(prefix)

    def _query_key_norms(self, prefix: str) -> Parts:
        config = self.config
        counts = (config.num_heads, config.num_kv_heads)
        for letter, stored, heads in zip("qk", self.names.qk_norms, counts, strict=True):
            ours = f"self_attention.{letter}_layernorm"
            if config.qk_norm == "head":
                yield from self._norm(ours, prefix + stored, config.head_dim)
            elif config.qk_norm == "width":
                yield from self._norm(ours, prefix + stored, heads * config.head_dim, how="rows")

    def _relative(self, prefix: str) -> Parts:
        config, (projection, content, position) = self.config, self.names.relative
        inner = config.num_heads * config.head_dim
        core = "self_attention.core_attention"
        yield from self._linear(
            f"{core}.position", "rows", (prefix + projection,), (inner,), config.width, False
        )
        for ours, stored in ((content, "content_bias"), (position, "position_bias")):
            piece = self._matrix(prefix + ours, config.num_heads, config.head_dim, transposed=False)
            yield f"{core}.{stored}", Cut("rows", (piece,))

    def _norm(self, ours: str, stored: str, size: int, *, how: Literal["whole", "rows"] = "whole") -> Parts:
        for kind in ("weight", "bias") if self.config.norm == "layer" else ("weight",):
            yield f"{ours}.{kind}", Cut(how, (self._vector(f"{stored}.{kind}", size),))

    def _linear(
        self,
        ours: str,
        how: Literal["rows", "columns", "heads"],
        stored: tuple[str, ...],
        sizes: tuple[int, ...],
        inputs: int,
        biased: bool,
    ) -> Parts:
        """Yield a linear layer of `inputs`: one stored matrix for each of `sizes`, or one with all of them."""
        matrix = self._stack(stored, sizes, ".weight", lambda n, r: self._matrix(n, r, inputs))
        yield f"{ours}.weight", Cut(how, matrix)
        if biased:
            vectors = self._stack(stored, sizes, ".bias", self._vector)
            yield f"{ours}.bias", Cut("whole" if how == "columns" else how, vectors)

    def _stack(
        self, stored: tuple[str, ...], sizes: tuple[int, ...], kind: str, make: Callable[[str, int], Piece]
    ) -> tuple[Piece, ...]:
        if len(stored) == len(sizes):
            return tuple(make(name + kind, size) for name, size in zip(stored, sizes, strict=True))
        whole = make(stored[0] + kind, sum(sizes))
        return tuple(
            whole._replace(rows=size, first=sum(sizes[:number])) for number, size in enumerate(sizes)
        )

    def _matrix(self, name: str, rows: int, columns: int, *, transposed: bool | None = None) -> Piece:
        turned = self.names.transposed if transposed is None else transposed
        self.stored[name] = (columns, rows) if turned else (rows, columns)
        return Piece(name, rows, columns, transposed=turned)

    def _vector(self, name: str, rows: int) -> Piece:
        self.stored[name] = (rows,)
        return Piece(name, rows)
