"""Recipes: golden dumps, the large ones on the meta device, and what is refused before any process starts."""

import dataclasses
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.config import DatasetConfig
from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.parallel.topology import single_process
from flamingo_dist.planning.parameters import count_parameters
from jobs.commands import parse_run
from jobs.config import CaptionConfig, ResourceConfig, RunConfig
from jobs.doctor.layout import check_borders
from jobs.recipes import RECIPES
from jobs.recipes.smoke import smoke
from jobs.run_file import load_run_config

GOLDEN = Path(__file__).parent / "golden"
NAMED = ["smoke", "flamingo_3b", "flamingo_9b", "flamingo_80b"]
"""The demo is left out: its configuration names what could be fetched."""


@pytest.fixture(autouse=True)
def fixed_cache(monkeypatch):
    monkeypatch.setenv("FLAMINGO_CACHE", "/cache")


@pytest.mark.parametrize("name", NAMED)
def test_recipe_equals_its_golden_dump(name):
    """A changed recipe shows in review: write the new dump with `python -m tests.jobs.write_golden`."""
    dumped = json.dumps(RECIPES[name].config().to_json(), indent=1) + "\n"
    assert dumped == (GOLDEN / f"{name}.json").read_text()


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "demo"])
def test_borders_have_the_colour_of_the_encoder_that_the_recipe_names(name, recwarn):
    run = RECIPES[name].config()
    assert run.other_borders() == []
    assert not [w for w in recwarn if "border colour" in str(w.message)]


def test_other_borders_warn_once_for_each_data_set_that_has_some():
    run = smoke()
    pairs = replace(run.data.train["pairs"], pad_colour=(1, 2, 3))
    data = replace(run.data, train={**run.data.train, "pairs": pairs})
    says = r"data.train.pairs.pad_colour=\(1, 2, 3\) is not the border colour of tiny, \(255, 255, 255\); .*"
    with pytest.warns(UserWarning, match=says + "--data.train.pairs.pad-colour 255 255 255") as caught:
        other = replace(run, data=data)
    assert len(caught) == 1
    assert len(other.other_borders()) == 1
    assert replace(run, data=replace(data, encode_features=True)).other_borders() == []
    stored = replace(pairs, media="features", num_features=16, width=32)
    assert replace(run, data=replace(data, train={"pairs": stored})).other_borders() == []
    found = check_borders(other)
    assert [f.level for f in found] == ["warn"]
    assert found[0].remedy.endswith("--data.train.pairs.pad-colour 255 255 255")
    assert [f.level for f in check_borders(run)] == ["ok"]


@pytest.mark.parametrize("name", [*NAMED, "llama_7b", "mpt_7b"])
def test_configuration_survives_the_run_folder(name, tmp_path):
    config = RECIPES[name].config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert load_run_config(tmp_path) == config


def test_a_run_folder_of_another_version_is_read_where_its_options_are_off(tmp_path):
    config = RECIPES["smoke"].config()
    stated = json.loads(json.dumps(config.to_json()))
    stated["model"]["resampler"]["out_width"] = None
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert load_run_config(tmp_path) == config
    stated["model"]["resampler"]["out_width"] = 2048
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match="out_width"):
        load_run_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "layers", "width", "gated_blocks", "printed"),
    [
        # Table 5 prints 1.4B, 7.1B, 70B of LM, 1.2B, 1.6B, 10B of gated blocks and 194M of Resampler.
        ("flamingo_3b", 24, 2048, 24, {"lm": (1.4, 1), "gated": (1.2, 1)}),
        ("flamingo_9b", 32, 4096, 8, {"lm": (7.1, 1), "gated": (1.6, 1)}),
        ("flamingo_80b", 80, 8192, 12, {"lm": (70, 0), "gated": (10, 0)}),
    ],
)
def test_large_recipes_have_the_papers_counts(name, layers, width, gated_blocks, printed):
    config = RECIPES[name].config()
    with single_process(), torch.device("meta"):
        model = Flamingo(config.model, dtype=torch.bfloat16)
    counts: Counter[str] = Counter()
    for full_name, param in model.named_parameters():
        assert param.device.type == "meta"
        counts["extra" if ".extra" in full_name else full_name.split(".")[0]] += param.numel()
    # Chinchilla's table A9: 13 D^2 a block, of which one is the relative-position matrix, and a tied vocabulary.
    assert counts["lm"] == pytest.approx(13 * layers * width**2 + 32_000 * width, rel=1e-3)
    assert counts["gated"] == pytest.approx(12 * gated_blocks * width**2, rel=1e-3)
    for part, (billions, digits) in printed.items():
        assert round(counts[part] / 1e9, digits) == billions
    # Six layers with heads of 128, and NFNet-F6's channels to the width (docs/language-models.md).
    assert counts["resampler"] == pytest.approx(6 * 1536 * (4 * 2048 + 8 * 1536) + 3072 * 1536, rel=1e-3)
    assert counts["resampler"] == pytest.approx(194e6, rel=0.01)
    # The map to the LM's width, which the paper does not mention, is lost in what table 5 rounds away.
    assert counts["media_map"] == 1536 * width
    assert round((counts["gated"] + counts["media_map"]) / 1e9, printed["gated"][1]) == printed["gated"][0]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(n.startswith("lm.") and ".extra" not in n for n in frozen)


