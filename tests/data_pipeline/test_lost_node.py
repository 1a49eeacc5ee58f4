"""A node of a Ray cluster killed while a batch lies in its object store; needs a Ray of its own."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from data_pipeline.dataset import DatasetStream
from tests.data_pipeline.corpora import pairs_config, write_pairs
from tests.data_pipeline.test_chaos import BYTES, RANKS, SETTINGS, readers

pytestmark = pytest.mark.distributed


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray to which a test can add nodes on this machine, and kill them."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="fr", dir="/tmp")
    # Whatever temp_dir says, Cluster writes its address into the default folder, which exists where Ray has run before.
    monkeypatch.setenv("RAY_TMPDIR", folder)
    Path(folder, "ray").mkdir()
    quick = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500}
    made = Cluster()
    made.add_node(
        num_cpus=1,
        temp_dir=folder,
        _system_config=quick,
        include_dashboard=False,
        object_store_memory=128 << 20,
    )
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_batches_that_went_with_their_node_are_made_again(cluster: Any, tmp_path: Path) -> None:
    write_pairs(tmp_path / "corpus", 160, per_shard=40)
    # Large enough for the object store of the reader's node; small ones travel with the answer.
    config = pairs_config(tmp_path / "corpus", batch_size=16, image_size=160)
    straight = DatasetStream(config, BYTES, 3)
    with readers(config, replace(SETTINGS, timeout_s=60)) as pipeline:
        here = ray.get_runtime_context().get_node_id()  # holds two of three readers, and all else
        other = cluster.add_node(num_cpus=1, object_store_memory=128 << 20)
        pipeline.feed(0).next(0)
        # The third reader starts with its node, which takes long on a busy machine; the two others would make every
        # batch meanwhile.
        ray.get([reader.open.remote(pipeline._sources.loaded) for reader in pipeline.readers], timeout=60)
        for step in range(200):
            (box,) = ray.get(pipeline.coordinators[0].next.remote(step, 0)).values()
            ray.wait(box, fetch_local=False)
            places = ray.experimental.get_object_locations(box)[box[0]]["node_ids"]
            if here not in places:
                break
        else:
            raise AssertionError("the third reader made no batch")
        cluster.remove_node(other, allow_graceful=False)
        batch = pipeline.feed(0).next(step)["pairs"]
        assert batch.keys == straight.batch(step, 0, RANKS).keys
        (again,) = ray.get(pipeline.coordinators[0].next.remote(step, 0)).values()
        assert again != box, "another object"
        assert pipeline.feed(0).next(step + 1)["pairs"].keys == straight.batch(step + 1, 0, RANKS).keys
        assert pipeline.feed(0).summary()["pairs"]["bad"] == 0
