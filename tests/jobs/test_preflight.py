"""What the driver refuses, or warns of, before any process starts."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.tokenizer import TokenizerConfig
from jobs import driver
from jobs.config import RunConfig
from jobs.preflight import check_held_out, random_parts, warn_of_random_parts
from jobs.recipes.large import flamingo_3b
from jobs.recipes.public import llama_7b
from jobs.recipes.smoke import smoke
from jobs.shapes import ShapesConfig, write_shapes


@pytest.fixture
def no_processes(monkeypatch):
    """Fails where a run gets as far as starting Ray."""

    @contextmanager
    def cluster(*_):
        pytest.fail("the run started")
        yield

    monkeypatch.setattr(driver, "ray_cluster", cluster)


def with_tokenizer(**settings: object) -> RunConfig:
    config = smoke()
    return replace(config, data=replace(config.data, tokenizer=TokenizerConfig(**settings)))


def test_a_vocabulary_that_is_not_the_language_models_is_refused(no_processes, tmp_path):
    config = replace(with_tokenizer(vocab_size=259), runs_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match="has 259 entries, the language model 260; set --data.tokenizer.vocab-size 260"
    ):
        driver.run(config)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_not_there_is_refused(no_processes, tmp_path):
    config = replace(with_tokenizer(kind="hf", path=str(tmp_path / "gone")), runs_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no tokenizer.json in .*gone; .*; set --data.tokenizer.path"):
        driver.run(config)


def test_random_frozen_parts_are_warned_of_but_where_they_are_meant(recwarn):
    warn_of_random_parts(smoke())
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match="language model is random: .*; give --model.lm.weights, unless"
    ) as caught:
        warn_of_random_parts(flamingo_3b())
    assert [str(w.message).split(" is random")[0] for w in caught] == [
        "the frozen language model",
        "the frozen vision encoder (nfnet-f6)",
    ]


def test_weights_that_are_named_are_not_random():
    model = llama_7b().model
    assert list(random_parts(llama_7b()).values()) == [
        "--model.lm.weights",
        "--model.vision.name and --model.vision.weights",
    ]
    nfnet = replace(flamingo_3b().model.vision, weights="nfnet.npz")
    given = replace(flamingo_3b().model, lm=replace(flamingo_3b().model.lm, weights="hf://a/b"), vision=nfnet)
    assert random_parts(replace(flamingo_3b(), model=given)) == {}
    whole = replace(llama_7b(), model=replace(model, weights="/exported"))
    assert list(random_parts(whole)) == ["the frozen vision encoder (tiny)"]


def with_captions(folder: Path, **captions: object) -> RunConfig:
    config = smoke()
    held_out = replace(config.data.held_out["held_out"], urls=(str(folder / "held_out"),))
    return replace(
        config,
        data=replace(config.data, held_out={"held_out": held_out}),
        captions=replace(config.captions, **captions),
    )


def test_more_captions_than_samples_are_refused_before_training(tmp_path, no_processes):
    write_shapes(tmp_path / "shapes", ShapesConfig(pairs=8, documents=8, videos=8, held_out=16))
    check_held_out(with_captions(tmp_path / "shapes", count=16))
    with pytest.raises(
        ValueError, match="captions.shots=17 needs 17 samples of data.held_out.held_out .* has 16; lower"
    ):
        check_held_out(with_captions(tmp_path / "shapes", shots=17))
    config = with_captions(tmp_path / "shapes", count=9999)
    with pytest.raises(
        ValueError, match=r"captions.count=9999 needs 10000 samples .*, which has 16; lower --captions.c"
    ):
        driver.run(replace(config, runs_dir=str(tmp_path / "runs")))
    with pytest.raises(FileNotFoundError, match="gone/held_out"):
        check_held_out(with_captions(tmp_path / "gone"))


def test_a_run_that_fails_late_leaves_its_report(tmp_path):
    driver.report_what_is_there(tmp_path)
    assert list(tmp_path.iterdir()) == []
    record = '{"kind": "step", "step": 0, "loss": {"pairs": 1.0}, "seconds": {"step": 1.0}, "gates": {}}'
    (tmp_path / "metrics.jsonl").write_text(record + "\n")
    driver.report_what_is_there(tmp_path)
    assert {"summary.json", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step"}\n')
    with pytest.warns(UserWarning, match="no report of"):
        driver.report_what_is_there(tmp_path)
