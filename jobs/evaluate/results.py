"""What an evaluation comes to: figures, a table, and files that say how they were made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from data_pipeline.batch import Skip
from data_pipeline.files import write_whole
from flamingo_dist.evaluation.answers import exact_match, vqa_accuracy
from flamingo_dist.evaluation.caption_tokens import caption_tokens
from flamingo_dist.evaluation.cider import cider_scores
from flamingo_dist.evaluation.figures import Figure, mean_figure, roc_auc_figure
from jobs.evaluate.examples import Example
from jobs.evaluate.settings import EvaluateArguments

RESULT = "result.json"
PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An evaluation that has ended."""

    figures: Mapping[int, Sequence[Figure]]
    """Figures by the number of shots."""
    predictions: Sequence[Mapping[str, Any]]
    """One a query and number of shots, in the order of the shots and of the queries' keys."""
    left_out: Sequence[Skip]
    """Examples whose media cannot be shown, and damaged shards."""
    support: int
    """Size of the support set, whole."""
    folder: Path
    """Where the files are."""

    def table(self) -> Table:
        """Return shots and figures as a table for the console."""
        table = Table("shots", "metric", "value", "95% interval", "queries")
        for shots, figures in self.figures.items():
            for figure in figures:
                interval = f"{figure.low:.2f} - {figure.high:.2f}"
                table.add_row(str(shots), figure.metric, f"{figure.value:.2f}", interval, str(figure.count))
        return table


def score(
    arguments: EvaluateArguments,
    queries: Mapping[str, Example],
    names: Sequence[str],
    predictions: Sequence[dict[str, Any]],
) -> list[Figure]:
    """Score the predictions of one number of shots, and write each one's own score into it.

    Args:
        arguments: the evaluation's.
        queries: by key.
        names: classes that the queries share.
        predictions: lines of `answering`, one a query.

    Raises:
        ValueError: no predictions.
    """
    asked = [queries[line["key"]] for line in predictions]
    texts = [line["answer"] for line in predictions]
    if arguments.task == "caption":
        references = [[caption_tokens(answer) for answer in query.answers] for query in asked]
        metric, scores = "CIDEr", cider_scores([caption_tokens(text) for text in texts], references)
    elif arguments.task == "vqa":
        metric = "VQA accuracy"
        scores = [vqa_accuracy(text, query.answers) for text, query in zip(texts, asked, strict=True)]
    elif arguments.task == "exact":
        metric = "exact match"
        scores = [exact_match(text, query.answers) for text, query in zip(texts, asked, strict=True)]
    else:
        metric = "top-1"
        scores = [
            float(_is_first(line["scores"], query.answers[0]))
            for line, query in zip(predictions, asked, strict=True)
        ]
    for line, own in zip(predictions, scores, strict=True):
        line["score"] = own
    figures = [mean_figure(metric, scores, seed=arguments.seed)]
    if len(names) == 2 and len({query.answers[0] for query in asked}) == 2:
        positive = arguments.positive or names[1]
        other = names[0] if positive == names[1] else names[1]
        margins = [line["scores"][positive] - line["scores"][other] for line in predictions]
        truth = [query.answers[0] == positive for query in asked]
        figures.append(roc_auc_figure("ROC AUC", margins, truth, seed=arguments.seed))
    return figures


def _is_first(scores: Mapping[str, float], right: str) -> bool:
    """Whether the right name has the highest score; a tie or NaN does not count: a blind network must not look good."""
    return all(scores[name] < scores[right] for name in scores if name != right)


def write_outcome(
    outcome: Outcome,
    arguments: EvaluateArguments,
    *,
    commit: str | None,
    checkpoint: str | None,
    queries: int,
) -> None:
    """Write the predictions and, last, the result that makes them whole.

    Args:
        outcome: what is written.
        arguments: the evaluation's.
        commit: of the code.
        checkpoint: that was evaluated; None for a network folder.
        queries: that were asked for, the left out ones included.
    """
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in outcome.predictions)
    write_whole(outcome.folder / PREDICTIONS, "".join(lines).encode())
    result = {
        "commit": commit,
        "checkpoint": checkpoint,
        "settings": asdict(arguments),
        "support": outcome.support,
        "queries": queries,
        "results": [
            {"shots": shots, **asdict(figure)}
            for shots, figures in outcome.figures.items()
            for figure in figures
        ],
        "left_out": [
            {"key": s.key, "shard": s.shard, "cause": s.cause, "detail": s.detail} for s in outcome.left_out
        ],
        "predictions": PREDICTIONS,
    }
    write_whole(outcome.folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False).encode())
