"""The doctor on whole runs: configurations that contradict themselves, data that are not there, machines too small."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest

from data_pipeline.config import DatasetConfig
from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.parallel.topology import ParallelConfig
from jobs.config import ResourceConfig
from jobs.doctor import command, data, layout, needs
from jobs.doctor.command import DoctorArguments, doctor
from jobs.doctor.findings import Finding
from jobs.doctor.node import from_lines, to_lines
from jobs.doctor.reach import Answer
from jobs.doctor.report import GPUFacts, Needs, NodeReport
from jobs.recipes import RECIPES
from jobs.recipes.large import flamingo_9b, flamingo_80b
from jobs.recipes.smoke import prepare_smoke, smoke
from jobs.unchecked import UncheckedRun, unchecked

ROOT = Path(__file__).resolve().parents[3]


def levels(found: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in found}


def with_tensor(run: UncheckedRun, tensor: int, workers: int | None = None) -> UncheckedRun:
    resources = replace(run.resources, workers=workers or run.resources.workers)
    return replace(run, parallel=replace(run.parallel, tensor=tensor), resources=resources)


def nodes(
    count: int, gpus: int, *, memory: float = 79.1, cores: int = 96, name: str = "NVIDIA H100 80GB HBM3"
) -> list[NodeReport]:
    each = (GPUFacts(name=name, total_gib=memory, free_gib=memory),) * gpus
    return [NodeReport(node=f"n{i}", host=f"h{i}", cores=cores, gpus=each) for i in range(count)]


def test_a_tensor_degree_that_is_too_large_is_named_with_all_that_it_does_not_divide():
    found = layout.check_configuration(with_tensor(unchecked(smoke()), 8, workers=8))
    assert levels(found)["tensor parallel"] == "fail"
    (finding,) = [f for f in found if f.check == "tensor parallel"]
    for size in (
        "lm.num_heads=4",
        "lm.num_kv_heads=2",
        "gated.heads=4",
        "lm.vocab_size (random weights)=260",
    ):
        assert size in finding.says
    assert "lm.ffn_width" not in finding.says, "128 divides"
    assert finding.remedy.startswith("set --parallel.tensor to one of [1, 2]")


def test_all_contradictions_are_listed_at_once():
    run = with_tensor(unchecked(smoke()), 3, workers=8)
    assert levels(layout.check_configuration(run)) == {"world": "fail", "tensor parallel": "fail"}
    run = with_tensor(unchecked(smoke()), 1, workers=6)
    found = levels(layout.check_configuration(run))
    assert {name for name, level in found.items() if level == "fail"} == {
        f"batch of {name}" for name in ("documents", "pairs", "videos", "held_out")
    }
    small = replace(smoke().model.vision, image_size=64)
    run = replace(unchecked(smoke()), model=replace(smoke().model, vision=small))
    assert levels(layout.check_configuration(run))["configuration"] == "fail"


def test_configurations_of_the_recipes_are_consistent():
    for recipe in (smoke, flamingo_9b, flamingo_80b):
        assert set(levels(layout.check_configuration(unchecked(recipe()))).values()) == {"ok"}


def test_gpus_of_the_nodes():
    run = flamingo_9b()  # 32 processes
    run = replace(run, parallel=replace(run.parallel, tensor=2))
    assert levels(layout.check_processes(run, nodes(4, 8), own_ray=False))["GPUs"] == "ok"
    few = layout.check_processes(run, nodes(3, 8), own_ray=False)
    assert levels(few)["GPUs"] == "fail"
    assert "--resources.workers 24" in few[0].remedy
    assert "no-use-gpu" in layout.check_processes(run, nodes(4, 0), own_ray=False)[0].remedy
    odd = layout.check_processes(run, nodes(11, 3), own_ray=False)
    assert levels(odd)["GPUs"] == "warn"
    assert "across nodes" in odd[0].says


def test_cpus_that_ray_would_wait_for():
    run = flamingo_9b()  # 32 x 4 and 64 readers
    found = layout.check_processes(run, nodes(4, 8, cores=16), own_ray=False)
    assert levels(found) == {"GPUs": "ok", "CPUs": "fail"}
    assert "192 CPUs" in found[1].says
    assert levels(layout.check_processes(smoke(), nodes(1, 0, cores=1), own_ray=True)) == {"CPUs": "warn"}


def test_memory_of_a_gpu_and_what_would_fit():
    run = flamingo_80b()
    (fits,) = layout.check_gpu_memory(run, nodes(32, 8))
    assert fits.level == "ok"
    (small,) = layout.check_gpu_memory(run, nodes(32, 8, memory=30.0))
    assert small.level == "fail"
    wide = replace(run, parallel=replace(run.parallel, tensor=1))
    (other,) = layout.check_gpu_memory(wide, nodes(32, 8))
    assert other.level == "fail"
    assert "--parallel.tensor" in other.remedy
    assert layout.check_gpu_memory(smoke(), nodes(1, 8)) == [], "a run on CPUs"


def test_fp8_products_want_gpus_that_have_them():
    run = flamingo_80b()
    assert layout.check_fp8(run, nodes(1, 8)) == []
    lm = replace(run.model.lm, weight_storage="fp8", matrix_products="fp8")
    run = replace(run, model=replace(run.model, lm=lm))
    (found,) = layout.check_fp8(run, nodes(1, 8))
    assert found.level == "ok"
    (found,) = layout.check_fp8(run, nodes(1, 8, name="NVIDIA A100-SXM4-80GB"))
    assert found.level == "fail"
    assert "A100-SXM4-80GB has no fp8 matrix units" in found.says
    assert layout.check_fp8(run, []) == []


def test_needs_grow_with_what_they_follow_from():
    run = smoke()
    whole = needs.needs_of(run, 1, "/runs/x")
    assert (whole.processes, needs.needs_of(run, 2, "/runs/x").processes) == (4, 2)
    assert needs.needs_of(run, 2, "/runs/x").host_bytes < whole.host_bytes
    pairs = run.data.train["pairs"]
    local = pairs.batch_size // 2
    assert needs.batch_bytes(pairs, 2) == local * (3 * pairs.image_size**2 + 13 * pairs.seq_len)
    more = replace(run, data=replace(run.data, readers=replace(run.data.readers, prefetch=5)))
    assert needs.object_bytes(more, 4) == 2 * needs.object_bytes(run, 4)
    cached = replace(pairs, cache_folder="/disk", cache_bytes=123)
    train = {**run.data.train, "pairs": cached}
    assert needs.needs_of(replace(run, data=replace(run.data, train=train)), 1, "x").caches == {"/disk": 123}


def test_local_files_are_wanted_on_every_node():
    run = smoke()
    pairs = replace(run.data.train["pairs"], urls=("/a/x-{00..09}.tar", "s3://b/c", "/d"))
    data = replace(run.data, train={"pairs": pairs}, held_out={})
    lm = replace(run.model.lm, weights="/w.gguf")
    model = replace(run.model, lm=lm, weights="/folder")
    wanted = needs.local_paths(replace(unchecked(run), data=data, model=model))
    assert wanted == ("/folder", "/w.gguf", "/a", "/d")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the smoke recipe's data that a test may spoil."""
    prepare_smoke()
    source = Path(smoke().data.train["pairs"].urls[0]).parent
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("doctor") / "shapes"))


