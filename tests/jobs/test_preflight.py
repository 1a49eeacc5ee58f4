"""What the driver refuses, or warns of, before any process starts."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from data_pipeline.tokenizer import TokenizerConfig
from jobs import driver
from jobs.config import RunConfig
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
