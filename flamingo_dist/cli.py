"""The command line: `flamingo train`, `demo`, `generate`, `evaluate`, `data`, `bench`, `plan`, ..."""

import sys
from collections.abc import Callable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage.

    A stop request (SIGTERM, Ctrl-C) that was saved ends with 0.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = _commands()
    if not given or given[0] in ("-h", "--help"):
        _usage(commands)
        return 0 if given else 2
    if given[0] not in commands:
        print(
            f"flamingo: unknown command {given[0]!r}; choose one of {', '.join(commands)}.", file=sys.stderr
        )
        return 2
    try:
        return commands[given[0]][0](given[1:])
    except Exception as error:
        from jobs.errors import is_for_users

        if not is_for_users(error):
            raise
        print(f"flamingo {given[0]}: {error}", file=sys.stderr)
        return 1


_Commands = dict[str, tuple[Callable[[list[str]], int], str]]


def _commands() -> _Commands:
    # Each command imports its own room: `flamingo --help` should not wait for torch.
    return {**_commands_on_networks(), **_other_commands()}


def _commands_on_networks() -> _Commands:
    def train(arguments: list[str]) -> int:
        from jobs.commands import train

        return train(arguments)

    def demo(arguments: list[str]) -> int:
        from jobs.commands import demo

        return demo(arguments)

    def generate(arguments: list[str]) -> int:
        from jobs.commands import generate

        return generate(arguments)

    def evaluate(arguments: list[str]) -> int:
        from jobs.evaluate.command import command

        return command(arguments)

    def export(arguments: list[str]) -> int:
        from jobs.exchange import export_command

        return export_command(arguments)

    def import_(arguments: list[str]) -> int:
        from jobs.exchange import import_command

        return import_command(arguments)

    return {
        "train": (
            train,
            "train a recipe: flamingo train RECIPE [--print-config] [--resume latest] [overrides]",
        ),
        "demo": (demo, "fetch real data, train on it and write a report"),
        "generate": (generate, "caption images from a few-shot prompt with a trained run"),
        "evaluate": (evaluate, "score few-shot captions, answers or classes of a trained run"),
        "export": (
            export,
            "write a trained network as safetensors: flamingo export RUN FOLDER [--to idefics]",
        ),
        "import": (import_, "read an IDEFICS or OpenFlamingo checkpoint: flamingo import SOURCE FOLDER"),
    }


def _other_commands() -> _Commands:
    def data(arguments: list[str]) -> int:
        from jobs.data_commands import data

        return data(arguments)

    def bench(arguments: list[str]) -> int:
        from jobs.bench.command import main as bench  # not by jobs.commands: it needs torch alone

        return bench(arguments)

    def plan(arguments: list[str]) -> int:
        from jobs.plan import plan

        return plan(arguments)

    def dryrun(arguments: list[str]) -> int:
        from jobs.dryrun import dryrun

        return dryrun(arguments)

    def doctor(arguments: list[str]) -> int:
        from jobs.doctor.command import doctor

        return doctor(arguments)

    def recipes(arguments: list[str]) -> int:
        from jobs.commands import recipes

        return recipes(arguments)

    return {
        "data": (data, "build, look at and sum up corpora: flamingo data build|inspect|info|bench"),
        "bench": (bench, "time the kernels against baselines; without a GPU, print the roofline"),
        "plan": (plan, "predict memory, time and layouts: flamingo plan RECIPE --gpus 256 --gpu h100"),
        "dryrun": (
            dryrun,
            "build and step one rank with fake tensors: flamingo dryrun RECIPE --world 256 --tp 8",
        ),
        "doctor": (
            doctor,
            "check a machine or an allocation before a run: flamingo doctor RECIPE [overrides]",
        ),
        "recipes": (recipes, "list the recipes"),
    }


def _usage(commands: dict[str, tuple[Callable[[list[str]], int], str]]) -> None:
    print("usage: flamingo COMMAND [arguments]; flamingo COMMAND --help says more\n")
    for name, (_, says) in commands.items():
        print(f"  {name:10} {says}")


if __name__ == "__main__":
    sys.exit(main())
