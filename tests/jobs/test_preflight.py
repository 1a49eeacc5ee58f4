"""What the driver refuses, or warns of, before any process starts."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from data_pipeline.tokenizer import TokenizerConfig
from jobs import driver
from jobs.config import RunConfig
from jobs.preflight import random_parts, warn_of_random_parts
from jobs.recipes.large import flamingo_3b
from jobs.recipes.public import llama_7b
from jobs.recipes.smoke import smoke


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
