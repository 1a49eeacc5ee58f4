"""What `flamingo evaluate` is told."""

from dataclasses import dataclass
from typing import Literal

from flamingo_dist.inference.prompt import CAPTIONING, QUESTION_ANSWERING, PromptTemplate

Task = Literal["caption", "vqa", "exact", "classify"]
NEW_TOKENS: dict[str, int] = {"caption": 20, "vqa": 5, "exact": 5}
"""OpenFlamingo's lengths; the paper gives none."""
ANSWER_FIELDS: dict[str, str] = {
    "caption": "caption",
    "vqa": "answer",
    "exact": "answer",
    "classify": "label",
}
"""The field of a template that is the answer."""
TEMPLATES: dict[str, PromptTemplate] = {
    "caption": CAPTIONING,
    "vqa": QUESTION_ANSWERING,
    "exact": QUESTION_ANSWERING,
    "classify": PromptTemplate(shot="Output: {label}", query="Output:"),
}
"""The paper's prompts."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Arguments of `flamingo evaluate`."""

    run: str
    """Run folder of a trained run, or a folder that `flamingo export` or `flamingo import` wrote, at any fsspec URL."""
    task: Task
    """"caption": CIDEr. "vqa": answers scored by VQA accuracy. "exact": answers that must equal an accepted one.
    "classify": names ranked by log-likelihood, top-1, and ROC AUC where there are two."""
    queries: tuple[str, ...]
    """Shards that are asked about: folders, .tar files, brace patterns or globs at any fsspec URL."""
    support: tuple[str, ...] = ()
    """Shards that demonstrations are taken from."""
    shots: tuple[int, ...] = (0, 4, 8, 16, 32)
    """Numbers of demonstrations, evaluated one after another."""
    select: Literal["random", "rices"] = "random"
    """Demonstrations of each query: drawn at random, or those that look most like it, the most similar last."""
    support_size: int = 2048
    """Support examples chosen by the seed (paper: 2,048); for classification `support_per_class` instead."""
    support_per_class: int = 32
    """Support examples of each class (paper: 32); 0 counts them as other tasks' are, by `support_size`."""
    limit: int = 0
    """Most queries, chosen by the seed; 0 asks about all."""
    text_examples: int = 2
    """Examples without their images that come before a query at 0 shots (paper: 2; classification has none)."""
    seed: int = 0
    """Of the support set, the demonstrations and the intervals."""
    shot_prompt: str | None = None
    """Text of a demonstration, such as "Question: {question} Answer: {answer}", with the JSON's fields by name; None
    takes the paper's."""
    query_prompt: str | None = None
    """The beginning of that text, up to where the answer starts; may be empty."""
    label: str = "label"
    """Classification: the JSON field that holds the right name; "txt" is the sample's text."""
    classes: str = ""
    """Classification: file with a class name a line, at any URL; empty takes the names that the data hold."""
    positive: str = ""
    """Two classes: the one that ROC AUC is of; empty takes the second."""
    orders: int = 1
    """Classification: orders of the demonstrations to take the mean log-likelihood over (paper: 6)."""
    normalise: Literal["none", "tokens"] = "none"
    """Classification: rank by the log-likelihood, or by its mean over a name's tokens."""
    beams: int = 3
    """Beam width of open-ended tasks (paper: 3); 1 is greedy."""
    max_new_tokens: int = 0
    """Longest answer in tokens; 0 takes 20 for captions and 5 for answers."""
    length_penalty: float = 0.0
    """Beams are ranked by log-likelihood / length ** this."""
    frames: int = 0
    """Frames of a video; 0 takes as many as the network was trained with, and WebP and GIF as stills."""
    video_fps: float | None = None
    """Frames a second of a clip from the middle of the video; None spreads the frames over all of it."""
    context: int = 0
    """Longest prompt with its answer, in tokens (Flamingo's LM: 2,048); 0 has no limit but a table of positions."""
    batch: int = 8
    """Most queries in one call of the network."""
    rows: int = 32
    """Classification: most names scored in one call."""
    data: int = 1
    """Data-parallel processes of this machine, each of which answers a share of the queries."""
    tensor: int = 1
    """Tensor-parallel processes, a GPU each where there are GPUs, that share each network."""
    checkpoint: str = "latest"
    """Checkpoint of a run: "latest", a step, or a path."""
    out: str = ""
    """Folder for the results; empty takes one of the run folder's `evaluations/`."""

    def __post_init__(self) -> None:
        least = {
            "support_size": 1,
            "support_per_class": 0,
            "limit": 0,
            "text_examples": 0,
            "seed": 0,
            "orders": 1,
            "beams": 1,
            "max_new_tokens": 0,
            "frames": 0,
            "context": 0,
            "batch": 1,
            "rows": 1,
            "data": 1,
            "tensor": 1,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {lowest} or more.")
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise ValueError(
                f"--shots {list(self.shots)}: give different numbers from 0, such as 0 4 8 16 32."
            )
        self._check_prompts()
        self._check_classification()

    def _check_prompts(self) -> None:
        """Refuse prompts that give the answer away, or that no answer follows."""
        if (self.shot_prompt is None) != (self.query_prompt is None):
            raise ValueError(
                f"--shot-prompt {self.shot_prompt!r} with --query-prompt {self.query_prompt!r}: give both, or neither "
                "for the paper's."
            )
        shot, query, answer = self.template.shot, self.template.query, ANSWER_FIELDS[self.task]
        shown, asked = (f"{{{answer}}}" in text for text in (shot, query))
        if not shot.startswith(query) or query != query.rstrip() or not shown or asked:
            raise ValueError(
                f"--shot-prompt {shot!r} with --query-prompt {query!r}: the second must be the beginning of the first, "
                f"without a space at its end, and the first alone holds {{{answer}}}."
            )

    def _check_classification(self) -> None:
        """Refuse what only classification has, or only the other tasks."""
        given = {
            "classes": bool(self.classes),
            "positive": bool(self.positive),
            "orders": self.orders != 1,
            "normalise": self.normalise != "none",
            "label": self.label != "label",
        }
        wrong = [f"--{name}" for name, is_given in given.items() if is_given]
        if self.is_open_ended and wrong:
            raise ValueError(f"{', '.join(wrong)}: only --task classify has these, not --task {self.task}.")

    @property
    def is_open_ended(self) -> bool:
        """Whether answers are generated, not chosen."""
        return self.task != "classify"

    @property
    def template(self) -> PromptTemplate:
        """Text around an answer."""
        if self.shot_prompt is not None and self.query_prompt is not None:
            return PromptTemplate(shot=self.shot_prompt, query=self.query_prompt)
        return TEMPLATES[self.task]

    @property
    def new_tokens(self) -> int:
        """Longest answer in tokens, of open-ended tasks."""
        return self.max_new_tokens or NEW_TOKENS[self.task]

    @property
    def text_shots(self) -> int:
        """Examples without images at 0 shots."""
        return self.text_examples if self.is_open_ended else 0

    @property
    def most_examples(self) -> int:
        """Examples that the longest prompt shows."""
        zero_shot = [self.text_shots] if 0 in self.shots else []
        return max((*self.shots, *zero_shot))
