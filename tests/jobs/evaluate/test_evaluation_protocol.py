"""What a query is shown, what is left out and said, and what is refused; one process."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from data_pipeline.shards import ShardWriter, npy_bytes
from flamingo_dist.cli import main
from flamingo_dist.inference.prompt import PromptIds
from flamingo_dist.models.flamingo import Flamingo
from jobs.evaluate import command
from jobs.evaluate.examples import read_examples
from jobs.evaluate.prompts import Prompter
from jobs.evaluate.settings import EvaluateArguments
from tests.data_pipeline.corpora import clip_mp4
from tests.jobs.evaluate import tasks
from tests.jobs.evaluate.test_evaluate import arguments, said, shards  # noqa: F401 - a fixture

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("select", ["random", "rices"])
def test_a_query_of_the_support_set_is_no_demonstration_of_its_own(
    shards: dict[str, str],  # noqa: F811 - the fixture
    tmp_path: Path,
    select: Any,
) -> None:
    given = arguments(shards, tmp_path, queries=(shards["support"],), select=select, shots=(0, 7), beams=1)
    outcome = tasks.evaluate(given)
    everyone = {f"e{number:03d}" for number in range(8)}
    for (shots, key), (_, demonstrations) in said(outcome).items():
        assert key not in demonstrations
        assert shots == 0 or set(demonstrations) == everyone - {key}
    with pytest.raises(ValueError, match="a support set of 7 examples beside a query that is one of them"):
        tasks.evaluate(arguments(shards, tmp_path, queries=(shards["support"],), shots=(8,)))


def test_the_image_that_equals_the_querys_comes_last(tmp_path: Path) -> None:
    """Query e005's picture is in the support set as e105, under other words."""
    with ShardWriter(str(tmp_path / "support")) as writer:
        for number in range(100, 112):
            texts = {"json": json.dumps(tasks.record(number)).encode()}
            writer.write(f"e{number}", {"png": tasks.noise(number - 100), **texts})
    given = EvaluateArguments(
        run="tiny",
        task="exact",
        queries=(tasks.write(tmp_path / "queries", range(4, 7)),),
        support=(str(tmp_path / "support"),),
        select="rices",
        shots=(1, 4),
        out=str(tmp_path / "out"),
    )
    for (shots, key), (_, demonstrations) in said(tasks.evaluate(given)).items():
        assert demonstrations[-1] == f"e1{key[2:]}"
        assert len(set(demonstrations)) == shots


