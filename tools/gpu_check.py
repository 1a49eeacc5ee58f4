"""Checks and measures the kernels on this machine's GPU in under nine minutes: `make gpu-check`.

Five stages, each in a process of its own and with a time limit, so that one that hangs or breaks costs itself alone:
the kernels' tests on CUDA, the kernels' benchmark (which refuses speed to whatever is red in those tests), a whole
step, a profile of one with the vision encoder, and a short training run against the CPU. The stages after the tests
need no more than torch and triton, or say what they lack. Results are files directly in the folder: tests.xml,
kernels.json, kernels.md, kernels.png, step.json, losses.json, summary.json, and rest.tar.gz with the profile and
kernels.csv.

Usage: ``python tools/gpu_check.py [FOLDER] [--dry] [--seconds N] [--only STAGE ...]``; the folder is $OUT if set, else
runs/gpu-check. ``--dry`` runs the same stages at tiny sizes on a CPU, with the kernels under Triton's interpreter.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 520.0
"""Seconds for everything: nine minutes, less what starting takes."""
DRY_TESTS = [
    *(
        f"tests/kernels/test_triton_{op}.py"
        for op in (
            "gated_xattn",
            "perceiver_attn",
            "add_layernorm",
            "gated_relu2",
            "conv_epilogue",
            "row_fp8",
        )
    ),
    *(
        "-k",
        "padding_media_have or padding_is_never or closed_gate or constant_row or large_values or rows_of_zeros",
    ),
]
"""One quick test of each kernel, for the interpreter."""
MOST_FILES = 8
"""What is left in the folder is meant to be carried off by hand: no more files than this."""
WRITTEN = {
    "tests": "tests.xml",
    "kernels": "kernels.json",
    "step": "step.json",
    "losses": "losses.json",
    "profile": "rest.tar.gz",
}
"""What a stage writes, removed before it runs: an old verdict must not speak for new kernels."""
PACKED = ("profile", "kernels.csv")
"""Folders and files that end up in one archive."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process."""

    name: str
    command: list[str]
    share: float
    """Seconds that it may take, of `LIMIT`."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a stage."""

    name: str
    exit_code: int
    seconds: float
    timed_out: bool
    tail: list[str]

    @property
    def ok(self) -> bool:
        """Whether it ended well."""
        return self.exit_code == 0 and not self.timed_out


def stages(folder: Path, *, dry: bool, limit: float) -> list[Stage]:
    """Return the stages in their order; the shares are of the whole limit."""
    bench = [sys.executable, "-m", "jobs.bench"]
    junit = str(folder / "tests.xml")
    test = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
        "-m",
        "modes",
    ]
    step = ["--fp8", "--contenders", "triton", "IDEFICS", "fp8"]
    profile = ["--networks", "3b", "--layers", "4", "--pixels", "--compiled", "--profile"]
    profile += ["--contenders", "triton", "compiled"]  # building the network takes ten seconds for each
    if dry:
        small = ["--device", "cpu", "--tiny", "--out", str(folder)]
        alone = {"OMP_NUM_THREADS": "1"}
        interpreted = {**alone, "TRITON_INTERPRET": "1"}
        kernels = [
            *bench,
            "kernels",
            *small,
            "--levels",
            "core",
            "--tests",
            junit,
            "--contenders",
            "B3",
            "eager",
        ]
        losses = [*bench, "losses", *small, "--steps", "2"]
        return [
            Stage(
                name="tests",
                command=[*test, *DRY_TESTS],
                share=limit,
                environment={**alone, "KMODE": "interpret"},
            ),
            Stage(name="losses", command=losses, share=limit, environment=interpreted),
            Stage(name="step", command=[*bench, "step", *small], share=limit, environment=interpreted),
            Stage(
                name="profile",
                command=[*bench, "step", *profile, *small[:-1], str(folder / "profile")],
                share=limit,
                environment=interpreted,
            ),
            Stage(name="kernels", command=kernels, share=limit, environment=interpreted),
        ]
    out = ["--device", "cuda", "--out", str(folder)]
    kernels = [*bench, "kernels", *out, "--tests", junit, "--budget-seconds", "{budget}"]
    kernels += ["--levels", "core", "layer"]
    return [
        Stage(name="tests", command=[*test, *_tests()], share=0.27 * limit, environment={"KMODE": "cuda"}),
        Stage(name="losses", command=[*bench, "losses", *out], share=0.1 * limit),
        Stage(name="step", command=[*bench, "step", *step, *out], share=0.17 * limit),
        Stage(
            name="profile",
            command=[*bench, "step", *profile, *out[:-1], str(folder / "profile")],
            share=0.12 * limit,
        ),
        # Last, so that what the others left over is its own.
        Stage(name="kernels", command=kernels, share=limit),
    ]


def _tests() -> list[str]:
    """Return what pytest runs: without megatron-core, nothing that needs the model."""
    chosen = ["tests/kernels"]
    if importlib.util.find_spec("megatron") is None:
        needy = [p for p in (ROOT / "tests/kernels").glob("test_*.py") if "flamingo_dist" in p.read_text()]
        print(f"left out, megatron-core is not installed: {', '.join(path.name for path in needy)}")
        chosen += [f"--ignore={path.relative_to(ROOT)}" for path in needy]
    if importlib.util.find_spec("xdist") is not None:
        chosen += ["-n", "8"]  # most of a test's time is compiling, on the CPU
    return chosen


