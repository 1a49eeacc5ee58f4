"""The peak that a run's MFU is a share of, agreed on by all its processes."""

import torch
import torch.distributed as dist

from flamingo_dist.parallel.topology import Topology
from flamingo_dist.planning.utilisation import Peak, Utilisation, device_peak
from jobs.config import RunConfig
from jobs.plan import workload


def agree_on_peak(config: RunConfig, topology: Topology, device: torch.device) -> tuple[Utilisation, Peak]:
    """Return what turns steps into MFU, and the peak of all processes together; every process must call this.

    Raises:
        ValueError: see `device_peak`; on all processes.
    """
    dist.barrier()  # so that processes that share a CPU measure it as they will use it
    own = device_peak(device, config.train.torch_dtype, config.resources.peak_tflops)
    total = torch.tensor(own.flops, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    peak = Peak(flops=float(total), source=own.source)
    return Utilisation(work=workload(config), tensor=topology.tensor, peak_flops=peak.flops), peak
