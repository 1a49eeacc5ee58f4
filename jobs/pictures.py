"""Pictures of samples for people: drawn from the original shards where a run streams features."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from data_pipeline.errors import BadSampleError
from data_pipeline.index import ShardIndex, open_index
from data_pipeline.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaConfig, decode_image, decode_video
from data_pipeline.reading import SampleReader
from data_pipeline.shards import SampleRecord

SIZE = 192
"""Height and width of a picture in pixels."""


class PictureBook:
    """Finds the first medium of a sample by its key and saves it as a PNG."""

    def __init__(self, urls: Mapping[str, Sequence[str]]) -> None:
        """Look in the shards `urls` by data set; they are opened when first asked for."""
        self._urls = {name: tuple(shards) for name, shards in urls.items()}
        self._records: dict[str, dict[str, tuple[str, SampleRecord]]] = {}

    def save(self, dataset: str, key: str, run_dir: Path) -> str | None:
        """Save the picture of a sample.

        Args:
            dataset: name of the data set.
            key: sample key.
            run_dir: run folder; the picture goes to its `samples` folder.

        Returns:
            The path inside the run folder, or None where there is no picture to show.
        """
        found = self._find(dataset, key)
        pixels = None if found is None else _decode(*found)
        if pixels is None:
            return None
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{dataset}-{key}") + ".png"
        (run_dir / "samples").mkdir(exist_ok=True)
        (run_dir / "samples" / name).write_bytes(pixels)
        return f"samples/{name}"

    def _find(self, dataset: str, key: str) -> tuple[str, SampleRecord] | None:
        if dataset not in self._urls:
            return None
        if dataset not in self._records:
            self._records[dataset] = _all_records(open_index(self._urls[dataset]))
        return self._records[dataset].get(key)


def _all_records(index: ShardIndex) -> dict[str, tuple[str, SampleRecord]]:
    return {
        record.key: (entry.url, record)
        for number, entry in enumerate(index.entries)
        for record in index.records(number)
    }


def _decode(url: str, record: SampleRecord) -> bytes | None:
    """Return the sample's first medium (a video's first frame) as PNG bytes."""
    media = sorted(
        m for m in record.members if m.rpartition(".")[2] in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
    )
    if not media:
        return None
    config = MediaConfig(image_size=SIZE, pad_colour=(255, 255, 255), video_fps=None)
    extension = media[0].rpartition(".")[2]
    try:
        blob = SampleReader(url, record, max_bytes=config.max_bytes).get(media[0])
        if extension in IMAGE_EXTENSIONS:
            pixels_3HW = decode_image(blob, config)
        else:
            pixels_3HW = decode_video(blob, extension, 1, config)[0]
    except BadSampleError:
        return None
    picture = io.BytesIO()
    Image.fromarray(pixels_3HW.transpose(1, 2, 0)).save(picture, "PNG")
    return picture.getvalue()
