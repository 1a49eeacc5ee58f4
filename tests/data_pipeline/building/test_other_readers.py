"""What `flamingo data build` writes, read by the loaders that others use; what others write, read by ours.

Each is skipped where its package is not installed: `pip install datasets megatron-energon`.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.building.building_material import build, read_corpus, write_tree
from tests.data_pipeline.building.test_building_captioned import img2dataset_tar

Samples = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs built from img2dataset's output, in three shards."""
    folder = tmp_path_factory.mktemp("pairs")
    build(img2dataset_tar(folder / "in", 11), folder / "out", input="pairs")
    return folder / "out"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interleaved documents built from a folder of pages, in two shards."""
    folder = tmp_path_factory.mktemp("documents")
    build(write_tree(folder / "in"), folder / "out")
    return folder / "out"


def tars(folder: Path) -> list[str]:
    found = sorted(str(path) for path in folder.glob("*.tar"))
    assert len(found) > 1
    return found


def pixels(blob: bytes) -> np.ndarray:
    """Decode: uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))


@pytest.mark.parametrize("kind", ["pairs", "documents"])
def test_plain_webdataset(kind: str, request: pytest.FixtureRequest) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder: Path = request.getfixturevalue(kind)
    found: Samples = {}
    for sample in webdataset.WebDataset(tars(folder), shardshuffle=False):
        found[sample["__key__"]] = {name: blob for name, blob in sample.items() if name[:2] != "__"}
    assert found == read_corpus(folder)


def test_webdataset_decodes_pairs(pairs: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    ours = list(read_corpus(pairs).values())
    decoded = webdataset.WebDataset(tars(pairs), shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt")
    for (image, caption), members in zip(decoded, ours, strict=True):
        np.testing.assert_array_equal(image, pixels(members["jpg"]))
        assert caption == members["txt"].decode()


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "webdataset",
        data_files={"train": tars(pairs)},
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    ours = read_corpus(pairs)
    seen = []
    for row in rows:
        members = ours[row["__key__"]]
        np.testing.assert_array_equal(np.asarray(row["jpg"].convert("RGB")), pixels(members["jpg"]))
        assert row["txt"] == members["txt"].decode()
        assert row["json"] == json.loads(members["json"])
        seen.append(row["__key__"])
    assert seen == list(ours)


def energon_dataset(corpus: Path, folder: Path, description: str) -> Any:
    """A corpus as Energon wants it: its own index beside the tars, made by its own tool, and a description."""
    energon = pytest.importorskip("megatron.energon")
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder.mkdir()
    for tar in tars(corpus):
        (folder / Path(tar).name).symlink_to(tar)
    names = [Path(tar).name for tar in tars(corpus)]
    BaseWebdatasetFactory.prepare_dataset(EPath(folder), names, split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text(description)

    @energon.stateless
    def as_it_is(sample: Any) -> Any:
        return sample

    class Plain(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(as_it_is),)

        @energon.stateless
        def encode_sample(self, sample: Any) -> Any:
            return sample

        def batch(self, samples: list[Any]) -> Any:
            return samples

    dataset = energon.get_val_dataset(
        str(folder),
        split_part="train",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        task_encoder=Plain(),
    )
    return energon.get_loader(dataset)


def test_energon_reads_pairs(pairs: Path, tmp_path: Path) -> None:
    description = (
        "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
        "field_map:\n  image: jpg\n  caption: txt\ndecoder: null\n"
    )
    found = {}
    for batch in energon_dataset(pairs, tmp_path / "energon", description):
        for sample in batch:
            found[sample.__key__.rpartition(".tar/")[2]] = (sample.image, sample.caption)
    ours = read_corpus(pairs)
    captions = {key: members["txt"] for key, members in ours.items()}
    images = {key: members["jpg"] for key, members in ours.items()}
    assert {key: c.encode() if isinstance(c, str) else c for key, (_, c) in found.items()} == captions
    assert {key: image for key, (image, _) in found.items()} == images


def test_energon_reads_documents(documents: Path, tmp_path: Path) -> None:
    description = "__module__: megatron.energon\n__class__: CrudeWebdataset\ndecoder: null\n"
    found: Samples = {}
    for batch in energon_dataset(documents, tmp_path / "energon", description):
        for sample in batch:
            found[sample["__key__"].rpartition(".tar/")[2]] = {
                name: bytes(blob) for name, blob in sample.items() if name[:2] != "__"
            }
    assert found == read_corpus(documents)


def test_ours_streams_what_img2dataset_wrote(tmp_path: Path) -> None:
    """Without a build, and without an index: its log files beside the tars are passed over."""
    folder = img2dataset_tar(tmp_path / "in", 6)
    config = DatasetConfig(
        name="p", kind="pair", urls=(str(folder),), batch_size=6, seq_len=32, image_size=32, mode="eval"
    )
    tokenizer = TokenizerConfig().load()
    batch = DatasetStream(config, tokenizer, 0).batch(0)
    assert batch.skips == ()
    assert batch.keys == tuple(f"{number:09d}" for number in range(6))
    assert batch.media_mask_BM.all()
    texts = [tokenizer.decode(row) for row in batch.tokens_BT.tolist()]
    assert texts == [f"picture {number}" for number in range(6)]
