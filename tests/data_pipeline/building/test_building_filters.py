"""Every filter with a sample that passes and one that fails, by the rule's own threshold."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from data_pipeline.building.config import (
    BuildConfig,
    CaptionConfig,
    DedupConfig,
    HtmlConfig,
    ImageConfig,
    TextConfig,
    VideoConfig,
)
from data_pipeline.building.dedup import near_duplicates, signature, similarity
from data_pipeline.building.documents import clean_text, sample_key
from data_pipeline.building.explicit import explicit_fault
from data_pipeline.building.images import HashIndex, check_image, perceptual_hash
from data_pipeline.building.quality import caption_fault, language_fault, repetition_fault, text_fault
from data_pipeline.errors import BadSampleError
from tests.data_pipeline.building.building_material import english, picture, plain_picture

LIMITS = ImageConfig()
TEXT = TextConfig()


def fault(text: str, **changes: object) -> str:
    found = text_fault(text, TextConfig(**changes))  # type: ignore[arg-type]
    return found[0] if found else ""


def image_fault(blob: bytes, limits: ImageConfig = LIMITS) -> str:
    try:
        check_image(blob, limits)
    except BadSampleError as error:
        return error.cause
    return ""


@pytest.mark.parametrize("seed", range(20))
def test_plain_english_passes(seed: int) -> None:
    assert fault(english(seed)) == ""


GOOD = english(1)


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("under 50 words", " ".join(GOOD.split()[:49]), " ".join(GOOD.split()[:50])),
        ("mean word length outside 3 to 10", "of to be a I it " * 20, GOOD),
        ("mean word length outside 3 to 10", " ".join(["internationalisation"] * 60), GOOD),
        ("too many symbols", GOOD + " #" * 40, GOOD + " #" * 5),
        ("too many symbols", GOOD + " ..." * 40, GOOD + " ..." * 5 + " end"),
        (
            "bullet lines",
            "\n".join(f"- {s}" for s in GOOD.split(".")),
            "\n".join(["x y", *(f"- {s}" for s in GOOD.split(".")[:6]), "z"]),
        ),
        (
            "lines that end in an ellipsis",
            "\n".join(s + ("…" if n % 2 else ".") for n, s in enumerate(GOOD.split(".")[:8])),
            "\n".join(s + ("…" if n == 1 else ".") for n, s in enumerate(GOOD.split(".")[:8])),
        ),
        ("words without letters", GOOD + " 1234" * 60, GOOD + " 1234" * 10),
        (
            "too few stop words",
            english(2).replace("the ", "a ").replace("with ", "").replace("and ", ""),
            GOOD,
        ),
    ],
)
def test_quality_rules(name: str, bad: str, good: str) -> None:
    only = {"languages": ("en",), "min_language_probability": 0.0, "repetition": False}
    found = text_fault(bad, TextConfig(**only))  # type: ignore[arg-type]
    if name == "too few stop words" or found is None or found[0].startswith("language"):
        from data_pipeline.building.quality import quality_fault

        found = quality_fault(bad, bad.split(), TEXT)
    assert found is not None
    assert found[0] == name
    assert text_fault(good, TextConfig(**only)) is None  # type: ignore[arg-type]
    assert text_fault(bad, TextConfig(languages=(), quality=False, repetition=False)) is None


def lines_of(*texts: str) -> str:
    return "\n".join(texts)


def test_repetition_rules() -> None:
    unique = [english(seed, 1) for seed in range(20)]

    def found(text: str) -> str:
        result = repetition_fault(text, text.split())
        return result[0] if result else ""

    assert found("\n\n".join(unique)) == ""
    # 7 of 20 lines are repeats; short ones, so that no rule about characters comes first.
    short = ["an end"] * 8 + unique[:12]
    assert found(lines_of(*short)) == "repetition: line"
    assert found(lines_of(*short[:4], *unique)) == ""
    paragraphs = "\n\n".join(f"{u}\nx{n}" for n, u in enumerate(unique[:12])) + "\n\nan end\nof it" * 8
    assert found(paragraphs) in ("repetition: line", "repetition: paragraph")
    assert found(lines_of(*unique[:6], unique[0], unique[1])) == "repetition: characters in duplicate lines"
    assert found(lines_of(*unique, unique[0])) == ""
    assert found(" ".join(["red cars"] * 20 + [english(5, 2)])) == "repetition: top 2-gram"
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in rng.permutation(400)]
    phrase = [f"p{n}" for n in range(12)]
    spread = [w for n, w in enumerate(words) for w in ([*phrase, w] if n % 40 == 0 else [w])]
    assert found(" ".join(spread)).startswith("repetition: duplicate ")
    assert found(" ".join([*words, *phrase])) == ""


def test_repetition_shares_are_gophers() -> None:
    from data_pipeline.building.quality import _duplicate_ngram_characters, _top_ngram_characters

    words = list("abcdexabcdey")
    assert _duplicate_ngram_characters(words, 5) == 5
    assert _duplicate_ngram_characters(["a"] * 7, 5) == 6, "each character counts once"
    assert _top_ngram_characters(["ab", "cd", "ab", "cd", "ef"], 2) == 8
    assert _top_ngram_characters(["ab", "cd", "ef", "gh"], 2) == 0


def test_languages() -> None:
    german = "Der alte Mann ging langsam durch den dunklen Wald und sah die kleinen Vögel in den Bäumen."
    assert language_fault(GOOD, ("en",), 0.5) is None
    found = language_fault(german, ("en",), 0.5)
    assert found is not None
    assert found[0] == "language"
    assert found[1].startswith("de")
    assert language_fault(german, ("en", "de"), 0.5) is None
    assert language_fault(GOOD, ("en",), 1.0) in (None, ("language uncertain", "en (1.00)"))
    assert language_fault("xq zv", ("en", "und"), 0.99) is not None


def lewd(share: float, terms: tuple[str, ...] = ("porn", "blow job", "tits")) -> str:
    """English of which about this share are listed words."""
    words = english(3, 20).split()
    listed = " ".join(terms).split()
    count = round(share * len(words) / (1 - share) / len(listed))
    return " ".join(words + listed * count)


def test_explicit_pages() -> None:
    assert fault(lewd(0.03)) == "explicit text"
    assert fault(lewd(0.03), explicit=False) == ""
    assert fault(lewd(0.008)) == "", "a page is explicit that is full of such words, not one that has some"
    assert fault(lewd(0.03), max_explicit=0.05) == ""
    assert fault(lewd(0.03, ("rape", "rape", "rape"))) == "", "a report of one crime"
    assert fault("Essex, Scunthorpe, assassins and analysts of the cockpit. " + english(1)) == ""
    german = ("Arschloch", "ficken", "Titten")
    assert explicit_fault(lewd(0.03, german), "", TextConfig(languages=("de",))) is not None
    assert explicit_fault(lewd(0.03, german), "", TEXT) is None
    assert explicit_fault(lewd(0.03, german), "", TextConfig(languages=())) is not None


@pytest.mark.parametrize(
    ("host", "explicit"),
    [
        ("www.hotporn.example", True),
        ("free-sex.example", True),
        ("sussex.example", False),
        ("escort-cars.example", False),
        ("", False),
    ],
)
def test_explicit_addresses(host: str, explicit: bool) -> None:
    found = text_fault(english(2), TEXT, f"https://{host}/page.html?sex=f" if host else "")
    assert (found is not None and found[0] == "explicit address") == explicit
    assert text_fault(english(2), TextConfig(explicit=False), f"https://{host}/") is None


def test_captions() -> None:
    assert caption_fault("a red fox", CaptionConfig()) is None
    assert caption_fault(" \n", CaptionConfig()) == ("empty caption", "")
    assert caption_fault("fox", CaptionConfig(min_words=2)) == ("caption under 2 words", "fox")
    assert caption_fault("x" * 20_000, CaptionConfig()) == ("caption over 2000 characters", "20000")
    assert caption_fault("der Hund läuft über die grüne Wiese", CaptionConfig(languages=("en",))) is not None


@pytest.mark.parametrize(
    ("cause", "bad", "good"),
    [
        ("side under 64 pixels", picture(1, (63, 100)), picture(1, (64, 100))),
        ("aspect ratio over 3", picture(1, (193, 64)), picture(1, (192, 64))),
        ("aspect ratio over 3", picture(1, (64, 193)), picture(1, (64, 192))),
        ("single colour", plain_picture(), picture(1)),
        ("corrupt image", picture(1)[:-300], picture(1)),
        ("corrupt image", picture(1, form="JPEG")[:-200], picture(1, form="JPEG")),
        ("no image of a known format", b"", picture(1, form="WEBP")),
        ("no image of a known format", picture(1, form="ICO"), picture(1, form="BMP")),
        ("no image of a known format", b"<svg xmlns='http://www.w3.org/2000/svg'/>", picture(1, form="GIF")),
    ],
)
def test_image_filters(cause: str, bad: bytes, good: bytes) -> None:
    assert image_fault(bad) == cause
    assert image_fault(good) == ""


def test_image_limits() -> None:
    assert image_fault(picture(1), ImageConfig(max_bytes=100)) == "over 100 bytes"
    assert image_fault(picture(1), ImageConfig(min_bytes=10**6)) == "under 1000000 bytes"
    assert image_fault(picture(1, (100, 100)), ImageConfig(max_pixels=9999)) == "too many pixels"
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 1 << 20
    assert image_fault(bomb.getvalue(), ImageConfig(max_pixels=10**9)) == "too many pixels", (
        "Pillow's own guard"
    )


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_odd_kinds_of_images() -> None:
    shades = np.linspace(0, 65535, 80 * 96).reshape(80, 96)
    assert image_fault(encoded(Image.fromarray(shades.astype(np.uint16)))) == "", "16 bit"
    cmyk = Image.open(io.BytesIO(picture(3))).convert("CMYK")
    assert image_fault(encoded(cmyk, "JPEG")) == ""
    alpha = Image.new("RGBA", (96, 80), (0, 0, 0, 0))
    assert image_fault(encoded(alpha)) == "single colour", "what is wholly transparent is white"
    alpha.paste((0, 0, 0, 255), (0, 0, 40, 40))
    assert image_fault(encoded(alpha)) == "", "black on transparent black is a shape on white"
    frames = [Image.open(io.BytesIO(picture(n))) for n in range(3)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert check_image(animated, LIMITS).extension == "gif"
    assert image_fault(plain_picture(), ImageConfig(colour_range=0)) == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((300, 250)),
        lambda image: image.resize((70, 65)),
        lambda image: Image.open(io.BytesIO(encoded(image, "JPEG", quality=40))),
        lambda image: ImageEnhance.Brightness(image).enhance(0.9),
        lambda image: image.convert("L"),
    ],
)
def test_near_duplicates_of_images_are_recognised(change: Callable[[Image.Image], Image.Image]) -> None:
    images = [Image.open(io.BytesIO(picture(seed, (200, 160)))) for seed in range(30)]
    index = HashIndex((perceptual_hash(image) for image in images[:15]), distance=6)
    assert all(index.near(perceptual_hash(change(image))) for image in images[:15])
    assert not any(index.near(perceptual_hash(change(image))) for image in images[15:])


@settings(max_examples=60, deadline=None)
@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), max_size=40),
    distance=st.integers(0, 15),
    flips=st.lists(st.integers(0, 63), max_size=18, unique=True),
    other=st.integers(0, 2**64 - 1),
)
def test_the_hash_index_finds_what_a_full_search_finds(
    hashes: list[int], distance: int, flips: list[int], other: int
) -> None:
    index = HashIndex(hashes, distance)
    wanted = [other]
    if hashes:
        near = hashes[0]
        for bit in flips:
            near ^= 1 << bit
        wanted.append(near)
    for value in wanted:
        assert index.near(value) == any((h ^ value).bit_count() <= distance for h in hashes)


def test_near_duplicate_documents() -> None:
    texts = [english(seed, 20) for seed in range(30)]
    words = texts[3].split()
    texts += [texts[0], texts[1].upper() + "!", " ".join([*words[:100], "really", *words[100:]])]
    settings_ = DedupConfig()
    signatures = np.stack([signature(text, settings_) for text in texts])
    assert np.flatnonzero(near_duplicates(signatures, settings_)).tolist() == [30, 31, 32]
    half = " ".join(words[: len(words) // 2]) + " " + english(99, 10)
    mixed = np.stack([signature(texts[3], settings_), signature(half, settings_)])
    assert not near_duplicates(mixed, settings_).any(), "half of a text is no near-duplicate"
    assert 0.1 < similarity(mixed[0], mixed[1]) < 0.6
    assert near_duplicates(signatures[:0], settings_).tolist() == []
    assert not near_duplicates(signatures[:1], settings_).any()


def test_the_estimate_is_the_jaccard_similarity() -> None:
    settings_ = DedupConfig(permutations=1024, bands=128, shingle=1)
    words = [f"word{n}" for n in range(300)]
    first, second = signature(" ".join(words[:200]), settings_), signature(" ".join(words[100:]), settings_)
    assert similarity(first, second) == pytest.approx(100 / 300, abs=0.06)


def test_a_chain_of_duplicates_keeps_its_first() -> None:
    settings_ = DedupConfig(permutations=8, bands=4, jaccard=0.5)
    rows = np.array(
        [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 2, 2, 2, 2], [9] * 8], np.uint32
    )
    assert near_duplicates(rows, settings_).tolist() == [False, True, True, False]
    strict = DedupConfig(permutations=8, bands=4, jaccard=0.6)
    assert not near_duplicates(rows, strict).any(), "one band in common makes a candidate, not a duplicate"


def test_keys_and_text_are_safe() -> None:
    assert sample_key("a/../b c.d", "x") == f"a/b_c_d-{sample_key('', 'x').rpartition('-')[2]}"
    assert sample_key("", "x").startswith("sample-")
    assert sample_key("ä" * 300, "x").startswith("sample-")
    assert len(sample_key("a" * 300, "x")) < 100
    assert sample_key("a", "x") != sample_key("a", "y")
    assert clean_text("a\0b\x1fc\ud800d\n\te") == "abcd\n\te"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HtmlConfig(max_bytes=0), "at least 1"),
        (lambda: TextConfig(languages="en"), "give a tuple"),  # type: ignore[arg-type]
        (lambda: TextConfig(min_language_probability=2), r"\[0, 1\]"),
        (lambda: TextConfig(max_explicit=-0.1), r"\[0, 1\]"),
        (lambda: TextConfig(min_words=9, max_words=3), "min_words <= max_words"),
        (lambda: ImageConfig(max_aspect=0.5), "at least 1"),
        (lambda: ImageConfig(min_bytes=9, max_bytes=3), "at most max_bytes"),
        (lambda: CaptionConfig(min_words=0), "at least 1"),
        (lambda: VideoConfig(min_seconds=3, max_seconds=1), "min_seconds <= max_seconds"),
        (lambda: VideoConfig(max_bytes=0), "at least 1"),
        (lambda: DedupConfig(hash_distance=16), "0 to 15"),
        (lambda: DedupConfig(bands=7), "divide"),
        (lambda: DedupConfig(jaccard=0), r"\(0, 1\]"),
        (lambda: BuildConfig(input="html", sources=(), output="x"), "both must be given"),
        (lambda: BuildConfig(input="html", sources="x", output="x"), "tuple of URLs"),  # type: ignore[arg-type]
        (
            lambda: BuildConfig(input="html", sources=("x",), output="x", images=("y",)),
            "only obelics and mmc4",
        ),
        (lambda: BuildConfig(input="html", sources=("x",), output="x", samples_per_part=0), "at least 1"),
    ],
)
def test_settings_that_cannot_work_say_what_can(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
