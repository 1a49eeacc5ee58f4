"""Writes `golden_captions.json` with pycocoevalcap 1.2 and its Java tokenizer, which the tests do without.

By hand: `PYTHONPATH=FOLDER_OF_PYCOCOEVALCAP python tests/flamingo_dist/evaluation/write_caption_golden.py`, with Java.
"""

# ruff: noqa: RUF001 - it is about such signs
import json
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

TARGET = Path(__file__).with_name("golden_captions.json")

IMAGES = {
    "man on a horse": [
        "A man riding a horse down a dirt road.",
        "The man is riding a brown horse.",
        "a cowboy, wearing a hat, rides his horse",
        "Someone on a horse's back near a fence.",
    ],
    "A kid doesn't want to eat broccoli .": [
        "A child that doesn't want the broccoli on his plate.",
        "The boy can't stand broccoli!",
        "a young boy with a plate of green vegetables",
        "The kids' plate is full; they won't eat.",
    ],
    "a red double-decker bus drives down the street": [
        "A double-decker bus on a city street.",
        "A red double decker bus is parked at St. Paul's.",
        "Two-story bus driving on the left-hand side",
        'A bus that says "Hop-On Hop-Off" on the side.',
    ],
    "two dogs play with a frisbee in the park": [
        "Two dogs are playing with a frisbee in a park.",
        "2 dogs jump for a frisbee -- one misses.",
        "A couple of dogs (one black, one white) chasing a frisbee.",
        "dogs dogs dogs dogs dogs playing",
    ],
    "a clock that reads 3:30 p.m. on a tower": [
        "A tower clock showing 3:30 p.m.",
        "The clock says it's half past three.",
        "a tall building with a clock at 10 O'Clock",
        "The time is 3:30pm, on a 100-foot-tall tower.",
    ],
    "a cafe table with a cup of coffee and a croissant": [
        "A café table with coffee & a croissant.",
        "Someone's breakfast: a crème brûlée, a croissant and a $4.50 latte.",
        "A cup of coffee and some naïve art…",
        "breakfast for 1,000 people @ the café #yum",
    ],
    "": ["An empty street at night.", "a street, empty"],
    "the the the the the": ["the cat sat on the mat", "there is a cat on the mat"],
}
CAPTIONS = [
    "I'm sure they're what we've seen; she'd say he'll go, wouldn't she?",
    "Cannot tell: gonna, wanna, gotta, gimme, lemme, 'tis, 'twas, 'til, 'em, 'cause",
    "The U.S. flag, a T.V., an N.Y.C. cab and a Ph.D. student at 9 a.m.",
    "Mr. and Mrs. Smith, Dr. Who vs. Prof. X, etc.",
    "Player No. 5 on Main St. says no.",
    "A T-shirt, a mother-in-law's car and an 8-year-old's toy",
    "rock 'n' roll, rock'n'roll, R&B, AT&T, M&M's, salt & pepper",
    "“Curly” quotes, ‘single’ ones, don’t and it’s and O’Brien’s",
    "A sign reads ''STOP'' or 'go' or `slow`.",
    'half: ½, 1/2, 1 1/2, 3/4", 24/7, 10/12/2014',
    "$5.50, £3, €2, 5¢, US$10, 50% off!!! Really?!",
    "the 90's, '90s, 1990s, 2nd, 3rd, 10ft, 20x30, 3D, 5'10, 6' tall",
    "black and/or white, he/she, w/o a hat, w/ a hat",
    "wait... what…so -- this – is — it - a dash",
    "[sic] {curly} (round) <tag> a < b > c = d + e * f ~ g",
    "visit www.example.com, https://example.org/a?b=1 or mail me@example.org.",
    "emoji 😀 are 🐶 gone, ♥ and © stay, 5° too",
    "Zoë ate a jalapeño in São Paulo; Đà Nẵng, кот, 日本",
    "y'all ain't seen o'clock, ma'am, c'mon, ol' dog goin' home",
    "word,word;word:word plan b. e.g. this i.e. that a.k.a. it",
    "  spaces\tand tabs \u00a0 here ",
    "F-16, 747-400, iPhone6, C++ and c#",
    "the boys' room, James's bike, girls' toys, 1980's",
    "under_score file.txt index.html St.Louis Main St.",
    "Jan. 1st, Feb. 2, Sept. 3, Mon. morning, Calif. coast, Mt. Fuji, Ft. Worth",
    "&amp; &lt; &quot; entities",
    "x² + 1",
    "CAPS DON'T MATTER, CAN'T THEY?",
]


def main() -> None:
    images = [{"caption": caption, "references": references} for caption, references in IMAGES.items()]
    wrap = {
        number: [{"caption": text}]
        for number, text in enumerate(
            [*CAPTIONS, *IMAGES, *(r for references in IMAGES.values() for r in references)]
        )
    }
    texts = [entry[0]["caption"] for entry in wrap.values()]
    tokens = [found[0].split() for found in PTBTokenizer().tokenize(wrap).values()]
    by_text = dict(zip(texts, tokens, strict=True))
    score, scores = Cider().compute_score(
        {i: [" ".join(by_text[r]) for r in image["references"]] for i, image in enumerate(images)},
        {i: [" ".join(by_text[image["caption"]])] for i, image in enumerate(images)},
    )
    document = {"tokens": by_text, "images": images, "scores": scores.tolist(), "cider": float(score)}
    TARGET.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
