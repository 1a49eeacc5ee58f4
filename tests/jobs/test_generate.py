"""`flamingo generate`: where its tensors are."""

from unittest.mock import patch

import pytest
import torch
from PIL import Image

from flamingo_dist.training import build
from jobs import generate, inference_source
from tests.jobs.exchange.test_export import run  # noqa: F401 - a fixture

pytestmark = pytest.mark.distributed


def test_images_go_where_the_network_is(run, tmp_path):  # noqa: F811 - the fixture
    """A device that is not the CPU, as on a machine with a GPU."""
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "query.png")
    elsewhere = torch.device("meta")
    with (
        patch.object(build, "world_device", lambda: elsewhere),
        patch.object(generate, "world_device", lambda: elsewhere),
        patch.object(inference_source, "load_trainable"),
        patch.object(generate, "generate", return_value=[[1]]) as called,
    ):
        arguments = generate.GenerateArguments(run=str(run[0]), image=(str(tmp_path / "query.png"),))
        generate.generate_captions(arguments)
    model, _, _, media, mask, _ = called.call_args.args
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert media.device == mask.device == elsewhere
