"""Tux Paint's stamps as pairs: small photographs and drawings with an English sentence each."""

from collections.abc import Iterable
from pathlib import Path

from jobs.demo.samples import RawSample, Split, mentions, share, words

EXCLUDED = ("symbols",)
"""Folders of letters, digits and signs, whose captions describe no picture."""


def add_stamps(
    folder: Path, fraction: float, heldout_labels: Iterable[str], *, train: Split, heldout: Split
) -> None:
    """Share out the stamps over training and held-out pairs.

    Several stamps may carry one caption ("A flower."): the split goes by caption, so that none stands on both
    sides. A stamp that shows a held-out emoji concept is kept out of training too.

    Args:
        folder: the folder `stamps` of the package.
        fraction: which part of the captions is held out.
        heldout_labels: names of the held-out emoji concepts.
        train: receives the training pairs.
        heldout: receives the held-out pairs.
    """
    labels = list(heldout_labels)
    for text in sorted(folder.rglob("*.txt")):
        if text.relative_to(folder).parts[0] in EXCLUDED:
            train.dropped["symbol, letter or number"] += 1
            continue
        image = text.with_suffix(".png")
        if not image.exists():
            train.dropped["drawn as SVG, for which there is no rasteriser"] += 1
            continue
        caption = _caption(text)
        if not caption:
            train.dropped["no caption"] += 1
            continue
        if share("stamp", " ".join(words(caption))) < fraction:
            target = heldout
        elif any(mentions(caption, label) for label in labels):
            train.dropped["shows a held-out concept"] += 1
            continue
        else:
            target = train
        key = "stamp/" + str(text.relative_to(folder).with_suffix("")).replace(".", "_")
        members = {"png": image.read_bytes(), "txt": caption.encode()}
        target.samples.append(RawSample(key=key, members=members))


def _caption(path: Path) -> str:
    """Return the first line, which is English; the translations follow as `xx.utf8=...`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    first = " ".join(lines[0].split()) if lines else ""
    return "" if ".utf8=" in first else first
