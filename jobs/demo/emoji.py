"""Emoji in several drawing styles, still and animated, as pairs and clips named by code point."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from jobs.demo.samples import RawSample, Split, share

PAIR_GROUPS = (3, 4, 5, 6, 7)
"""emojibase groups of pictured things: nature, food, travel, activities, objects."""
FLAG_GROUP = 9
EXTRA_TAGS = 3
"""How many tags the longer caption of an emoji carries."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji: what it shows, whatever the style it is drawn in."""

    code: str
    """Code points in lower-case hex, joined by "-", without variation selectors."""
    label: str
    """Its name: the caption."""
    tags: tuple[str, ...]
    """Further words about it."""
    group: int
    """emojibase's group; -1 for none."""
    variants: tuple[str, ...]
    """Codes of its skin-tone variants."""

    @property
    def captions(self) -> list[str]:
        """The name alone, and the name with tags that add to it: two captions over-fit less than one."""
        fresh = [tag for tag in self.tags if tag.lower() not in self.label.lower()][:EXTRA_TAGS]
        return [self.label, ", ".join([self.label, *fresh])] if fresh else [self.label]

    def held_out(self, fraction: float) -> bool:
        """Return whether this concept belongs to the held-out `fraction`, in every style and as a clip."""
        return share("concept", self.code) < fraction


def normal_code(name: str) -> str:
    """Return a code as `Concept.code` spells it: lower case, without the variation selector FE0F."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def load_concepts(data_json: Path) -> list[Concept]:
    """Read `en/data.json` of emojibase-data, in its order."""
    records = json.loads(data_json.read_text(encoding="utf-8"))
    return [
        Concept(
            code=normal_code(record["hexcode"]),
            label=record["label"],
            tags=tuple(record.get("tags", ())),
            group=record.get("group", -1),
            variants=tuple(normal_code(skin["hexcode"]) for skin in record.get("skins", ())),
        )
        for record in records
    ]


def images_by_code(folder: Path) -> dict[str, Path]:
    """Return the images in `folder` by the code in their file names."""
    return {
        normal_code(path.stem): path for path in sorted(folder.iterdir()) if path.suffix in {".png", ".webp"}
    }


def pair_sample(concept: Concept, style: str, path: Path) -> RawSample:
    """Return one picture of one concept with its captions."""
    captions = json.dumps({"captions": concept.captions}, ensure_ascii=False).encode()
    members = {path.suffix[1:]: path.read_bytes(), "txt": concept.label.encode(), "json": captions}
    return RawSample(key=f"{style}/{concept.code}", members=members)


def add_emoji_pairs(
    concepts: Iterable[Concept],
    styles: Mapping[str, Path],
    unseen_styles: Mapping[str, Path],
    fraction: float,
    *,
    train: Split,
    unseen_style: Split,
    heldout_concepts: Split,
) -> None:
    """Share out the pictures of every pictured thing over three data sets.

    Args:
        concepts: all concepts; only those of `PAIR_GROUPS` are used.
        styles: training styles, name to folder of images.
        unseen_styles: styles that training never sees, name to folder.
        fraction: which part of the concepts is held out, in every style.
        train: receives trained concepts in training styles.
        unseen_style: receives trained concepts in unseen styles.
        heldout_concepts: receives held-out concepts in every style.
    """
    pictured = [concept for concept in concepts if concept.group in PAIR_GROUPS]
    trained: set[str] = set()
    for style, folder in styles.items():
        images = images_by_code(folder)
        for concept in pictured:
            if concept.code not in images:
                train.dropped[f"{style} does not draw it"] += 1
                continue
            target = heldout_concepts if concept.held_out(fraction) else train
            target.samples.append(pair_sample(concept, style, images[concept.code]))
            trained.add(concept.code)
        known = {concept.code for concept in pictured}
        train.dropped[f"{style}: face, person, symbol, flag or skin tone"] += len(images.keys() - known)
    for style, folder in unseen_styles.items():
        images = images_by_code(folder)
        for concept in pictured:
            if concept.code not in images or (not concept.held_out(fraction) and concept.code not in trained):
                unseen_style.dropped[f"{style} does not draw it, or no training style does"] += 1
                continue
            target = heldout_concepts if concept.held_out(fraction) else unseen_style
            target.samples.append(pair_sample(concept, style, images[concept.code]))


def add_clips(
    concepts: Iterable[Concept], folder: Path, fraction: float, *, train: Split, heldout: Split
) -> None:
    """Share out the animated emoji over training and held-out clips.

    A skin-tone variant carries the plain name: for training it is a second take of the same movement, and
    held out it would only repeat the plain clip.

    Args:
        concepts: all concepts.
        folder: the animated images, named by code.
        fraction: which part of the concepts is held out.
        train: receives clips of trained concepts.
        heldout: receives clips of held-out concepts, without variants.
    """
    images = images_by_code(folder)
    for concept in concepts:
        for code in (concept.code, *concept.variants):
            path = images.pop(code, None)
            if path is None:
                continue
            target = heldout if concept.held_out(fraction) else train
            if concept.group == FLAG_GROUP:
                target.dropped["flag"] += 1
            elif not _is_animated(path):
                target.dropped["still picture"] += 1
            elif target is heldout and code != concept.code:
                target.dropped["skin-tone variant of a held-out clip"] += 1
            else:
                members = {"webp": path.read_bytes(), "txt": concept.label.encode()}
                target.samples.append(RawSample(key=f"clip/{code}", members=members))
    if images:
        train.dropped["no name for its code"] += len(images)


def _is_animated(path: Path) -> bool:
    with Image.open(path) as image:
        return bool(getattr(image, "n_frames", 1) > 1)
