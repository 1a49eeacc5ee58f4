"""Words of a caption, as the Stanford tokenizer gives them to pycocoevalcap's metrics; in Python, without Java.

Written from what that tokenizer (CoreNLP 3.4.1, lower case, as pycocoevalcap 1.2 calls it) makes of text: contractions
come apart (`ca n't`), compounds stay (`t-shirt`, `red/blue`), abbreviations keep their period, brackets have names, and
punctuation is dropped. Where runs of signs or of foreign scripts mean something else to it, scores may differ.
"""

# ruff: noqa: RUF001 - it is about such signs
import re
import unicodedata
from collections.abc import Iterator

_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr "
    "co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov "
    "govs hon inc ind insp intl invt jan jos jr jul jun kan ky lt ltd maj mar md messrs mfg mich minn mlle mme mo "
    "mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres prof profs pte pty ptys pvt rd "
    "rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs tue tues univ va "
    "vs vt wed wis wisc wm wyo"
)
"""Words that keep a period after them, at the end of a sentence too."""
_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"
"""Words that keep it before a number alone."""
_STARTS = "A|An|He|I|If|In|It|She|That|The|There|These|They|This|We|When|You"
"""A single letter keeps its period (George W. Bush) but before a new sentence. The Stanford tokenizer looks into the
next caption for one; here a caption's end always is one."""
_ASSIMILATED = {
    word.replace(" ", ""): word.split()
    for word in ("can not", "gim me", "gon na", "got ta", "lem me", "wan na", "'t is", "'t was")
}
"""Words that come apart, with their parts."""
_RENAMED = {"£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"} | {
    bracket: f"-{name}-"
    for bracket, name in zip("()[]{}", ["lrb", "rrb", "lsb", "rsb", "lcb", "rcb"], strict=True)
}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": " ", "&apos;": "'"}


def _either(words: str) -> str:
    return "|".join(words.split())


_L = r"[^\W\d_²³¹¼-¾⁰-₉⅐-⅟]"  # letters: \w without digits, also raised ones, and fractions
_W = rf"(?:{_L}[\u0300-\u036f]*|\d)"  # letters, with their accents, and digits
_Q = "['’]"
_END = rf"(?!{_W})"
_SUFFIX = rf"{_Q}(?:s|m|d|re|ve|ll){_END}"
_WORD = rf"{_W}+(?:[-_]{_W}+)*"
_TOKEN = re.compile(
    "|".join(
        (
            r"(?:https?://|www\.)[^\s<>\"()]*[\w/]",
            r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
            r"</?[A-Za-z]+(?:\s[^<>]*)?/?>",
            r"(?-i:[A-Z]+&[A-Z]+)",
            r"(?:US|A|C|HK|NZ|S)\$",
            rf"'(?:tis|twas){_END}",
            rf"{_Q}(?:em|til|cause){_END}|{_Q}n{_Q}|{_Q}n{_END}|{_Q}\d\d(?:s{_END}|(?=\s|$))",
            rf"n{_Q}t{_END}|{_SUFFIX}",
            rf"(?:can(?=not{_END})|not(?<=cannot){_END})",
            r"c\+\+|c#",
            rf"(?:{_L}\.)+{_L}{_END}\.?|ph\.d\.?",  # u.s., p.m., ph.d.
            rf"{_L}\.{_END}(?!\s*$|\s+(?-i:{_STARTS})\b)",
            rf"{_L}{_W}*(?:\.{_L}{_W}*)+{_END}",  # st.louis, index.html
            rf"(?:{_either(_ABBREVIATIONS)})\.|(?:{_either(_BEFORE_NUMBERS)})\.(?=\s*\d)",
            rf"y{_Q}(?={_L})|(?:o|d|l|qu){_Q}{_L}+|ol{_Q}|c{_Q}mon{_END}|cap{_Q}n{_END}|ma{_Q}am{_END}",
            rf"{_L}+(?=n{_Q}t{_END})",
            rf"[-+]?(?:\d+(?:[.,:]\d+)+|(?:\.\d+)+){_END}|\d+(?:[.,:]\d+)+",
            rf"{_WORD}(?:/{_WORD}){{1,2}}|{_L}+[!?]{_L}+",
            rf"[-+]\d+{_END}",
            _WORD,
            r"#[A-Za-z]+|@[A-Za-z]\w*",
            r"[:;=]-?[()]|:-?[dp]\b",
            r"[!?]{2,}|\*+|_+|<<|>>|#{2,}|@{2,}",
            r"\S",
        )
    ),
    re.IGNORECASE,
)
_DROPPED = frozenset(".?!,:;-–—‐‑‒―…\"'`‘’‛“”«»‹›")


def caption_tokens(caption: str) -> list[str]:
    """Split a caption into lower-case words, without punctuation.

    Args:
        caption: as people or networks write it.
    """
    for entity, sign in _ENTITIES.items():
        caption = caption.replace(entity, sign)
    return [word for token in _TOKEN.findall(caption) for word in _words(token.lower())]


def _words(token: str) -> Iterator[str]:
    """Give what is left of one token: nothing, itself, or its parts."""
    if token in _DROPPED or (len(token) == 1 and _is_unknown(token)):
        return
    if token in _ASSIMILATED:
        yield from _ASSIMILATED[token]
    elif token in _RENAMED:
        yield _RENAMED[token]
    elif token[0] in ":;=" and token[-1] in "()":
        yield token[:-1] + _RENAMED[token[-1]]
    elif "’" in token and not token.startswith(("l’", "d’", "o’", "qu’")):
        yield token.replace("’", "'")
    else:
        yield from token.split()


def _is_unknown(sign: str) -> bool:
    """Whether the Stanford tokenizer has no name for a sign, as for emoji, and leaves it out."""
    return ord(sign) > 0xFFFF or sign == "₹" or unicodedata.category(sign) in ("Cf", "Cn", "Co", "Cc")