PUBLISHED = {
    "llama_1b": 1_235_814_400,
    "llama_7b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    "qwen_1b": 1_720_574_976,
    "qwen_7b": 7_615_616_512,
    "qwen_70b": 72_706_203_648,
    # Published as 1.3B: 12 D^2 a block, a tied vocabulary, four scales a block and the last norm.
    "mpt_1b": 24 * 12 * 2048**2 + 50_368 * 2048 + (4 * 24 + 1) * 2048,
    "mpt_7b": 6_649_286_656,
    "opt_1b": 1_315_758_080,
    "gpt2_1b": 1_557_611_200,
}
"""Parameters of the public LMs: LLaMA-3.2-1B, 3.1-8B, 3.1-70B, Qwen3-1.7B, Qwen2.5-7B, 2.5-72B, OPT-1.3B, GPT-2 XL."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_recipes_have_the_published_counts(name):
    config = RECIPES[name].config()
    counts = count_parameters(config.model)
    assert counts.frozen_lm == PUBLISHED[name]
    rank = count_parameters(config.model, config.parallel.tensor)
    assert rank.lm_block * config.parallel.tensor == pytest.approx(counts.lm_block, rel=1e-3)


def change(config: RunConfig, **data: object) -> RunConfig:
    pairs = replace(config.data.train["pairs"], **data)
    return replace(config, data=replace(config.data, train={**config.data.train, "pairs": pairs}))


def test_a_degree_that_does_not_divide_the_heads_is_refused_before_any_process():
    config = smoke()
    with pytest.raises(ValueError, match=r"tensor=4 does not divide lm.num_kv_heads=2"):
        replace(config, parallel=replace(config.parallel, tensor=4))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"data.pairs.batch_size=7 .* multiple of the 2 data-parallel ranks"):
        change(smoke(), batch_size=7)


def test_an_image_size_that_is_not_the_encoders_is_refused():
    with pytest.raises(ValueError, match="image_size=64, the vision encoder takes 32"):
        change(smoke(), image_size=64)


def test_augmentation_of_encoded_features_is_refused():
    config = change(smoke(), hflip_p=0.5)
    with pytest.raises(ValueError, match="data.train.pairs augments pixels, but data.encode_features=True"):
        replace(config, data=replace(config.data, encode_features=True))


def test_captions_of_an_unknown_data_set_are_refused():
    config = smoke()
    with pytest.raises(ValueError, match=r"the data set 'nope'; held-out data sets are \['held_out'\]"):
        replace(config, captions=replace(config.captions, dataset="nope"))


def test_held_out_data_sets_are_in_eval_mode():
    config = smoke()
    train_mode: DatasetConfig = replace(config.data.held_out["held_out"], mode="train")
    with pytest.raises(ValueError, match="mode='train'; it must have name='held_out' and mode='eval'"):
        replace(config.data, held_out={"held_out": train_mode})


def test_identity_ignores_what_changes_no_number():
    config = smoke()
    same = replace(
        config,
        name="other",
        train=replace(config.train, steps=99, checkpoint_every=3, keep_checkpoints=9),
        resources=replace(config.resources, max_failures=0),
        parallel=replace(config.parallel, tensor=1, frozen="resident", activation_checkpointing=False),
    )
    assert same.fingerprint() == config.fingerprint()
    for part, value in [
        ("train", replace(config.train, seed=1)),
        ("train", replace(config.train, optimizer=replace(config.train.optimizer, lr=1.0))),
        ("model", replace(config.model, cross_every=1)),
    ]:
        assert replace(config, **{part: value}).fingerprint() != config.fingerprint()


def test_one_held_out_row_a_rank_is_refused():
    config = smoke()
    one = replace(config.data.held_out["held_out"], batch_size=2)
    says = r"data.held_out.held_out.batch_size=2 leaves 1 row for each of the 2 .*; set it to 4 or more"
    with pytest.raises(ValueError, match=says):
        replace(config, data=replace(config.data, held_out={"held_out": one}))


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("shots", -1), ("beams", 0), ("candidates", -1)])
def test_captions_of_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"captions.{name}={value} must be at least"):
        replace(smoke().captions, **{name: value})


def test_probes_without_held_out_data_are_warned_of(recwarn):
    for name in NAMED:
        RECIPES[name].config()
    assert not recwarn.list
    config = smoke()
    nothing = {"data": replace(config.data, held_out={}), "captions": CaptionConfig()}
    replace(config, **nothing)
    assert not recwarn.list, "the end alone needs no setting"
    with pytest.warns(
        UserWarning, match="train.probe_every=5 has no effect: data.held_out names no data set"
    ):
        replace(config, **nothing, train=replace(config.train, probe_every=5))


def test_bf16_without_zero_is_refused():
    config = smoke()
    plain = replace(config, parallel=replace(config.parallel, zero_stage=0, frozen="resident"))
    with pytest.raises(
        ValueError, match="train.dtype='bf16' needs .* at least 1.* Set parallel.zero_stage=1, .*'fp32'"
    ):
        replace(plain, train=replace(config.train, dtype="bf16"))


def test_partitioned_weights_in_int8_are_refused():
    config = smoke()
    assert config.parallel.frozen == "partitioned"
    lm = replace(config.model.lm, weight_storage="int8")
    with pytest.raises(ValueError, match="Set parallel.frozen='resident', or weight_storage='same'"):
        replace(config, model=replace(config.model, lm=lm))
    resident = replace(config, parallel=replace(config.parallel, frozen="resident"))
    stored = replace(resident, model=replace(config.model, lm=lm))
    assert stored.fingerprint() != resident.fingerprint()
    # Checkpoints from before the setting stay valid.
    assert "weight_storage" not in resident.identity()["model"]["lm"]


def test_fp8_products_are_checked_against_what_a_rank_holds():
    config = RECIPES["flamingo_80b"].config()
    fp8 = replace(config.model.lm, weight_storage="fp8", matrix_products="fp8")
    stored = replace(config, model=replace(config.model, lm=fp8))
    kept = replace(config, model=replace(config.model, lm=replace(fp8, matrix_products="same")))
    assert len({config.fingerprint(), kept.fingerprint(), stored.fingerprint()}) == 3
    # Checkpoints from before the setting stay valid.
    assert "matrix_products" not in kept.identity()["model"]["lm"]
    with pytest.raises(ValueError, match="matrix_products='fp8' needs weight_storage='fp8', not 'same'"):
        replace(config.model.lm, matrix_products="fp8")
    narrow = replace(fp8, ffn_width=8 * 4_088)
    with pytest.raises(ValueError, match=r"\[.*4088.*\] on this rank; .* needs multiples of 16"):
        replace(stored, model=replace(config.model, lm=narrow), parallel=replace(config.parallel, tensor=8))


def test_every_setting_is_documented():
    """A docstring stands under every field of every configuration class that a recipe holds."""
    import ast
    import inspect

    seen: set[type] = set()

    def visit(value: object) -> None:
        if dataclasses.is_dataclass(value) and type(value) not in seen:
            kind = type(value)
            seen.add(kind)
            body = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body[0].body
            for node, following in zip(body, [*body[1:], None], strict=True):
                if isinstance(node, ast.AnnAssign):
                    is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert is_text, f"{kind.__name__}.{node.target.id} has no docstring"
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name))
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)

    visit(smoke())
    assert len(seen) > 10


def test_schedules_and_packing_are_settings_of_a_recipe(tmp_path):
    options = ["--data.train.pairs.weight-schedule.points", "0", "1.0", "100", "0.1"]
    options += [
        "--data.train.pairs.pack",
        "4",
        "--data.train.pairs.row-len",
        "64",
        "--resources.workers",
        "2",
    ]
    given = parse_run(RECIPES["smoke"], options, "test").run
    assert given.data.train["pairs"].weight_at(50) == pytest.approx(0.55)
    assert given.data.train["documents"].weight_at(50) == 1.0
    (tmp_path / "config.json").write_text(json.dumps(given.to_json()))
    assert load_run_config(tmp_path) == given
    # A resumed run must go on with the same schedule.
    assert given.identity()["weights"] == {"documents": 1.0, "pairs": [[0, 1.0], [100, 0.1]], "videos": 0.03}
    pairs = dataclasses.replace(given.data.train["pairs"], batch_size=4)
    with pytest.raises(ValueError, match="in rows of 4"):
        replace(given, data=replace(given.data, train={"pairs": pairs}), resources=ResourceConfig(workers=4))
