"""The spans of rows of each image, out of the media indices of a batch."""

import triton
import triton.language as tl


@triton.jit
def media_spans(
    index: tl.tensor,
    spans: tl.tensor,
    T: tl.tensor,
    M: tl.tensor,
    index_b: tl.tensor,
    index_t: tl.tensor,
    BLOCK_T: tl.constexpr,
) -> None:
    """Turn one medium's media indices into its span. index: int [B, T]; spans: int32 [B * M, 2]. Grid: (B * M,).

    A medium that no row sees gets an empty span where its rows would be, so that spans never run backwards.
    """
    sample, medium = tl.program_id(0) // M, tl.program_id(0) % M + 1
    index += tl.cast(sample, tl.int64) * index_b
    first, own_end, end = T, 0, 0
    for begin in range(0, T, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        phi = tl.load(index + tl.cast(t, tl.int64) * index_t, mask=t < T, other=0)
        first = tl.minimum(first, tl.min(tl.where(phi == medium, t, T)))
        own_end = tl.maximum(own_end, tl.max(tl.where(phi == medium, t + 1, 0)))
        end = tl.maximum(end, tl.max(tl.where((phi > 0) & (phi <= medium), t + 1, 0)))
    start = tl.where(own_end > 0, first, end)
    tl.store(spans + tl.program_id(0) * 2, sample * T + start)
    tl.store(spans + tl.program_id(0) * 2 + 1, sample * T + tl.where(own_end > 0, own_end, end))
