"""The commands of `flamingo data`: build, inspect, info, bench."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import tyro


def data(arguments: Sequence[str]) -> int:
    """Work with corpora: `flamingo data build|inspect|info|bench [options]`."""
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "build": (_build, "make a corpus of web pages, archives, published records, pairs or clips"),
        "inspect": (_inspect, "show samples as a page: images, tokens, what each token sees, loss mask"),
        "info": (_info, "sum up a corpus: samples, sizes, histograms, broken samples"),
        "bench": (_bench, "measure reading, seeking and resuming against other loaders on the same shards"),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: flamingo data COMMAND [options]; flamingo data COMMAND --help says more\n")
        for name, (_, says) in commands.items():
            print(f"  {name:10} {says}")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        print(
            f"flamingo data: unknown command {arguments[0]!r}; choose one of {', '.join(commands)}.",
            file=sys.stderr,
        )
        return 2
    return commands[arguments[0]][0](list(arguments[1:]))


def _build(arguments: list[str]) -> int:
    from jobs.build import BuildArguments, build

    build(tyro.cli(BuildArguments, args=arguments, prog="flamingo data build"))
    return 0


def _inspect(arguments: list[str]) -> int:
    from jobs.look import InspectArguments, inspect

    path = inspect(tyro.cli(InspectArguments, args=arguments, prog="flamingo data inspect"))
    print(f"wrote {path}")
    return 0


def _info(arguments: list[str]) -> int:
    from jobs.look import InfoArguments, info

    info(tyro.cli(InfoArguments, args=arguments, prog="flamingo data info"))
    return 0


def _bench(arguments: list[str]) -> int:
    from jobs.bench_data.command import BenchConfig, bench

    bench(tyro.cli(BenchConfig, args=arguments, prog="flamingo data bench"))
    return 0
