"""GPUs that a process of this node may use."""

from flamingo_dist.planning.hardware import GIB
from jobs.doctor.findings import Finding, fail, ok, warn
from jobs.doctor.report import GPUFacts


def present() -> tuple[GPUFacts, ...]:
    """Return the GPUs that torch sees, CUDA_VISIBLE_DEVICES applied; none without a driver or in a torch for CPUs."""
    import torch  # a second; a run on CPUs does without

    if not torch.cuda.is_available():
        return ()
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append(
            GPUFacts(name=torch.cuda.get_device_name(number), total_gib=total / GIB, free_gib=free / GIB)
        )
    return tuple(found)


def check_gpus(gpus: tuple[GPUFacts, ...], *, built_for_gpus: bool) -> list[Finding]:
    """Check the GPUs of this node for a run that wants some.

    Args:
        gpus: what is there.
        built_for_gpus: whether this torch was built with CUDA.
    """
    if not built_for_gpus:
        remedy = (
            "install the CUDA build of torch: pip install torch from PyPI's default index, or make install"
        )
        return [fail("GPUs of the node", "this torch was built for CPUs alone", remedy)]
    if not gpus:
        remedy = (
            "take a node with GPUs (sbatch --gpus-per-node), or look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
        return [fail("GPUs of the node", "no GPU can be used here", remedy)]
    busy = [
        f"{number} ({gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free)"
        for number, gpu in enumerate(gpus)
        if gpu.free_gib < 0.95 * gpu.total_gib
    ]
    if busy:
        remedy = "nvidia-smi shows whose processes they are; end them, or exclude the node"
        return [warn("GPUs of the node", f"other processes hold memory of GPU {', '.join(busy)}", remedy)]
    return [ok("GPUs of the node", f"{len(gpus)} x {gpus[0].name}, {gpus[0].total_gib:.1f} GiB each")]
