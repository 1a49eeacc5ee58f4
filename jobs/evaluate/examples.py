"""Examples of an evaluation: keys, texts and where their media lie, from shards of the project's layout."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from data_pipeline.batch import Skip
from data_pipeline.errors import BadSampleError
from data_pipeline.index import ShardIndex, open_index
from data_pipeline.media import FEATURE_EXTENSION, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from data_pipeline.reading import SampleReader
from data_pipeline.samples import read_captions
from data_pipeline.shards import SampleRecord
from data_pipeline.storage import Storage
from flamingo_dist.evaluation.demonstrations import choose_per_class, choose_support
from jobs.evaluate.settings import EvaluateArguments

_TEXT_MEMBERS = ("json", "txt", "cls")
_MEDIA = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, FEATURE_EXTENSION)
_MAX_TEXT_BYTES = 8 << 20
_THREADS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One example: a query, or one that demonstrations may show."""

    key: str
    """Sample key."""
    url: str
    """Shard that holds it."""
    shard_bytes: int
    """Size of the shard by its index."""
    record: SampleRecord
    """Where its members lie."""
    medium: str
    """The member that is its image, video or features."""
    fields: Mapping[str, str]
    """What a prompt's template is filled with, the answer to show included."""
    answers: tuple[str, ...]
    """Reference captions, people's answers, or the right name."""
    choices: tuple[str, ...] = ()
    """Names to choose from, where each query has its own."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """All examples of an evaluation."""

    support: tuple[Example, ...]
    """The support set."""
    queries: tuple[Example, ...]
    """What is asked about, in the order of the shards."""
    names: tuple[str, ...]
    """Class names of the file, if one was given."""
    damaged: tuple[Skip, ...]
    """Damaged shards, whose unreadable samples are in neither."""


def read_examples(arguments: EvaluateArguments) -> Examples:
    """Read the texts of the queries and of a support set that the seed chooses.

    Raises:
        MissingShardError: a shard does not exist.
        ValueError: no shards, a key twice, or an example without what the task needs.
    """
    storage = Storage()
    names = read_names(arguments.classes, storage)
    queries, query_skips = _listed(arguments.queries, storage, "--queries")
    if arguments.limit:
        chosen = choose_support([key for key, _, _ in queries], arguments.limit, seed=arguments.seed)
        queries = [queries[place] for place in sorted(chosen)]
    support: list[_Place] = []
    support_skips: Sequence[Skip] = ()
    if arguments.support:
        support, support_skips = _listed(arguments.support, storage, "--support")
    by_class = arguments.task == "classify" and arguments.support_per_class > 0
    if support and not by_class:
        chosen = choose_support([key for key, _, _ in support], arguments.support_size, seed=arguments.seed)
        support = [support[place] for place in chosen]
    read = _read_all(support, arguments, names, storage, "support")
    if support and by_class:
        chosen = choose_per_class(
            [example.key for example in read],
            [example.answers[0] for example in read],
            arguments.support_per_class,
            seed=arguments.seed,
        )
        read = [read[place] for place in chosen]
    return Examples(
        support=tuple(read),
        queries=tuple(_read_all(queries, arguments, names, storage, "query")),
        names=names,
        damaged=(*query_skips, *support_skips),
    )


def read_names(url: str, storage: Storage) -> tuple[str, ...]:
    """Return the class names of a file, one a line; none without a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a name comes twice.
    """
    lines = storage.read_all(url).decode("utf-8").splitlines() if url else []
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{url} has {twice[0]!r} more than once: give each class a name of its own.")
    return tuple(names)


def shared_classes(arguments: EvaluateArguments, examples: Examples) -> tuple[str, ...]:
    """Return the class names that queries share: those of the file, else those that the data hold, in their order.

    Empty where queries have choices of their own, and in open-ended tasks.

    Raises:
        ValueError: a query's name is not among them, there are fewer than two, or the positive one is none of two.
    """
    sharing = [query for query in examples.queries if not query.choices]
    if arguments.is_open_ended or not sharing:
        return ()
    data = {example.answers[0] for example in (*examples.support, *sharing)}
    names = examples.names or tuple(sorted(data))
    if len(names) < 2:
        raise ValueError(
            f"the data hold one class name, {names[0]!r}: give --classes, a file with all names."
        )
    unknown = next((query for query in sharing if query.answers[0] not in names), None)
    if unknown is not None:
        raise ValueError(
            f"query {unknown.key} is {unknown.answers[0]!r}, which {arguments.classes} lacks; add it there, or "
            "correct the data."
        )
    if arguments.positive and (len(names) != 2 or arguments.positive not in names):
        raise ValueError(
            f"--positive {arguments.positive!r}: ROC AUC is of one of two classes, and there are {names[:5]}."
        )
    return names


_Place = tuple[str, SampleRecord, tuple[str, int]]
"""Key, record, and the shard's URL and size."""