def reading(dataset: DatasetConfig) -> UncheckedRun:
    run = smoke()
    return unchecked(replace(run, data=replace(run.data, train={"pairs": dataset})))


def pairs_in(folder: Path, **changes: object) -> DatasetConfig:
    return replace(smoke().data.train["pairs"], urls=(str(folder),), **changes)  # type: ignore[arg-type]


def test_a_missing_shard_is_named(shapes, tmp_path):
    folder = Path(shutil.copytree(shapes / "pairs", tmp_path / "pairs"))
    whole = pairs_in(folder)
    assert levels(data.check_dataset(reading(whole), whole)) == {"data pairs": "ok"}
    gone = sorted(folder.glob("*.tar"))[1]
    gone.unlink()
    (finding,) = data.check_dataset(reading(whole), whole)
    assert finding.level == "fail"
    assert f"missing shard: {gone}" in finding.says
    assert "--data.train.pairs.urls" in finding.remedy
    (folder / "index.json").unlink()  # nothing lists it any more, but its number is missing
    (finding,) = data.check_dataset(reading(whole), whole)
    assert finding.level == "warn"
    assert gone.name in finding.says


def test_a_cut_shard_a_small_set_and_a_folder_that_is_not_there(shapes, tmp_path):
    folder = Path(shutil.copytree(shapes / "pairs", tmp_path / "pairs"))
    cut = min(folder.glob("*.tar"))
    os.truncate(cut, cut.stat().st_size // 2)
    (finding,) = data.check_dataset(reading(pairs_in(folder)), pairs_in(folder))
    assert (finding.level, "damaged" in finding.says) == ("warn", True)
    large = pairs_in(shapes / "pairs", batch_size=2000)
    (finding,) = data.check_dataset(reading(large), large)
    assert (finding.level, "fewer than the batch of 2000" in finding.says) == ("warn", True)
    nowhere = pairs_in(tmp_path / "nowhere")
    assert [f.level for f in data.check_dataset(reading(nowhere), nowhere)] == ["fail"]


def test_few_shards_on_a_remote_storage(shapes):
    remote = replace(pairs_in(shapes / "pairs"), urls=("s3://bucket/pairs",))
    run = reading(remote)
    readers = replace(run.data.readers, readers=64)
    run = replace(run, data=replace(run.data, readers=readers))
    (finding,) = data._check_shards(run, remote, 6, "data pairs")
    assert finding.level == "warn"
    assert "6 shards for 64 readers and 2 data-parallel ranks" in finding.says
    assert data._check_shards(run, remote, 640, "data pairs") == []


def test_numbers_of_shards_that_are_missing():
    assert data.missing_numbers(["a-00.tar", "a-01.tar", "a-03.tar", "b-7.tar", "x.tar"]) == ["a-02.tar"]
    assert data.missing_numbers(["20230101.tar", "20260101.tar"]) == [], "dates are no series"


def test_tokenizers(tmp_path):
    assert data.check_tokenizer(TokenizerConfig(kind="bytes", vocab_size=260), 260).level == "ok"
    finding = data.check_tokenizer(TokenizerConfig(kind="bytes", vocab_size=300), 260)
    assert (finding.level, "300 entries, the language model 260" in finding.says) == ("fail", True)
    finding = data.check_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path)), 260)
    assert (finding.level, "no tokenizer.json" in finding.says) == ("fail", True)


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NCCL_"))}
    command = [sys.executable, "-m", "flamingo_dist.cli", "doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**own, **environment}, capture_output=True, text=True)


def test_the_smoke_recipe_passes(tmp_path):
    done = run_doctor("smoke", "--runs-dir", str(tmp_path / "runs"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["ok"]
    assert said["counts"]["fail"] == 0
    checks = {finding["check"] for finding in said["findings"]}
    assert {
        "world",
        "tensor parallel",
        "data pairs",
        "tokenizer",
        "disk of the run folder",
        "versions",
    } <= checks
    assert not (tmp_path / "runs").exists(), "the doctor leaves nothing behind"


def test_an_occupied_port_and_a_bogus_interface_end_with_1(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = str(occupied.getsockname()[1])
        done = run_doctor(
            *("smoke", "--runs-dir", str(tmp_path), "--skip", "data", "--quiet"),
            *("--resources.use-gpu", "--master-port", port),
            NCCL_SOCKET_IFNAME="bogus7",
        )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"fail  master port: 127.0.0.1:{port} cannot be listened on" in done.stdout
    assert "fail  NCCL_SOCKET_IFNAME" in done.stdout
    assert "ok  " not in done.stdout.rpartition("\n")[0].split("\n")[0]


def test_a_configuration_that_cannot_run_ends_with_1(capsys):
    assert doctor(["smoke", "--skip", "data", "--parallel.tensor", "4", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["ok"]
    wrong = [finding for finding in said["findings"] if finding["level"] == "fail"]
    assert [finding["check"] for finding in wrong] == ["tensor parallel", "machine"]
    assert all(finding["remedy"] for finding in wrong)


def test_a_runs_folder_that_is_a_file(tmp_path, monkeypatch):
    """Several nodes would be shown a mark in the run folder, which there is no folder for."""
    (tmp_path / "file").touch()
    given = DoctorArguments(
        run=replace(unchecked(smoke()), runs_dir=str(tmp_path / "file")), skip=("data",), ray_address="x"
    )
    asked = []

    def by_ray(needs: Needs, address: str) -> Answer:
        asked.append(needs)
        return [], []

    monkeypatch.setattr(command, "by_ray", by_ray)
    found, _ = command.examine_run(RECIPES["smoke"], given)
    (finding,) = [f for f in found if f.level == "fail"]
    assert (finding.check, "is no folder" in finding.says) == ("run folder", True)
    assert [needs.mark for needs in asked] == [""]


def test_wrong_usage(capsys):
    assert doctor([]) == 2
    assert doctor(["--json", "smoke"]) == 2
    assert "'--json' stands where the recipe has to be" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown recipe"):
        doctor(["none"])
    assert ParallelConfig().tensor == ResourceConfig().workers == 1


def test_reports_survive_what_srun_does_to_the_lines_of_two_tasks():
    texts = {"n1": json.dumps({"says": "ä{" * 900}), "n2": json.dumps({"says": "}" * 2500})}
    lines = [to_lines(node, text) for node, text in texts.items()]
    assert all(len(line) < 1024 for each in lines for line in each)
    mixed = [line for pair in zip_longest(*lines, fillvalue="a warning") for line in pair]
    assert sorted(from_lines("\n".join(mixed))) == sorted(texts.values())
    assert from_lines("\n".join(lines[0] + lines[1][:-1])) == [texts["n1"]], "a cut report is none"
