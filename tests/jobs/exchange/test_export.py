"""A trained run becomes one folder that any tensor-parallel layout reads back to the same logits."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.models.exchange.folder import read_network_config
from flamingo_dist.models.init import tag_of
from flamingo_dist.models.weights.safetensors import SafetensorsSource
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.training.build import build_model
from flamingo_dist.training.checkpoint import CheckpointWriter
from jobs.config import RunConfig
from jobs.evaluate.command import evaluate
from jobs.evaluate.settings import EvaluateArguments
from jobs.exchange import ExportArguments, export_network
from jobs.generate import GenerateArguments, generate_captions
from jobs.network_source import empty_network
from jobs.recipes.smoke import VOCAB, smoke
from tests import tiny
from tests.data_pipeline.servers import flaky_server
from tests.jobs.evaluate import tasks
from tests.jobs.exchange.exchanging import build, rewrite

pytestmark = pytest.mark.distributed
STEPS = 2


def run_config() -> RunConfig:
    base, network = smoke(), tiny.network(gate_init=0.5)
    network = replace(network, lm=replace(network.lm, vocab_size=VOCAB, tied=False))
    sized = {
        part: {n: replace(d, image_size=16) for n, d in getattr(base.data, part).items()}
        for part in ("train", "held_out")
    }
    return replace(
        base,
        model=network,
        train=tiny.train_config(STEPS),
        parallel=ParallelConfig(tensor=2, zero_stage=3, frozen="partitioned"),
        data=replace(base.data, **sized),
    )


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return tiny.forward(model, tiny.batch("docs", 9)).logits_BTV


def train(topology: Topology, folder: str) -> torch.Tensor:
    config = run_config()
    step = tiny.make_step(topology, config.parallel, config.train, config.model)
    for i in range(STEPS):
        step.run(i, tiny.batches(i, topology))
    writer = CheckpointWriter(Path(folder) / "checkpoints", topology, keep=1)
    writer.save(step.engine, STEPS, {"run": config.identity(), "data": {}})
    writer.wait()
    return logits_of(step.engine.module)


def logits_of_ranks(topology: Topology, folder: str) -> torch.Tensor:
    return logits_of(build(folder, topology))


def partitioned_logits(topology: Topology, folder: str) -> torch.Tensor:
    """The folder as the start of a training run, built under `zero.Init`."""
    config = read_network_config(folder)
    parallel = ParallelConfig(tensor=topology.tensor, zero_stage=3, frozen="partitioned")
    return logits_of(tiny.make_step(topology, parallel, config=config).engine.module)


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(run_config().to_json()))
    facts = {"commit": "0123abc", "versions": {"torch": torch.__version__}}
    (folder / "environment.json").write_text(json.dumps(facts))
    (folder / "summary.json").write_text(json.dumps({"grounding_gap_nats": {"held_out": 0.25}}))
    return folder, ranks.run(train, str(folder), world=4, tensor=2)[0]


@pytest.fixture(scope="module")
def exported(run):
    arguments = ExportArguments(
        source=str(run[0]), folder=str(run[0].parent / "exported"), shard_bytes=30_000
    )
    return export_network(arguments)


def test_the_folder_has_the_logits_of_the_run_in_any_layout(ranks, run, exported):
    with single_process() as topology:
        alone = logits_of(build(exported, topology))
    torch.testing.assert_close(alone, run[1], atol=1e-5, rtol=1e-5)
    for found in ranks.run(logits_of_ranks, str(exported), world=2, tensor=2):
        torch.testing.assert_close(found, run[1], atol=1e-5, rtol=1e-5)
    for found in ranks.run(partitioned_logits, str(exported), world=2):
        torch.testing.assert_close(found, run[1], atol=1e-5, rtol=1e-5)
    with single_process() as topology:
        fresh = replace(read_network_config(str(exported)), weights=None)
        other = build_model(fresh, ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=7)
        assert (logits_of(other) - run[1]).abs().max() > 1e-2, "training changed nothing"


def test_files_are_cut_and_indexed_as_hugging_face_does(exported):
    files = sorted(file.name for file in exported.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == SafetensorsSource(str(exported)).shapes().keys()


def test_the_card_says_what_it_is(exported):
    card = (exported / "README.md").read_text()
    for fact in (
        "library_name: flamingo-dist",
        "0123abc",
        "documents",
        "grounding gap",
        '"held_out": 0.25',
        "| steps | 2 |",
    ):
        assert fact in card, fact


def test_a_checkpoint_and_an_exported_folder_can_be_exported_too(run, exported, tmp_path):
    checkpoint = run[0] / "checkpoints" / f"step-{STEPS:08d}"
    for number, source in enumerate((checkpoint, exported)):
        again = export_network(ExportArguments(source=str(source), folder=str(tmp_path / str(number))))
        first, second = SafetensorsSource(str(exported)), SafetensorsSource(str(again))
        assert first.shapes() == second.shapes()
        assert all(torch.equal(first.read(name), second.read(name)) for name in first.shapes())


def test_a_folder_on_a_server_is_read_once_a_job(ranks, run, exported):
    """All ranks look at settings and headers; of the parameters each byte is read once, what is not cut TP times."""
    sent = {}
    with flaky_server(exported, share=0.0) as server:
        for world in (2, 4):
            before = server.bytes_sent
            for found in ranks.run(logits_of_ranks, server.url, world=world, tensor=2):
                torch.testing.assert_close(found, run[1], atol=1e-5, rtol=1e-5)
            sent[world] = server.bytes_sent - before
    sizes = {n: 4 * math.prod(shape) for n, shape in SafetensorsSource(str(exported)).shapes().items()}
    parameters = sum(sizes.values())
    with single_process():
        model = empty_network(run_config().model)
    tags = {name: tag_of(param) for name, param in model.named_parameters()}
    whole = sum(size for name, size in sizes.items() if tags[name].partition_dim is None)
    looked_at = sum(file.stat().st_size for file in exported.glob("*.safetensors")) - parameters
    # A byte more of each small file, to see whether it is there; the settings for the network, and to compare with.
    looked_at += (exported / "model.safetensors.index.json").stat().st_size + 1
    looked_at += 2 * ((exported / "config.json").stat().st_size + 1)
    assert sent[2] == parameters + whole + 2 * looked_at
    assert sent[4] == sent[2] + 2 * looked_at


def test_a_folder_on_a_bad_server_is_exported_and_gives_captions(exported, tmp_path):
    file = tmp_path / "image.png"
    Image.new("RGB", (20, 20), (200, 10, 10)).save(file)
    arguments = GenerateArguments(run=str(exported), image=(str(file),), max_new_tokens=4)
    with flaky_server(exported, share=0.2, faults=("503", "reset", "cut")) as server:
        assert generate_captions(replace(arguments, run=server.url)) == generate_captions(arguments)
        again = export_network(ExportArguments(source=server.url, folder=str(tmp_path / "again")))
        assert server.met["503"] + server.met["reset"] + server.met["cut"] > 0
    for name in ("README.md", "model.safetensors"):
        assert (again / name).is_file()
    assert (again / "README.md").read_text() == (exported / "README.md").read_text()
    first, second = SafetensorsSource(str(exported)), SafetensorsSource(str(again))
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.shapes())


def test_a_url_without_a_network_is_an_error_that_names_it(exported):
    with flaky_server(exported.parent, share=0.0) as server:
        for call in (
            lambda url: export_network(ExportArguments(source=url, folder=str(exported.parent / "none"))),
            lambda url: generate_captions(GenerateArguments(run=url, image=("a.png",))),
        ):
            with pytest.raises(ValueError, match=f"{server.url}/absent is no folder that `flamingo export`"):
                call(f"{server.url}/absent")


def test_captions_come_from_the_folder_alone(run, exported, tmp_path):
    stated = json.loads((exported / "config.json").read_text())
    assert TokenizerConfig(**stated["tokenizer"]) == run_config().data.tokenizer
    file = tmp_path / "image.png"
    Image.new("RGB", (20, 20), (200, 10, 10)).save(file)
    arguments = GenerateArguments(run=str(exported), image=(str(file),), max_new_tokens=8)
    ((path, caption),) = generate_captions(arguments)
    assert path == str(file)
    assert len(caption) == 8, "a byte a token, and none of them ends the text"
    assert generate_captions(replace(arguments, run=str(run[0]))) == [(path, caption)]
    for source in (exported, run[0]):
        assert generate_captions(replace(arguments, run=str(source), tensor=2)) == [(path, caption)]
    beams = replace(arguments, beams=3)
    assert generate_captions(replace(beams, tensor=2)) == generate_captions(beams)
    with pytest.raises(
        ValueError, match=r"parallel.tensor=3 does not divide .*degrees that fit this model: \[1, 2\]"
    ):
        generate_captions(replace(arguments, tensor=3))
    with pytest.raises(
        ValueError, match=rf"{exported}/README.md cannot be shown: corrupt image .*; give image files"
    ):
        generate_captions(replace(arguments, image=(f"{exported}/README.md",)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("resampler.latents"), r"missing \['resampler.latents'\]"),
        (lambda s: s.update(stray=torch.zeros(1)), r"surplus \['stray'\]"),
        (
            lambda s: s.update({"gated.0.gate_attn": torch.zeros(2)}),
            r"gated.0.gate_attn has shape \(2,\) instead of \(1,\)",
        ),
    ],
)
def test_a_wrong_tensor_is_named(run, tmp_path, change, says):
    folder = export_network(ExportArguments(source=str(run[0]), folder=str(tmp_path / "out")))
    rewrite(folder, change)
    with single_process() as topology, pytest.raises(ValueError, match=says):
        build(folder, topology)


@pytest.mark.parametrize(
    ("part", "option", "value", "says"),
    [
        ("resampler", "activation", "relu", "resampler.activation is relu in the run, sqrelu in"),
        ("gated", "norm_eps", 0.1, "gated.norm_eps is 0.1 in the run, 1e-05 in"),
        (
            "lm",
            "rope_base",
            7.0,
            "lm.rope_base is 7 in the run, 10000 in {folder}/config.json; set model.lm.rope_base=",
        ),
        ("gated", "attend_all", True, "gated.attend_all is True in the run, False in"),
    ],
)
def test_another_setting_than_the_folders_is_refused_by_name(exported, part, option, value, says):
    config = read_network_config(str(exported))
    config = replace(config, **{part: replace(getattr(config, part), **{option: value})})
    parallel = ParallelConfig(zero_stage=0)
    with (
        single_process() as topology,
        pytest.raises(ValueError, match=re.escape(says.format(folder=exported))),
    ):
        build_model(config, parallel, topology, dtype=torch.float32, seed=0)


def test_settings_of_a_run_may_be_others_than_the_folders(exported):
    config = read_network_config(str(exported))
    changed = replace(
        config,
        lm=replace(config.lm, weight_storage="int8", extra_like=(1, 2), alibi_max=4.0),
        resampler=replace(
            config.resampler, implementation="reference", latents_std=1.0, shared_feature_kv=True
        ),
        gated=replace(config.gated, gate_init=0.0, implementation="reference"),
        vision_batch=3,
    )
    with single_process() as topology:
        build_model(changed, ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "config.json cannot be read as JSON"),
        ("[]", "config.json holds list"),
        ('{"format": "flamingo-dist", "version": 1}', "config.json states no model"),
    ],
)
def test_a_malformed_config_is_named(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{says}"):
        read_network_config(str(tmp_path))


@pytest.mark.parametrize(
    ("stated", "meant"),
    [
        ("vision/own.npz", "{folder}/vision/own.npz"),
        ("/towers/own.npz", "/towers/own.npz"),
        ("s3://towers/own.npz", "s3://towers/own.npz"),
    ],
)
def test_the_encoders_files_are_inside_the_folder_or_elsewhere(exported, tmp_path, stated, meant):
    config = json.loads((exported / "config.json").read_text())
    config["model"]["vision"]["statistics"] = stated
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_network_config(str(tmp_path)).vision.statistics == meant.format(folder=tmp_path)


def test_what_cannot_be_exported_is_an_error(run, exported, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        export_network(ExportArguments(source=str(run[0]), folder=str(exported)))
    with pytest.raises(ValueError, match="--no-frozen: the language model has no published weights"):
        export_network(ExportArguments(source=str(run[0]), folder=str(tmp_path / "a"), frozen=False))
    with pytest.raises(ValueError, match="vision.name='tiny' does not exist in IDEFICS"):
        export_network(ExportArguments(source=str(run[0]), folder=str(tmp_path / "b"), to="idefics"))
    with pytest.raises(ValueError, match="holds no run"):
        export_network(ExportArguments(source=str(tmp_path), folder=str(tmp_path / "c")))
    assert not list(tmp_path.glob("*"))


def test_a_run_and_its_folder_have_the_same_evaluation(run, exported, tmp_path):
    shards = tasks.write(tmp_path / "shards", range(5))
    given = EvaluateArguments(
        run=str(run[0]), task="caption", queries=(shards,), support=(shards,), shots=(0, 2), max_new_tokens=5
    )
    outcome = evaluate(given)
    assert outcome.folder.parent == run[0] / "evaluations"
    result = json.loads((outcome.folder / "result.json").read_text())
    assert Path(result["checkpoint"]).name == f"step-{STEPS:08d}"
    assert [row["count"] for row in result["results"]] == [5, 5]
    again = evaluate(replace(given, run=str(exported), out=str(tmp_path / "out"), tensor=2))
    said = [[(line["key"], line["answer"]) for line in found.predictions] for found in (outcome, again)]
    assert said[0] == said[1]
    assert evaluate(replace(given, batch=1)).folder == outcome.folder
