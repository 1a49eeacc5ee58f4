"""GPUs by their data sheets, and the efficiencies that the predictions assume."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU model: data-sheet figures, dense (no sparsity)."""

    memory_gib: float
    """Memory in GiB that a process can address, about the sheet's GB in GiB."""
    bf16_tflops: float
    """Peak of bf16 matrix products, TFLOP/s."""
    fp8_tflops: float
    """Peak of fp8 matrix products, TFLOP/s; 0 where there are none."""
    tf32_tflops: float
    """Peak of TF32 matrix products, TFLOP/s; what cuDNN convolutions of fp32 tensors use."""
    fp32_tflops: float
    """Peak of fp32 outside of the matrix units, TFLOP/s."""
    hbm_gbs: float
    """Memory bandwidth, GB/s."""
    nvlink_gbs: float
    """NVLink bandwidth in one direction, GB/s a GPU."""
    network_gbs: float
    """Network bandwidth in one direction, GB/s a GPU: one NIC a GPU, as in the vendor's own servers."""


GPUS = {
    "a100-40": GPU(
        memory_gib=39.4,
        bf16_tflops=312,
        fp8_tflops=0,
        tf32_tflops=156,
        fp32_tflops=19.5,
        hbm_gbs=1555,
        nvlink_gbs=300,
        network_gbs=25,
    ),
    "a100-80": GPU(
        memory_gib=79.2,
        bf16_tflops=312,
        fp8_tflops=0,
        tf32_tflops=156,
        fp32_tflops=19.5,
        hbm_gbs=2039,
        nvlink_gbs=300,
        network_gbs=25,
    ),
    "h100": GPU(
        memory_gib=79.1,
        bf16_tflops=989,
        fp8_tflops=1979,
        tf32_tflops=495,
        fp32_tflops=67,
        hbm_gbs=3350,
        nvlink_gbs=450,
        network_gbs=50,
    ),
    "h200": GPU(
        memory_gib=139.8,
        bf16_tflops=989,
        fp8_tflops=1979,
        tf32_tflops=495,
        fp32_tflops=67,
        hbm_gbs=4800,
        nvlink_gbs=450,
        network_gbs=50,
    ),
    "b200": GPU(
        memory_gib=178.0,
        bf16_tflops=2250,
        fp8_tflops=4500,
        tf32_tflops=1125,
        fp32_tflops=75,
        hbm_gbs=8000,
        nvlink_gbs=900,
        network_gbs=50,
    ),
}


def gpu_of(device_name: str) -> GPU | None:
    """Return the data sheet of the GPU that the driver calls `device_name`, None if there is none here.

    The sheets are those of SXM modules. A100s of both kinds have one peak; the other H100s (PCIe, NVL) do less.
    """
    name = device_name.lower()
    if "h100" in name and ("pcie" in name or "nvl" in name):
        return None
    return next((gpu for key, gpu in GPUS.items() if all(part in name for part in key.split("-"))), None)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What turns arithmetic into seconds. Assumed, not measured; the order of layouts depends on them."""

    matmul: float = 0.60
    """Share of the matrix peak that linear layers reach (best measured products on an H100: 0.80)."""
    fp8_matmul: float = 0.45
    """Share of the fp8 matrix peak that products with a scale for each row reach, quantising the rows apart."""
    attention: float = 0.35
    """Share of the matrix peak that attention reaches."""
    vision: float = 0.40
    """Share of the matrix peak that the vision encoder reaches."""
    hbm: float = 0.80
    """Share of the memory bandwidth that elementwise work reaches."""
    activation_passes: float = 4.0
    """Times that every activation of a block is read or written beside the matrix products, forward and backward."""
    optimizer_passes: float = 2.0
    """Times that the optimizer's state is read or written in an update."""
    nvlink: float = 0.75
    """Share of NVLink's bandwidth that a collective reaches."""
    network: float = 0.75
    """Share of the network's bandwidth that a collective reaches."""
    overlap: float = 0.70
    """Share of data-parallel traffic that can hide behind computation; tensor-parallel traffic hides nowhere."""
    latency: float = 20e-6
    """Seconds that a collective takes beside its bytes."""
    reserve_gib: float = 2.0
    """Memory of the CUDA context, NCCL and the libraries, GiB."""
    fragmentation: float = 0.05
    """Share of the tensors' bytes that the allocator loses between them."""

    def __post_init__(self) -> None:
        """Check the shares."""
        for name in ("matmul", "fp8_matmul", "attention", "vision", "hbm", "nvlink", "network"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"Assumptions.{name}={getattr(self, name)} must lie above 0 and at most at 1."
                )
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"Assumptions.overlap={self.overlap} must lie between 0 and 1.")
