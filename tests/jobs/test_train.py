"""Whole runs through Ray, started by the command line as a person starts them.

The data are damaged on purpose: a corrupt JPEG, an empty caption, a shard cut short. A straight run and one that
is killed twice (a training process, then everything) must skip the same samples and end with the same losses.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from data_pipeline.index import open_index
from data_pipeline.shards import ShardWriter
from flamingo_dist.training.checkpoint_folder import find_checkpoint, read_manifest
from jobs.shapes import ShapesConfig, picture, write_shapes

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 8
# Two processes instead of four keep a whole run at half a minute; TP 2 x DP 2 runs in tests/integration.
SMALL = [
    "--train.steps",
    str(STEPS),
    "--train.checkpoint-every",
    "2",
    "--train.probe-every",
    "4",
    "--parallel.tensor",
    "1",
    "--resources.workers",
    "2",
    "--data.train.pairs.bad-sample-budget",
    "0.5",
]


def flamingo(*arguments: str, cache: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flamingo_dist.cli", *arguments],
        env={**os.environ, "FLAMINGO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def damage(folder: Path) -> None:
    """Write the training pairs anew: two bad samples, and a last shard that is cut in its middle."""
    shutil.rmtree(folder)
    writer = ShardWriter(str(folder), max_samples=8)
    for number in range(40):
        image = io.BytesIO()
        picture("red", "circle", (16, 16), 5 + number % 7).save(image, "JPEG")
        blob, caption = image.getvalue(), f"a red circle {number}"
        if number == 3:
            blob = blob[: len(blob) // 2]
        if number == 12:
            caption = "  "
        writer.write(f"p{number:03d}", {"jpg": blob, "txt": caption.encode()})
    writer.close()
    last = sorted(folder.glob("*.tar"))[-1]
    last.write_bytes(last.read_bytes()[: last.stat().st_size * 5 // 8])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    shapes = folder / "shapes" / "v1"
    write_shapes(shapes, ShapesConfig(pairs=8, documents=16, videos=8, held_out=16))
    damage(shapes / "pairs")
    return folder


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory):
    runs = tmp_path_factory.mktemp("straight")
    done = flamingo("train", "smoke", "--runs-dir", str(runs), *SMALL, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data set 'pairs' is damaged and lacks what could not be indexed" in done.stderr
    return runs / "smoke"


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The last record of every step: a resumed run repeats those after its checkpoint."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in records if r["kind"] == "step"}


def figures(run: Path) -> dict[int, Any]:
    keys = ("loss", "tokens", "grad_norm", "lr", "gates", "bad_samples")
    return {step: {k: r[k] for k in keys} for step, r in steps_of(run).items()}


def quarantined(run: Path) -> set[tuple[str, str]]:
    lines = (run / "quarantine.jsonl").read_text().splitlines()
    return {(entry["key"], entry["cause"]) for entry in map(json.loads, lines)}


def test_a_run_leaves_all_that_it_promises(straight):
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["recipe"] == "smoke"
    assert set(summary["grounding_gap_nats"]) == {"held_out"}
    assert summary["step_0_minus_bare_lm_nats"] == {"held_out": 0.0}
    assert summary["peak_source"] == "measured"
    assert 0 < summary["useful_mfu"] < summary["hfu"], "smoke recomputes"
    assert all(0 < record["useful_mfu"] < record["hfu"] for record in steps_of(straight).values())
    for key in ("data_wait_share", "checkpoint_stall_share", "tokens_per_second"):
        assert summary[key] >= 0
    assert summary["seconds"]["train"] > 0
    assert {"torch", "deepspeed", "megatron-core", "ray"} <= set(summary["versions"])
    page = (straight / "report.html").read_text()
    assert "<svg" in page
    assert "held_out" in page
    samples = json.loads((straight / "samples.json").read_text())
    assert len(samples) == 4
    for sample in samples:
        assert sample["caption"].startswith("a ")
        assert Image.open(straight / sample["image"]).size == (192, 192)
    records = steps_of(straight)
    assert sorted(records) == list(range(STEPS))
    assert all(set(r["loss"]) == {"documents", "pairs", "videos"} for r in records.values())
    # Step 0 is the bare LM: all gates shut.
    assert records[0]["gates"] == {"attn": [0.0, 0.0], "ffw": [0.0, 0.0]}
    assert records[STEPS - 1]["gates"]["attn"][0] > 0


def test_bad_samples_are_counted_and_listed(straight):
    found = quarantined(straight)
    causes = {cause for _, cause in found}
    assert ("p003", "corrupt image") in found
    assert any(key == "p012" for key, _ in found)
    assert any("truncated" in cause for cause in causes), causes
    assert json.loads((straight / "summary.json").read_text())["bad_samples"] >= 3


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and step in steps_of(run):
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.1)
    pytest.fail(f"no step {step} in time")


@pytest.mark.integration  # three starts of a whole run
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_losses(straight, cache, tmp_path):
    run, arguments = tmp_path / "smoke", ["train", "smoke", "--runs-dir", str(tmp_path), *SMALL]
    rng = random.Random(int.from_bytes(os.urandom(4), "little"))
    worker_dies, all_dies = rng.randrange(1, 3), rng.randrange(4, STEPS - 1)
    print(f"a worker dies after step {worker_dies}, everything after step {all_dies}")
    process = subprocess.Popen(
        [sys.executable, "-m", "flamingo_dist.cli", *arguments],
        env={**os.environ, "FLAMINGO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        wait_for_step(run, worker_dies, process)
        workers = [
            p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in p.name()
        ] or [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if any("RayTrainWorker" in part for part in p.cmdline())
        ]
        assert len(workers) == 2
        rng.choice(workers).send_signal(signal.SIGKILL)
        wait_for_step(run, all_dies, process)
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for member in family:
            if member.is_running():
                member.kill()
        process.wait()
    assert max(steps_of(run)) < STEPS - 1, "killed too late: this tested nothing"

    refused = flamingo(*arguments, cache=cache)
    assert refused.returncode == 1
    assert "holds a run already; resume it with --resume latest" in refused.stderr
    resumed = flamingo(*arguments, "--resume", "latest", cache=cache)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert figures(run) == figures(straight)
    assert quarantined(run) == quarantined(straight)

    other = flamingo(*arguments, "--resume", "latest", "--train.optimizer.lr", "0.5", cache=cache)
    assert other.returncode == 1
    assert "run.train.optimizer.lr: checkpoint 0.003, this run 0.5" in other.stderr


@pytest.mark.integration  # a whole run
def test_a_stop_request_to_every_process_saves_first(cache, tmp_path):
    """As `timeout` and systemd send it: to the driver, to Ray's own processes and to the workers."""
    run, longer = tmp_path / "smoke", ["--train.steps", "4000", *SMALL[2:]]
    process = subprocess.Popen(
        [sys.executable, "-m", "flamingo_dist.cli", "train", "smoke", "--runs-dir", str(tmp_path), *longer],
        env={**os.environ, "FLAMINGO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    family = []
    try:
        wait_for_step(run, 1, process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert {"gcs_server", "raylet"} <= {member.name() for member in family}
        for member in family:
            member.terminate()
        process.terminate()
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        _, left = psutil.wait_procs(family, timeout=30)
        for member in left:
            member.kill()
    assert process.returncode == 0, said
    assert not left
    saved = read_manifest(find_checkpoint(run / "checkpoints", "latest"))
    assert saved["step"] == max(steps_of(run)) + 1


def test_generate_captions_an_image_from_a_few_shot_prompt(straight, cache, tmp_path):
    image, shot = tmp_path / "query.png", tmp_path / "shot.png"
    picture("blue", "square", (16, 16), 8).save(image)
    picture("red", "circle", (16, 16), 8).save(shot)
    done = flamingo(
        "generate",
        "--run",
        str(straight),
        "--image",
        str(image),
        "--shot",
        f"{shot}=a red circle",
        "--max-new-tokens",
        "5",
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{image}: ")
    bad = flamingo("generate", "--run", str(tmp_path), "--image", str(image), cache=cache)
    assert bad.returncode == 1
    assert "holds no run (no config.json)" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train", "smoke", "--train.stesp", "3"], 2, "--train.steps"),
        (["train", "smoke", "--parallel.tensor", "4"], 1, "does not divide lm.num_kv_heads=2"),
        (["train", "smoke", "--data.train.pairs.batch-size", "7"], 1, "must be a multiple of the 2"),
        (["train", "nope"], 1, "recipes are smoke, demo"),
        (["tarin"], 2, "unknown command 'tarin'"),
        (
            ["train", "smoke", "--data.train.pairs.urls", "/nowhere/shard-{000..003}.tar"],
            1,
            "/nowhere/shard-0",
        ),
        (["train", "smoke", "--resume", "latest"], 1, "no complete checkpoint"),
    ],
)
def test_bad_input_is_a_clear_error(cache, tmp_path, arguments, code, says):
    runs = ["--runs-dir", str(tmp_path)] if len(arguments) > 1 else []
    done = flamingo(*arguments, *runs, cache=cache)
    assert done.returncode == code
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_print_config_prints_the_resolved_configuration(cache):
    done = flamingo("train", "smoke", "--train.steps", "3", "--print-config", cache=cache)
    assert done.returncode == 0
    assert json.loads(done.stdout)["train"]["steps"] == 3


def test_data_of_this_module_are_as_damaged_as_meant(cache):
    index = open_index([str(cache / "shapes" / "v1" / "pairs")])
    assert index.num_samples == 40
    assert index.skips, "the cut shard must be noticed"
