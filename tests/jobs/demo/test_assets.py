"""The real parts, where the cache holds them already: nothing is fetched here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.index import open_index
from data_pipeline.media import decode_image
from flamingo_dist.models.vision import build_vision
from jobs.demo import sources
from jobs.demo.corpora import REPORT, Corpora, CorporaConfig, build_corpora, corpora_version
from jobs.demo.fetch import Parts, find_parts
from jobs.demo.prepare import demo_encoder
from jobs.demo.stamps import _caption
from jobs.encode import media_config
from tests.flamingo_dist.models.vision.test_vision import published_features

pytestmark = pytest.mark.assets

STAMPS = {
    "animals/birds/ostrich": 9,
    "animals/insects/fly": 308,
    "animals/mammals/apes/gorilla": 366,
    "animals/mammals/camel/camel": 354,
    "animals/mammals/cats/tiger": 292,
    "animals/mammals/equines/zebra": 340,
    "animals/mammals/hippopotamus": 344,
    "animals/mammals/rodents/beaver": 337,
    "food/fruit/banana": 954,
    "food/fruit/pineapple": 953,
    "food/fruit/strawberry": 949,
    "hobbies/music/string/violin": 889,
    "household/dishes/teapot": 849,
    "sports/soccer": 805,
}
"""Stamps and the numbers of their ImageNet classes."""


@pytest.fixture(scope="module")
def parts() -> Parts:
    parts = find_parts()
    if parts.missing:
        pytest.skip(f"the cache lacks {', '.join(parts.missing)}")
    return parts


def stamp_pixels(parts: Parts) -> torch.Tensor:
    folder = parts.path(sources.STAMPS, "**/stamps")
    media = media_config(demo_encoder(parts))
    blobs = [(folder / f"{name}.png").read_bytes() for name in STAMPS]
    return torch.from_numpy(np.stack([decode_image(blob, media) for blob in blobs]))


def test_the_encoder_recognises_stamps(parts: Parts) -> None:
    state = torch.load(parts.vision_encoder, weights_only=True)
    classes = torch.tensor(list(STAMPS.values()))
    for dtype in ("float32", "bfloat16"):
        features_NSC = build_vision(demo_encoder(parts, dtype=dtype))(stamp_pixels(parts)).float()
        logits = features_NSC.mean(1) @ state["_fc.weight"].T + state["_fc.bias"]
        assert (logits.argmax(1) == classes).float().mean() > 0.85, dtype


def test_the_encoder_equals_the_published_layers(parts: Parts) -> None:
    pixels = stamp_pixels(parts)[:2]
    features_NSC = build_vision(demo_encoder(parts))(pixels)
    state = torch.load(parts.vision_encoder, weights_only=True)
    expected = published_features(state, pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features_NSC.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def built(parts: Parts) -> Corpora:
    folder = parts.cache / "corpora" / corpora_version(parts, CorporaConfig())
    if not (folder / REPORT).exists():
        pytest.skip("the corpora are not built yet")
    return build_corpora(parts)


def test_corpora_are_as_large_as_the_documentation_says(built: Corpora) -> None:
    """Debian's parts may move a little; the others are pinned."""
    about = {"pairs": 1836, "documents": 409, "videos": 423, "pairs_unseen_style": 767}
    for name, samples in about.items():
        assert abs(built.datasets[name].samples - samples) < 0.05 * samples, name
        assert open_index([built.url(name)]).num_samples == built.datasets[name].samples


def test_documents_alternate_text_and_pictures(built: Corpora) -> None:
    index = open_index([built.url("documents")])
    blob = Path(index.entries[0].url).read_bytes()
    for record in index.records(0):
        member = record.members["json"]
        items = json.loads(blob[member.offset : member.offset + member.size])["items"]
        images = [item["image"] for item in items if "image" in item]
        assert images == [name for name in record.members if name != "json"]
        text = " ".join(item["text"] for item in items if "text" in item)
        assert len(text) > 40
        assert "Report a bug" not in text, "the footer is no text of the page"


def test_stamp_captions_are_the_english_line(parts: Parts) -> None:
    folder = parts.path(sources.STAMPS, "**/stamps")
    assert _caption(folder / "animals/birds/heron_greatblue.txt") == "A great blue heron."