def test_each_image_is_encoded_once_for_all_shots(
    shards: dict[str, str],  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    encoded: list[int] = []
    encode = Flamingo.encode_pixels

    def counted(self: Flamingo, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return encode(self, pixels)

    with patch.object(Flamingo, "encode_pixels", counted):
        tasks.evaluate(arguments(shards, tmp_path, queries=(shards["support"],), shots=(0, 2, 4)))
        assert sum(encoded) == 8
        encoded.clear()
        tasks.evaluate(arguments(shards, tmp_path, shots=(0,)))
        assert sum(encoded) == 7, "demonstrations of text alone need no image"


def test_the_prompts_are_the_papers(
    shards: dict[str, str],  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    """By their lengths in bytes: BOS, `<image>`s, `<EOC>`s and the texts."""
    for task, shot, query in (
        ("caption", "Output: a green cat 1", "Output:"),
        ("vqa", "Question: what is 1? Answer: green", "Question: what is 20? Answer:"),
    ):
        given = arguments(shards, tmp_path, task=task, shots=(0, 2), limit=1, beams=1)
        zero, two = tasks.evaluate(given).predictions
        shown = {len(shot) + len(colour) - len("green") for colour in tasks.COLOURS}
        texts = 2 * [*shown]
        assert zero["prompt_tokens"] - len(query) - 2 - 2 in {a + b for a in texts for b in texts}
        assert zero["demonstrations"] == two["demonstrations"]
        assert two["prompt_tokens"] == zero["prompt_tokens"] + 2


def test_a_disk_that_is_too_small_is_refused(
    shards: dict[str, str],  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    with patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=5000)):
        with pytest.raises(ValueError, match="latents of 15 images and videos .* set TMPDIR"):
            tasks.evaluate(arguments(shards, tmp_path))


def test_a_template_names_tokens_and_data_do_not(tmp_path: Path) -> None:
    """An instruct model's turn ends in a token of its own; a caption that spells it, or the sign for it, is text."""
    with ShardWriter(str(tmp_path / "pairs")) as writer:
        for key, text in (("a", "<end>"), ("b", "\ue000x")):
            writer.write(key, {"png": tasks.noise(0), "txt": text.encode()})
    given = EvaluateArguments(
        run="tiny",
        task="caption",
        queries=(f"{tmp_path}/pairs",),
        support=(f"{tmp_path}/pairs",),
        shot_prompt="Say:<end> {caption}<end>",
        query_prompt="Say:<end>",
    )
    examples = read_examples(given)
    tokenizer = tasks.source().tokenizer.load()
    ids = PromptIds(bos=256, image=260, eoc=261, eos=257, further=(262,))
    prompter = Prompter(
        given,
        tokenizer,
        ids,
        tasks.source().model.lm,
        support=examples.support,
        store=None,  # type: ignore[arg-type]
        names={"<end>": 262},
    )
    asked = {query.key: prompter.ask(query, 1).prompts[0].tokens for query in examples.queries}
    say = [*b"Say:", 262]
    assert list(asked["b"]) == [256, 260, *say, *b" <end>", 262, 260, *say]
    assert list(asked["a"]) == [256, 260, *say, *b" x", 262, 260, *say]


def test_media_that_cannot_be_shown_are_counted_and_named(tmp_path: Path, capsys: Any) -> None:
    for name, first in (("support", 0), ("queries", 10)):
        with ShardWriter(str(tmp_path / name)) as writer:
            for number in range(first, first + 6):
                texts = {"json": json.dumps(tasks.record(number)).encode()}
                picture = b"no picture" if number % 5 == 1 else tasks.noise(number)
                writer.write(f"e{number:03d}", {"png": picture, **texts})
    options = [
        "--run",
        "tiny",
        "--task",
        "vqa",
        "--queries",
        f"{tmp_path}/queries",
        "--support",
        f"{tmp_path}/support",
    ]
    with patch.object(command, "open_source", return_value=tasks.source()):
        assert main(["evaluate", *options, "--shots", "0", "4", "--out", f"{tmp_path}/out"]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "2 left out" in shown
    assert "e001: corrupt image" in shown
    assert {entry["key"] for entry in result["left_out"]} == {"e001", "e011"}
    assert [(row["shots"], row["count"]) for row in result["results"]] == [(0, 5), (4, 5)]
    assert result["queries"] == 6
    assert result["settings"]["task"] == "vqa"
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert all({"e001", "e011"}.isdisjoint([line["key"], *line["demonstrations"]]) for line in lines)
    mean = sum(line["score"] for line in lines if line["shots"] == 4) / 5
    assert result["results"][1]["value"] == pytest.approx(100 * mean)
    with pytest.raises(ValueError, match="has 5 readable examples beside the query"):
        tasks.evaluate(
            EvaluateArguments(
                run="tiny",
                task="vqa",
                queries=(f"{tmp_path}/queries",),
                support=(f"{tmp_path}/support",),
                shots=(5, 6),
                out=str(tmp_path / "out"),
            )
        )


def test_videos_and_stored_features(tmp_path: Path) -> None:
    """A clip, and features in place of its frames, through the same path."""
    network = tasks.source()
    features = npy_bytes(np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32))
    with ShardWriter(str(tmp_path / "mixed")) as writer:
        for number, medium in enumerate(
            ({"mp4": clip_mp4(6)}, {"npy": features}, {"png": tasks.noise(2)}, {"npy": features})
        ):
            writer.write(f"e{number:03d}", {**medium, "txt": f"a thing {number}".encode()})
    seen: list[tuple[int, ...]] = []
    forward = Flamingo.forward

    def noted(
        self: Flamingo, tokens: torch.Tensor, index: torch.Tensor, media: Any = None, *rest: Any, **more: Any
    ) -> Any:
        if media is not None:
            seen.append(tuple(media.shape))
        return forward(self, tokens, index, media, *rest, **more)

    given = EvaluateArguments(
        run="tiny",
        task="caption",
        queries=(f"{tmp_path}/mixed",),
        support=(f"{tmp_path}/mixed",),
        shots=(3,),
        out=str(tmp_path),
    )
    width = network.model.vision.num_features
    with patch.object(Flamingo, "forward", noted):
        if width != 4:
            pytest.skip(f"the tiny encoder has {width} positions, the features of this test 4")
        outcome = tasks.evaluate(given, network)
    assert outcome.figures[3][0].count == 4
    assert sorted(shape[:3] for shape in seen) == [(1, 1, 1), (1, 1, 2), (2, 1, 2)]


def test_a_text_that_is_one_of_the_captions_is_one_reference(tmp_path: Path) -> None:
    captions = json.dumps({"captions": ["a cat", "the dog", "the dog"]}).encode()
    with ShardWriter(str(tmp_path / "pairs")) as writer:
        writer.write("a", {"png": tasks.noise(0), "txt": b"the dog", "json": captions})
        writer.write("b", {"png": tasks.noise(1), "txt": b"a bird", "json": captions})
        writer.write("c", {"png": tasks.noise(2), "txt": b"a bird"})
    given = EvaluateArguments(run="tiny", task="caption", queries=(f"{tmp_path}/pairs",))
    assert [query.answers for query in read_examples(given).queries] == [
        ("a cat", "the dog", "the dog"),
        ("a bird", "a cat", "the dog", "the dog"),
        ("a bird",),
    ]


def test_two_classes_have_an_area_and_choices_are_a_querys_own(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "yesno")) as writer:
        for number in range(6):
            fields = {"label": "yes" if number % 2 else "no", "text": f"meme {number}"}
            writer.write(f"e{number}", {"png": tasks.noise(number), "json": json.dumps(fields).encode()})
    with ShardWriter("memory://evaluated/choices", overwrite=True) as writer:
        for number in range(4):
            fields = {"label": number % 3, "choices": [f"cat {number}", "a dog", "no"], "question": "which?"}
            writer.write(f"c{number}", {"png": tasks.noise(number), "json": json.dumps(fields).encode()})
    prompt = 'says "{text}". Is it hateful? Answer:'
    hateful = EvaluateArguments(
        run="tiny",
        task="classify",
        queries=(f"{tmp_path}/yesno",),
        support=(f"{tmp_path}/yesno",),
        shots=(0, 4),
        shot_prompt=prompt + " {label}",
        query_prompt=prompt,
        positive="yes",
        orders=6,
        out=str(tmp_path / "a"),
    )
    outcome = tasks.evaluate(hateful)
    assert [figure.metric for figure in outcome.figures[4]] == ["top-1", "ROC AUC"]
    lines = [line for line in outcome.predictions if line["shots"] == 4]
    yes = [line["scores"]["yes"] - line["scores"]["no"] for line in lines]
    right = [
        a > b
        for a, p in zip(yes, lines, strict=True)
        for b, n in zip(yes, lines, strict=True)
        if int(p["key"][1]) % 2 and not int(n["key"][1]) % 2
    ]
    assert outcome.figures[4][1].value == pytest.approx(100 * sum(right) / len(right))
    multiple = EvaluateArguments(
        run="tiny",
        task="classify",
        queries=("memory://evaluated/choices",),
        shots=(0,),
        out=str(tmp_path / "b"),
        shot_prompt="Question: {question} Answer: {label}",
        query_prompt="Question: {question} Answer:",
    )
    outcome = tasks.evaluate(multiple)
    assert [figure.metric for figure in outcome.figures[0]] == ["top-1"]
    assert set(outcome.predictions[2]["scores"]) == {"cat 2", "a dog", "no"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shots": (9,)}, r"--shots \[9\] with a support set of 8 examples"),
        ({"support": (), "shots": (0,)}, "--text-examples 2 at 0 shots with a support set of 0"),
        ({"support_size": 3, "shots": (4,)}, "a support set of 3 examples"),
        ({"context": 40}, "has a prompt of .* tokens, .* with its answer, and 40 are allowed"),
        ({"shot_prompt": "{nothing}: {caption}", "query_prompt": "{nothing}:"}, "wants the field 'nothing'"),
        ({"task": "classify", "classes": "/no/such/file"}, "/no/such/file"),
        ({"task": "classify", "positive": "red"}, "of one of two classes"),
        ({"out": "", "run": "s3://somewhere/else"}, "say by --out"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    shards: dict[str, str],  # noqa: F811 - the fixture
    tmp_path: Path,
    changes: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        tasks.evaluate(arguments(shards, tmp_path, **changes))


@pytest.mark.parametrize(
    ("members", "task", "says"),
    [
        ({"json": b'{"question": "what?"}'}, "vqa", "query a of .*: missing field, no answers among"),
        ({"json": b'{"answers": ["cat"]}'}, "vqa", "no question among"),
        ({"json": b'{"captions": []}'}, "caption", "empty caption"),
        ({"json": b"{"}, "exact", "bad document"),
        ({"json": b'{"label": "x", "choices": ["a", "b"]}'}, "classify", "is none of the choices"),
        ({"json": b'{"name": "x"}'}, "classify", "no label among"),
        ({}, "caption", "neither .json nor .txt"),
    ],
)
def test_data_that_lack_what_the_task_needs_are_named(
    tmp_path: Path, members: dict[str, bytes], task: Any, says: str
) -> None:
    with ShardWriter(str(tmp_path / "data")) as writer:
        writer.write("a", {"png": tasks.noise(0), **members})
    given = EvaluateArguments(
        run="tiny", task=task, queries=(f"{tmp_path}/data",), shots=(0,), out=str(tmp_path)
    )
    with pytest.raises(ValueError, match=says):
        tasks.evaluate(given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shots": ()}, "--shots"),
        ({"shots": (4, 4)}, "--shots"),
        ({"beams": 0}, "--beams 0: give 1 or more"),
        ({"orders": 6}, "only --task classify has these"),
        ({"shot_prompt": "x {caption}"}, "give both"),
        ({"shot_prompt": "x {caption}", "query_prompt": "y"}, "must be the beginning of the first"),
        ({"shot_prompt": "x {caption}", "query_prompt": "x "}, "without a space at its end"),
        ({"shot_prompt": "x {answer}", "query_prompt": "x"}, "the first alone holds {caption}"),
        ({"shot_prompt": "{caption}!", "query_prompt": "{caption}"}, "the first alone holds {caption}"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EvaluateArguments(**{"run": "r", "task": "caption", "queries": ("q",), **changes})


def test_a_key_that_comes_twice_is_refused(
    shards: dict[str, str],  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="7 keys come more than once, among them 'e020'"):
        tasks.evaluate(arguments(shards, tmp_path, queries=(shards["queries"],) * 2))
