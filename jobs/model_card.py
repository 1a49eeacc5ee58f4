"""The model card of an exported or imported network: what it is, what it was trained on, how to load it."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from flamingo_dist.models.flamingo import FlamingoConfig
from jobs.config import RunConfig

_LOAD = """## Use

```
flamingo train RECIPE --model.weights THIS_FOLDER     # go on training, in any layout
flamingo export THIS_FOLDER OTHER --to idefics        # for transformers, where its options allow it
```

In Python: `flamingo_dist.models.exchange.folder.read_network_config(folder)`, then
`flamingo_dist.training.build.build_model`; every tensor-parallel rank reads its slices alone.
"""
_METRICS = {
    "last_step": "last step",
    "final_loss_mean": "training loss, mean of the last steps (nats a token)",
    "held_out_loss": "held-out loss (nats a token)",
    "grounding_gap_nats": "grounding gap (nats a token)",
    "candidates": "candidate ranking",
}


def card_of_run(
    run_dir: Path,
    run: RunConfig,
    manifest: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    trainable: Collection[str],
) -> str:
    """Return the card of a trained run's network.

    Args:
        run_dir: the run folder.
        run: its configuration.
        manifest: the checkpoint's.
        shapes: of all parameters.
        trainable: names of the trainable ones.
    """
    environment, summary = _json(run_dir / "environment.json"), _json(run_dir / "summary.json")
    versions = environment.get("versions") or {}
    facts = [
        ("recipe", run.recipe),
        ("steps", manifest["step"]),
        ("commit", environment.get("commit") or "not recorded"),
        ("versions", ", ".join(f"{name} {v}" for name, v in versions.items()) or "not recorded"),
        ("machine", environment.get("machine") or "not recorded"),
        ("layout of the checkpoint", json.dumps(manifest["layout"])),
        ("seed", run.train.seed),
        ("optimizer", json.dumps(run.to_json()["train"]["optimizer"])),
    ]
    data = [(name, d.kind, ", ".join(d.urls), d.batch_size, d.weight) for name, d in run.data.train.items()]
    parts = [
        _head(run.name),
        f"Trained by flamingo-dist from the recipe `{run.recipe}`.",
        "## Network\n\n" + _table(("", ""), _network(run.model, shapes, trainable)),
        "## Training\n\n" + _table(("", ""), facts),
        "## Data\n\n" + _table(("data set", "kind", "shards", "global batch", "lambda"), data),
    ]
    metrics = [
        (says, json.dumps(summary[key])) for key, says in _METRICS.items() if summary.get(key) is not None
    ]
    parts.append("## Metrics\n\n" + (_table(("", ""), metrics) if metrics else "None were recorded.\n"))
    return "\n\n".join([*parts, _LOAD])


def card_of_import(source: str, kind: str, config: FlamingoConfig, shapes: Mapping[str, torch.Size]) -> str:
    """Return the card of a network that was read from a public checkpoint.

    Args:
        source: where it was.
        kind: whose layout it had.
        config: the network.
        shapes: of all parameters.
    """
    name = Path(source).stem
    return "\n\n".join(
        [
            _head(name),
            f"Converted by `flamingo import` from the {kind} checkpoint `{name}`, whose licence and card apply.",
            "## Network\n\n" + _table(("", ""), _network(config, shapes, None)),
            _LOAD,
        ]
    )


def _network(
    config: FlamingoConfig, shapes: Mapping[str, torch.Size], trainable: Collection[str] | None
) -> list[tuple[str, Any]]:
    lm, resampler, gated = config.lm, config.resampler, config.gated
    count = sum(shape.numel() for shape in shapes.values())
    rows = [
        (
            "language model",
            f"{lm.num_layers} blocks of width {lm.width}, {lm.num_heads} heads, vocabulary {lm.vocab_size}",
        ),
        (
            "resampler",
            f"{resampler.depth} layers of width {resampler.width}, {resampler.latents} latents, {resampler.activation}",
        ),
        (
            "gated blocks",
            f"before blocks {config.gated_positions()}, {gated.activation}, {gated.norm} norm, {gated.gate} gate",
        ),
        ("vision encoder", config.vision.name),
        ("parameters, encoder left out", f"{count:,}"),
    ]
    if trainable is not None:
        rows.append(("of these trained", f"{sum(shapes[name].numel() for name in trainable):,}"))
    return rows


def _head(name: str) -> str:
    return f"---\nlibrary_name: flamingo-dist\npipeline_tag: image-text-to-text\n---\n\n# {name}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