def _listed(urls: Sequence[str], storage: Storage, option: str) -> tuple[list[_Place], Sequence[Skip]]:
    """Return every sample of the shards.

    Raises:
        ValueError: a key comes twice.
    """
    index: ShardIndex = open_index(urls, storage=storage)
    places: list[_Place] = []
    for number, entry in enumerate(index.entries):
        places += [(record.key, record, (entry.url, entry.size)) for record in index.records(number)]
    twice = [key for key, count in Counter(key for key, _, _ in places).items() if count > 1]
    if twice:
        raise ValueError(
            f"{option}: {len(twice)} keys come more than once, among them {twice[0]!r}; results go by key, give every "
            "sample one of its own, and every shard once."
        )
    return places, index.skips


def _read_all(
    places: Iterable[_Place],
    arguments: EvaluateArguments,
    names: Sequence[str],
    storage: Storage,
    role: str,
) -> list[Example]:
    """Read the texts of samples, several at a time: storage may be far."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda place: _read(place, arguments, names, storage, role), places))


def _read(
    place: _Place, arguments: EvaluateArguments, names: Sequence[str], storage: Storage, role: str
) -> Example:
    key, record, (url, size) = place
    medium = next((extension for extension in _MEDIA if extension in record.members), None)
    texts = {
        extension: record.members[extension] for extension in _TEXT_MEMBERS if extension in record.members
    }
    try:
        if medium is None:
            raise BadSampleError("missing member", f"no image, video or .npy among {sorted(record.members)}")
        if not texts:
            raise BadSampleError("missing member", f"neither .json nor .txt among {sorted(record.members)}")
        reader = SampleReader(
            url, SampleRecord(key, texts), max_bytes=_MAX_TEXT_BYTES, storage=storage, shard_bytes=size
        )
        found = _fields(reader)
        if arguments.task == "caption":
            fields, answers, choices = _captions(found, reader)
        elif arguments.task == "classify":
            fields, answers, choices = _label(found, arguments.label, names)
        else:
            fields, answers, choices = _question(found, needed="{question}" in arguments.template.query)
    except BadSampleError as error:
        raise ValueError(
            f"{role} {key} of {url}: {error.cause}, {error.detail}; --task {arguments.task} needs it "
            "(docs/evaluation.md), correct the sample or leave it out."
        ) from error
    return Example(
        key=key,
        url=url,
        shard_bytes=size,
        record=record,
        medium=medium,
        fields=fields,
        answers=answers,
        choices=choices,
    )


_Texts = tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]
"""Fields of the template, answers, and a query's own choices."""


def _fields(reader: SampleReader) -> dict[str, Any]:
    """Return the JSON's fields, and the other text members by their extension."""
    fields: dict[str, Any] = {}
    if reader.has("json"):
        try:
            fields = json.loads(reader.get("json"))
        except (ValueError, RecursionError) as error:
            raise BadSampleError("bad document", f"{type(error).__name__}: {error}"[:300]) from error
        if not isinstance(fields, dict):
            raise BadSampleError("bad document", f".json holds {type(fields).__name__} instead of an object")
    for extension in ("txt", "cls"):
        if reader.has(extension):
            fields[extension] = reader.get(extension).decode("utf-8", errors="replace").strip()
    return fields


def _plain(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that a template can show."""
    return {
        name: str(value)
        for name, value in fields.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    }


def _captions(fields: Mapping[str, Any], reader: SampleReader) -> _Texts:
    captions = [caption.strip() for caption in read_captions(reader)]
    if reader.has("txt") and captions[0] in captions[1:]:
        del captions[0]  # the .txt is one of the JSON's, and no further reference
    return {**_plain(fields), "caption": captions[0]}, tuple(captions), ()


def _question(fields: Mapping[str, Any], *, needed: bool) -> _Texts:
    if needed and not isinstance(fields.get("question"), str):
        raise BadSampleError("missing field", f"no question among {sorted(fields)}")
    found = fields.get("answers", fields.get("answer"))
    listed = found if isinstance(found, list) else [found]
    answers = [item.get("answer") if isinstance(item, dict) else item for item in listed]
    if not answers or not all(isinstance(answer, str | int | float) for answer in answers):
        raise BadSampleError("missing field", f"no answers among {sorted(fields)}")
    texts = tuple(str(answer) for answer in answers)
    # What most people said, the first of equals, is what a demonstration answers.
    return {**_plain(fields), "answer": Counter(texts).most_common(1)[0][0].strip()}, texts, ()


def _label(fields: Mapping[str, Any], field: str, names: Sequence[str]) -> _Texts:
    choices = fields.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadSampleError("bad field", f"choices {str(choices)[:100]} is no list of texts")
    if len(set(choices)) != len(choices) or len(choices) == 1:
        raise BadSampleError("bad field", f"choices {str(choices)[:100]}: two or more different ones")
    label = fields.get(field, fields.get("cls") if field == "label" else None)
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadSampleError("missing field", f"no {field} among {sorted(fields)}")
    name, known = str(label).strip(), choices or names
    if known and name not in known and name.isdecimal() and int(name) < len(known):
        name = known[int(name)]
    if choices and name not in choices:
        raise BadSampleError("bad field", f"{field} {name!r} is none of the choices")
    return {**_plain(fields), "label": name}, (name,), tuple(choices)
