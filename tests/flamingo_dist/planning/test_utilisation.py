"""MFU of steps that ran: what counts as needed, and of what peak."""

from dataclasses import replace

import pytest
import torch

from flamingo_dist.planning.flops import dataset_flops, step_flops
from flamingo_dist.planning.hardware import GPUS, gpu_of
from flamingo_dist.planning.utilisation import Utilisation, device_peak, measured_flops
from jobs.plan import workload
from jobs.recipes import RECIPES

WORK = workload(RECIPES["flamingo_9b"].config())
TOKENS = {d.name: d.rows * d.tokens for d in WORK.datasets}
MEDIA = {d.name: d.rows * d.media for d in WORK.datasets}


def used(work=WORK, tokens=TOKENS, media=MEDIA, tensor=2, seconds=1.0):
    return Utilisation(work=work, tensor=tensor, peak_flops=1.0).of_step(tokens, media, seconds)


def test_full_batches_need_what_the_planner_counts():
    parts = step_flops(WORK)
    needed = sum(part["forward"] + part["backward"] for part in parts.values())
    again = sum(part["recompute"] for part in parts.values()) + parts["vision"]["forward"]
    assert used()["useful_mfu"] == pytest.approx(needed)
    assert used()["hfu"] == pytest.approx(needed + again)
    assert used(seconds=4.0)["useful_mfu"] == pytest.approx(needed / 4)
    alone = used(tensor=1)
    assert alone["hfu"] == pytest.approx(needed + again - parts["vision"]["forward"])


def test_empty_slots_and_tokens_without_loss_are_not_needed():
    parts = dataset_flops(WORK.model, WORK.datasets[0], checkpointing=True)
    name = WORK.datasets[0].name
    half = used(media=MEDIA | {name: MEDIA[name] // 2})
    saved = (parts["vision"].useful + parts["resampler"].useful) / 2
    assert used()["useful_mfu"] - half["useful_mfu"] == pytest.approx(saved)
    quarter = used(tokens=TOKENS | {name: TOKENS[name] // 4})
    assert used()["useful_mfu"] - quarter["useful_mfu"] == pytest.approx(0.75 * parts["head"].useful)


def test_a_step_on_one_data_set_counts_that_one():
    name = WORK.datasets[-1].name
    alone = used(tokens={name: TOKENS[name]}, media={name: MEDIA[name]})
    parts = dataset_flops(WORK.model, WORK.datasets[-1], checkpointing=True)
    assert alone["useful_mfu"] == pytest.approx(sum(part.useful for part in parts.values()))


def test_without_recomputation_and_tensor_parallelism_both_are_one():
    kept = replace(WORK, parallel=replace(WORK.parallel, activation_checkpointing=False))
    shares = used(work=kept, tensor=1)
    assert shares["hfu"] == shares["useful_mfu"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_gpus_by_the_names_that_drivers_give(name, key):
    assert gpu_of(name) == (None if key is None else GPUS[key])


def test_the_peak_comes_from_the_setting_the_sheet_or_a_product(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert device_peak(cuda, torch.bfloat16).flops == 989e12
    assert device_peak(cuda, torch.float32).source == "data sheet"
    assert device_peak(cuda, torch.bfloat16, 500.0).flops == 500e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    with pytest.raises(ValueError, match=r"resources\.peak_tflops"):
        device_peak(cuda, torch.bfloat16)
    measured = device_peak(torch.device("cpu"), torch.float32)
    assert measured.source == "measured"
    # Two orders of magnitude on either side of a core of today.
    assert 1e8 < measured_flops(torch.float32, repeats=2) < 1e14
