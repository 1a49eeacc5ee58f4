import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flamingo_dist.inference.calls import evaluating
from flamingo_dist.inference.generate import GenerationConfig, generate
from tests.flamingo_dist.inference.fake_flamingo import FakeFlamingo

STOP, IMAGE = 0, 11


def prompts(count: int, lengths: tuple[int, ...] = (2, 3, 5)) -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(count)
    tokens, index = [], []
    for row in range(count):
        length = lengths[row % len(lengths)]
        text = torch.randint(1, 11, (length,), generator=generator).tolist()
        tokens.append([IMAGE, *text])
        index.append([1] * (length + 1))
    return tokens, index


def media(count: int, slots: int = 2) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(count, slots, dtype=torch.bool)
    mask[:, 0] = True
    features = torch.randn(count, slots, 1, 4, 3, generator=torch.Generator().manual_seed(7)).half()
    return features * mask[:, :, None, None, None], mask


def config(**changes: Any) -> GenerationConfig:
    return GenerationConfig(
        **{"stop_ids": (STOP,), "suppressed_ids": (IMAGE,), "max_new_tokens": 6, **changes}
    )


def naive_greedy(
    model: nn.Module, tokens: list[int], index: list[int], pixels: Tensor, mask: Tensor
) -> list[int]:
    """One prompt alone, the whole text run again for each token."""
    text: list[int] = []
    model.eval()
    for _ in range(6):
        whole = torch.tensor([tokens + text])
        sees = torch.tensor([index + [index[-1]] * len(text)])
        logits = model(whole, sees, pixels[None], mask[None]).logits_BTV[0, -1]
        logits[IMAGE] = -torch.inf
        token = int(logits.argmax())
        if token == STOP:
            break
        text.append(token)
    return text


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_equals_one_prompt_at_a_time(use_cache: bool, batch_size: int) -> None:
    model = FakeFlamingo()
    tokens, index = prompts(7)
    pixels, mask = media(7)
    found = generate(model, tokens, index, pixels, mask, config(use_cache=use_cache, batch_size=batch_size))
    expected = [naive_greedy(model, tokens[row], index[row], pixels[row], mask[row]) for row in range(7)]
    assert found == expected
    assert len({tuple(text) for text in found}) > 3, "a test whose texts are all alike shows nothing"


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_with_and_without_cache(seed: int) -> None:
    model = FakeFlamingo(seed=seed)
    tokens, index = prompts(4)
    pixels, mask = media(4)
    cached, plain, single = (
        generate(model, tokens, index, pixels, mask, config(beams=beams, use_cache=use_cache))
        for beams, use_cache in ((3, True), (3, False), (1, True))
    )
    assert cached == plain
    assert [len(text) <= 6 for text in single]


def test_suppressed_ids_never_come() -> None:
    model = FakeFlamingo()
    tokens, index = prompts(6)
    pixels, mask = media(6)
    allowed = {1, 2}
    shut = tuple(set(range(12)) - allowed)
    for beams in (1, 3):
        texts = generate(model, tokens, index, pixels, mask, config(suppressed_ids=shut, beams=beams))
        assert all(set(text) <= allowed and len(text) == 6 for text in texts)


def test_media_matter() -> None:
    model = FakeFlamingo()
    tokens, index = prompts(6)
    pixels, mask = media(6)
    assert generate(model, tokens, index, pixels, mask, config()) != generate(
        model, tokens, index, pixels.roll(1, 0), mask, config()
    )


def test_ranks_with_unequal_work_make_the_same_calls() -> None:
    """Two ranks as threads; the reduction is a barrier, so an uneven number of calls would time out."""
    barrier, flags = threading.Barrier(2, timeout=20), [False, False]

    def all_done(rank: int) -> Callable[[bool], bool]:
        def reduce(done: bool) -> bool:
            flags[rank] = done
            barrier.wait()
            result = all(flags)
            barrier.wait()
            return result

        return reduce

    models = [FakeFlamingo(seed=rank) for rank in range(2)]
    texts: list[Any] = [None, None]

    def work(rank: int) -> None:
        count = (1, 7)[rank]
        tokens, index = prompts(count)
        texts[rank] = generate(models[rank], tokens, index, *media(count), config(), all_done=all_done(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert models[0].calls == models[1].calls
    assert models[0].calls.count("media") == 3
    for rank, count in enumerate((1, 7)):
        tokens, index = prompts(count)
        assert texts[rank] == generate(FakeFlamingo(seed=rank), tokens, index, *media(count), config())


def test_modes_and_gradients_are_put_back() -> None:
    model = FakeFlamingo().train()
    model.resampler.eval()
    tokens, index = prompts(2)
    generate(model, tokens, index, *media(2), config())
    assert (model.training, model.dropout.training, model.resampler.training) == (True, True, False)
    with evaluating(model):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beams": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"length_penalty": -1.0}, "at least 0"),
        ({"beams": 3, "temperature": 1.0}, "draws nothing"),
    ],
)
def test_bad_configuration(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_bad_prompts() -> None:
    model, (pixels, mask) = FakeFlamingo(), media(1)
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(model, [], [], pixels[:0], mask[:0], config())
    with pytest.raises(ValueError, match="media indices from 1 to 3"):
        generate(model, [[1, 2]], [[1, 3]], pixels, mask, config())
    with pytest.raises(ValueError, match="must be equal"):
        generate(model, [[1, 2]], [[1]], pixels, mask, config())


def test_missing_cache_is_explained() -> None:
    tokens, index = prompts(1)
    with pytest.raises(ValueError, match="use_cache=False"):
        generate(lambda *args, **kwargs: None, tokens, index, *media(1), config())


def test_beams_agree_with_transformers() -> None:
    """Beam search of 3 with length penalty 0 against the library that OpenFlamingo used for it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    stop = 12  # a token that this network likes, so that some texts end early
    lm = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=14,
            n_embd=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.7,
            bos_token_id=None,
            eos_token_id=stop,
        )
    ).eval()

    def forward(tokens_BT: Tensor, index_BT: Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(
            logits_BTV=lm(tokens_BT).logits, nll_BT=None, latents_BMRE=torch.zeros(len(tokens_BT), 1, 1, 1)
        )

    prompts_NT = torch.randint(1, 14, (12, 4), generator=torch.Generator().manual_seed(1))
    pixels, mask = media(12, 1)
    ours = generate(
        forward,
        prompts_NT.tolist(),
        [[0] * 4] * 12,
        pixels,
        mask,
        config(beams=3, use_cache=False, stop_ids=(stop,), suppressed_ids=(), max_new_tokens=7),
    )
    theirs = lm.generate(
        prompts_NT,
        attention_mask=torch.ones_like(prompts_NT),
        num_beams=3,
        length_penalty=0.0,
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
    )[:, 4:]
    expected = [[*row, stop][: [*row, stop].index(stop)] for row in theirs.tolist()]
    assert ours == expected
    assert len({len(text) for text in ours}) > 2