def run_stage(stage: Stage, seconds: float) -> Outcome:
    """Run a stage for at most `seconds`, showing its output as it comes."""
    print(f"=== {stage.name} (at most {seconds:.0f} s)", flush=True)
    # A shape that is begun at the last moment may compile for a minute.
    command = [part.replace("{budget}", f"{max(seconds - 75, 20):.0f}") for part in stage.command]
    started = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=_hear_interrupts,
    )  # fmt: skip
    timed_out = False
    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    tail: list[str] = []
    assert process.stdout is not None, "it is a pipe"
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail = [*tail[-39:], line.rstrip("\n")]
        process.wait()
    except TimeoutError:
        timed_out = True
        _end(process)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return Outcome(stage.name, process.returncode, time.monotonic() - started, timed_out, tail)


def _hear_interrupts() -> None:
    """Undo what a shell does to the jobs that it puts in the background: they inherit a SIGINT that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _too_late(number: int, frame: object) -> None:
    raise TimeoutError


def _end(process: "subprocess.Popen[str]") -> None:
    """Interrupt a stage and all its processes: pytest then writes what it has, which a kill would lose."""
    for number, patience in ((signal.SIGINT, 12.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.communicate(timeout=patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def pack(folder: Path) -> None:
    """Move what is `PACKED` into rest.tar.gz."""
    found = [folder / name for name in PACKED if (folder / name).exists()]
    if not found:
        return
    with tarfile.open(folder / "rest.tar.gz", "w:gz") as archive:
        for path in found:
            archive.add(path, arcname=path.name)
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def summarise(outcomes: list[Outcome], folder: Path, seconds: float, *, dry: bool) -> dict[str, object]:
    """Return and write the summary: what each stage did, and which files there are."""
    summary: dict[str, object] = {
        "dry": dry,
        "ok": all(outcome.ok for outcome in outcomes),
        "seconds": round(seconds, 1),
        "stages": [
            {
                "name": outcome.name,
                "ok": outcome.ok,
                "exit_code": outcome.exit_code,
                "timed_out": outcome.timed_out,
                "seconds": round(outcome.seconds, 1),
                "tail": outcome.tail,
            }
            for outcome in outcomes
        ],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main(arguments: list[str]) -> int:
    """Run the stages; 0 if all ended well, 1 if one did not, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="tools/gpu_check.py", description="Kernels on this machine's GPU.")
    default = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=default, help="results; default: $OUT, or runs/gpu-check"
    )
    parser.add_argument("--dry", action="store_true", help="the same at tiny sizes, on a CPU")
    parser.add_argument("--seconds", type=float, default=LIMIT, help=f"for everything; default: {LIMIT:.0f}")
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help="some of: tests, losses, step, profile, kernels"
    )
    given = parser.parse_args(arguments)
    chosen = given.only or [stage.name for stage in stages(Path(), dry=given.dry, limit=given.seconds)]
    if not given.dry and not _has_gpu():
        print("gpu-check: torch sees no CUDA device here. --dry runs the same stages at tiny sizes on a CPU.")
        return 2
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (WRITTEN[name] for name in chosen if name in WRITTEN):
        (folder / stale).unlink(missing_ok=True)
    if "kernels" in chosen and "tests" not in chosen and _tested(folder) < _changed():
        parser.error(
            f"--only kernels needs the verdict of the kernels' tests, and {folder / 'tests.xml'} is missing or older "
            "than kernels/. Run --only tests kernels."
        )
    started = time.monotonic()
    outcomes = []
    for stage in stages(folder, dry=given.dry, limit=given.seconds):
        if stage.name not in chosen:
            continue
        left = given.seconds - (time.monotonic() - started)
        outcomes.append(run_stage(stage, min(stage.share, left)))
        if stage.name == "tests" and outcomes[-1].timed_out and (folder / "tests.xml").exists():
            # Half a verdict is none: the benchmark finds no file, and gives no speed.
            (folder / "tests.xml").rename(folder / "tests-cut-off.xml")
    pack(folder)
    summary = summarise(outcomes, folder, time.monotonic() - started, dry=given.dry)
    for outcome in outcomes:
        how = "ok" if outcome.ok else "timed out" if outcome.timed_out else f"FAILED ({outcome.exit_code})"
        print(f"{outcome.name}: {how} in {outcome.seconds:.0f} s")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir())[: MOST_FILES + 1])}")
    return 0 if summary["ok"] else 1


def _tested(folder: Path) -> float:
    """Return when the kernels' tests were run, 0 for never."""
    verdict = folder / "tests.xml"
    return verdict.stat().st_mtime if verdict.exists() else 0.0


def _changed() -> float:
    """Return when the kernels were last changed."""
    return max(path.stat().st_mtime for path in (ROOT / "kernels").rglob("*.py"))


def _has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
