"""The stages on a whole run, their graphs run in this process: what they hand on and refuse."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from fake_hub import FakeHub, cache_dataset, commit, fake_hub, next_process
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model
from support import save_tiny_llama, string_pairs, write_jsonl
from transformers import AutoModelForCausalLM

from refscale import pipeline
from refscale.cli import main
from refscale.cluster.room import require_replicas
from refscale.cluster.runtime import ClusterInfo
from refscale.cluster.trainer import worker_env
from refscale.config import dump_config, parse_config
from refscale.errors import ConfigError, CorpusError, FingerprintError, TooManyRefusedError
from refscale.experiments.comparison import _fitting
from refscale.lineage import require_encoding, require_reference, weights_of
from refscale.run import Run, claim
from refscale.scoring.reference import EncodedPairs, ReferenceModel
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store


@pytest.fixture
def made(tiny_model, tmp_path, monkeypatch):
    """Makes the run of 40 pairs in two sources, sections changed; graphs run in this process."""

    def run_here(items, steps, **_options):
        runs = [step.run(**step.options) if step.options else step.run for step in steps]
        for item in items:
            for run in runs:
                item = run(item)
            yield item

    monkeypatch.setattr(pipeline, "run_graph", run_here)
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", string_pairs(20, seed=i)) for i in range(2)]
    with paths[1].open("a") as file:
        file.write("not json\n")
    sections = {
        "model": {"model_name_or_path": str(tiny_model)},
        "corpus": {"sources": [{"path": str(path)} for path in paths], "shard_pairs": 10},
    }

    def make(**changes):
        changed = parse_config({**sections, **changes})
        here = ClusterInfo(embedded=True, cpus=4, gpus=0, nodes=1, physical_cores=1)
        return Run(Store(tmp_path / "run"), changed, _cluster=here)

    return make


def finish(folder, fingerprint, files=()):
    """A stage that is done; its identity."""
    folder.begin(fingerprint)
    return folder.finish(fingerprint, files, counts={}, seconds=1)["identity"]


def upload_policy(run, model, *, beta=0.1):
    """The model as the policy of a training on the selection that is there."""
    policy = run.folder("policy")
    made_from = {
        "selection": run.folder("selection").require()["identity"],
        "train": {"beta": beta},
    }
    policy.begin(made_from)
    run.store.upload_folder(str(model), "policy")
    finish(policy, made_from, policy.adopt())


def test_damaged_refusals_are_read_again_and_the_corpus_stays(made):
    run = made()
    before = pipeline.prepare(run)
    shards = [run.store.path(f"corpus/{file['name']}") for file in before["files"]]
    written = [os.stat(path).st_mtime_ns for path in shards]
    refused = run.folder("quarantine").require()
    (name,) = (file["name"] for file in refused["files"] if file["rows"])
    run.store.write_bytes(f"quarantine/{name}", b"damaged")
    assert pipeline.prepare(run)["identity"] == before["identity"]
    assert run.folder("quarantine").require()["identity"] == refused["identity"]
    assert [os.stat(path).st_mtime_ns for path in shards] == written


def test_a_finished_corpus_is_held_to_the_fraction_that_is_asked_now(made):
    before = pipeline.prepare(made())  # of 41 rows one is refused
    sources = made().config.corpus.model_dump()
    for fraction in (0.01, 0):
        with pytest.raises(TooManyRefusedError, match=r"1 of 41 rows .*max_bad_fraction is 0"):
            pipeline.prepare(made(corpus={**sources, "max_bad_fraction": fraction}))
    again = pipeline.prepare(made(corpus={**sources, "max_bad_fraction": 0.03}))
    assert again["finished"] == before["finished"]


@pytest.mark.parametrize("renamed", [False, True], ids=["unchanged", "planned"])
def test_fragments_that_a_kill_left_beside_a_finished_corpus_go(made, monkeypatch, renamed):

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.prepare(made())
    run = made()
    assert run.folder("corpus").manifest() and run.store.exists("corpus/fragments")
    if renamed:  # what the config says differs, not what is read
        corpus = run.config.corpus
        named = [{"path": s.path, "name": f"{i}"} for i, s in enumerate(corpus.sources)]
        run = made(corpus={**corpus.model_dump(), "sources": named})
        assert pipeline.planning.unchanged(run.config, run.folder("corpus").manifest()) is None
    pipeline.prepare(run)
    assert not run.store.exists("corpus/fragments")


def test_the_seconds_of_a_preparing_that_broke_off_count(made, monkeypatch):

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.fragments, "merge_bucket", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.prepare(made())
    claim = made().store.path("corpus/STAGE.json")
    at = os.stat(claim).st_mtime - 1000
    os.utime(claim, (at, at))
    assert 1000 < pipeline.prepare(made())["seconds"] < 1100


def test_a_corpus_without_a_pair_is_not_finished(made):
    sources = [{**source.model_dump(), "weight": 1e-9} for source in made().config.corpus.sources]
    corpus = {"sources": sources, "max_bad_fraction": 1}
    with pytest.raises(CorpusError, match="no pair is left of the 41 rows: 1 were refused, 40"):
        pipeline.prepare(made(corpus=corpus))


def test_what_was_scored_is_what_training_starts_from(made, tmp_path):
    run = made()
    prepared = pipeline.prepare(run)
    scored = {"corpus": prepared["identity"], **weights_of(run.config.model)}
    finish(run.folder("selection"), {"scores": finish(run.folder("scores"), scored)})
    longer = made(encoding={"max_length": 512})
    for stage in (pipeline.score, pipeline.train):
        with pytest.raises(FingerprintError, match=r"encoding\.max_length = 1024, now it is 512"):
            stage(longer)
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    templated = {"chat_template": str(tmp_path / "template.jinja")}
    other = save_tiny_llama(tmp_path / "other", seed=1)
    foreign = shutil.copytree(other, tmp_path / "foreign")
    (foreign / "tokenizer_config.json").write_text("{}")
    for model, what in ((templated, "chat_template"), ({"model_name_or_path": str(foreign)}, "")):
        for stage in (pipeline.score, pipeline.train):
            with pytest.raises(
                FingerprintError, match=rf"made with tokenizer\..*{what}.* = .*, now"
            ):
                stage(made(model={**run.config.model.model_dump(), **model}))
    with pytest.raises(FingerprintError, match=r"another model: model\.model\.safetensors was"):
        pipeline.train(made(model={"model_name_or_path": str(other)}))
    assert prepared["rows"] and not run.store.exists("training")


def test_a_sample_of_the_holdout_is_evaluated_in_one_dtype(made, tiny_model, capsys):
    corpus = {**made().config.corpus.model_dump(), "holdout_fraction": 0.5}
    evaluate = {"max_pairs": 4}
    in_float32 = {**made().config.model.model_dump(), "dtype": "float32"}
    run = made(corpus=corpus, evaluate=evaluate, model=in_float32)
    pipeline.prepare(run)
    scored = pipeline.score(run)["identity"]
    finish(run.folder("selection"), {"scores": scored})
    upload_policy(run, tiny_model)
    capsys.readouterr()
    assert pipeline.evaluate(run)["rows"] == 4
    assert "evaluate  4 of 4 pairs" in capsys.readouterr().err
    in_bf16 = made(
        corpus=corpus,
        evaluate=evaluate,
        model={**in_float32, "dtype": "bfloat16"},
    )
    with pytest.raises(FingerprintError, match="dtype = float32, now it is bfloat16"):
        pipeline.evaluate(in_bf16)
    in_bf16.restart = frozenset({"evaluate"})
    pipeline.evaluate(in_bf16)
    assert "scored in float32 and the policy is in bfloat16" in capsys.readouterr().err


def test_rewards_have_the_beta_of_the_training_whatever_the_config_says_now(made, tmp_path):
    corpus = {**made().config.corpus.model_dump(), "holdout_fraction": 0.5}
    run = made(corpus=corpus, train={"beta": 0.1})
    pipeline.prepare(run)
    finish(run.folder("selection"), {"scores": pipeline.score(run)["identity"]})
    upload_policy(run, save_tiny_llama(tmp_path / "policy", seed=1), beta=0.05)
    evaluated = pipeline.evaluate(run)
    assert evaluated["fingerprint"]["beta"] == evaluated["details"]["beta"] == 0.05
    files = [file["name"] for file in evaluated["files"] if file["rows"]]
    rows = [row for name in files for row in run.folder("evaluation").read_table(name).to_pylist()]
    sides = ("policy_chosen", "ref_chosen", "policy_rejected", "ref_rejected")
    margins = [np.dot([1, -1, -1, 1], [row[f"{side}_logps"] for side in sides]) for row in rows]
    found = evaluated["details"]["overall"]["reward_margin"]["after"]["value"]
    assert found == pytest.approx(0.05 * np.mean(margins), rel=1e-5) and found
    again = pipeline.evaluate(made(corpus=corpus, train={"beta": 0.3}))
    assert again["finished"] == evaluated["finished"]


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_a_quantised_reference_is_said_to_differ_from_the_policy(
    tmp_path, monkeypatch, capsys, quantization
):
    scored_with = []

    def score_shards(_run, _label, settings, *_rest):
        scored_with.append(settings.quantization)
        return []

    monkeypatch.setattr(Run, "cluster", SimpleNamespace(embedded=False, gpus=0))
    monkeypatch.setattr(pipeline, "_score_shards", score_shards)
    store, before = Store(tmp_path), {}
    for stage in ("corpus", "scores", "selection", "policy"):
        common = {"dtype": "float32", "quantization": quantization, "train": {"beta": 0.1}}
        fingerprint = {**common, **before}
        before = {stage: finish(StageFolder(store, stage), fingerprint)}
    config = parse_config(
        {
            "model": {"model_name_or_path": "m", "dtype": "float32"},
            "corpus": {"sources": [{"path": "a.jsonl"}]},
        }
    )
    pipeline.evaluate(Run(store, config))
    said = " ".join(capsys.readouterr().err.split())
    assert ("its margins also hold the error of that" in said) == (quantization is not None)
    assert f"scored in {quantization} and the policy is not" in said or quantization is None
    assert scored_with == [None]


@pytest.mark.parametrize(
    ("redone", "names"),
    [
        ("corpus", r"scores/ was made from another corpus/.*`refscale score --restart`"),
        ("scores", r"selection/ was made from another scores/.*`refscale select --restart`"),
        ("selection", r"policy/ was made from another selection/.*`refscale train --restart`"),
    ],
)
def test_stages_that_were_not_made_from_each_other_are_not_joined(made, redone, names):
    run, before = made(), {}
    stages = ("corpus", "scores", "selection", "policy")
    for stage in stages:
        before = {stage: finish(run.folder(stage), before)}
    folder = run.folder(redone)
    again = {**folder.require()["fingerprint"], "changed": True}
    folder.begin(folder.require()["fingerprint"], restart=True)
    folder.finish(again, [], counts={}, seconds=1)
    follow = {"corpus": pipeline.select, "scores": pipeline.train, "selection": pipeline.evaluate}
    for stage in {follow[redone], pipeline.evaluate}:
        with pytest.raises(FingerprintError, match=names):
            stage(run)
    assert not run.store.exists("evaluation")


@pytest.mark.parametrize(
    ("ray", "lacks"),
    [
        ({"replicas": 4}, "5 CPUs and 0 GPUs"),
        ({"replicas": 1, "cpus_per_task": 4}, "5 CPUs and 0 GPUs"),
        ({"replicas": 1, "gpus_per_replica": 2}, "2 CPUs and 2 GPUs"),
    ],
    ids=str,
)
def test_replicas_that_never_fit_are_refused_at_once(made, capsys, ray, lacks):
    run = made(ray=ray)
    gpus = run.gpus(run.config.ray.gpus_per_replica)
    with pytest.raises(ConfigError, match=rf"take {lacks}, and do not fit: Ray has 4 and 0"):
        require_replicas(run.config.ray, run.cluster, gpus, "score")
    run._cluster = replace(run._cluster, embedded=False)
    require_replicas(run.config.ray, run.cluster, gpus, "score")
    assert f"{lacks}, and do not fit: Ray has 4 and 0; waiting for nodes" in " ".join(
        capsys.readouterr().err.split()
    )


def test_nodes_that_came_since_the_driver_connected_are_counted(made, monkeypatch, capsys):
    run = made(
        train={"num_workers": 2},
        ray={"gpus_per_replica": 0, "gpus_per_worker": 1, "cpus_per_worker": 3},
    )
    run._cluster = ClusterInfo(embedded=False, cpus=0, gpus=0, nodes=1, physical_cores=1)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 32.0, "GPU": 8.0})
    pipeline.prepare(run)
    pipeline.score(run)
    assert "do not fit" not in capsys.readouterr().err
    assert _fitting(run) == 4
    on_cpus = made(train={"num_workers": 2}, ray={"gpus_per_worker": 0, "cpus_per_worker": 3})
    on_cpus._cluster = run._cluster
    assert _fitting(on_cpus) == 4
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    assert _fitting(on_cpus) == 1


@pytest.mark.parametrize(
    ("asked", "gpus", "device", "hidden"),
    [(0, 8, "cpu", True), (None, 8, "auto", False), (0.5, 8, "auto", False), (0, 0, "cpu", False)],
)
def test_who_is_given_no_gpu_uses_none(made, asked, gpus, device, hidden):
    run = made(ray={"gpus_per_replica": asked, "gpus_per_worker": asked})
    run._cluster = replace(run._cluster, gpus=gpus)
    assert pipeline._scorer_settings(run, run.config.model).device == device
    env = worker_env(run.gpus(run.config.ray.gpus_per_worker), gpus)
    assert env == ({"env_vars": {"CUDA_VISIBLE_DEVICES": ""}} if hidden else {})


def test_a_cluster_without_gpus_now_is_said_with_the_keys_to_set(made, capsys):
    here = replace(made()._cluster, embedded=False)
    for ray, keys in (
        ({}, ["gpus_per_replica", "gpus_per_worker"]),
        ({"gpus_per_replica": 1}, ["gpus_per_worker"]),
        ({"gpus_per_replica": 0, "gpus_per_worker": 0}, []),
    ):
        run = made(ray=ray)
        run._cluster = here
        for _ in range(2):
            for asked in (run.config.ray.gpus_per_replica, run.config.ray.gpus_per_worker):
                run.gpus(asked)
        said = capsys.readouterr().err
        assert [line.split()[2] for line in said.splitlines() if ": 1" in line] == [
            f"{key}:" for key in keys
        ]
        assert said.count("NO GPU") == bool(keys)


@pytest.fixture
def trained_with(monkeypatch):
    """The settings that trainings were started with, none of which was run."""
    seen = []

    def train(settings, folder, *_arguments, **_options):
        seen.append(settings)
        folder.store.write_bytes(folder.file("log.jsonl"), b'{"step": 1, "loss": 0.5}\n')
        return {"steps": 1, "train_loss": 0.5}

    monkeypatch.setattr(pipeline, "train_on_ray", train)
    return seen


def test_scores_name_the_commit_that_scored_and_training_starts_from_it(
    made, tmp_path, monkeypatch, tiny_model, trained_with
):
    hub = fake_hub(monkeypatch, tmp_path / "hub")
    folders = {"a": tiny_model}
    for seed, letter in enumerate("bc", start=1):
        folders[letter] = save_tiny_llama(tmp_path / letter, seed=seed)
    for letter, folder in folders.items():
        hub.download("org/m", letter, folder)
    # The driver's cache has the old main, which it was enough to ask for.
    hub.cache_main("org/m", "a")
    pushed = hub.push("org/m", "b")
    run = made(model={"model_name_or_path": "org/m", "dtype": "float32"})
    prepared = pipeline.prepare(run)
    assert prepared["fingerprint"]["tokenizer"] == {"commit": pushed}
    assert pipeline.preparation.plan(run.config).encoder.revision == pushed
    later = hub.push("org/m", "c")
    next_process(monkeypatch)
    hub.cache_main("org/m", "a")
    scored = pipeline.score(run)
    assert scored["fingerprint"]["model"] == {"commit": pushed}
    name = scored["files"][0]["name"]
    pairs = EncodedPairs.from_table(run.folder("corpus").read_table(name))
    model = ReferenceModel.load(str(folders["b"]), dtype="float32", device="cpu")
    sums = run.folder("scores").read_table(name)["ref_chosen_logps"].to_numpy()
    # Sums near -100 in float32, in other batches perhaps; the other models' are nats away.
    np.testing.assert_allclose(sums, model.score(pairs).chosen_logps, atol=1e-3)

    pipeline.select(run)
    next_process(monkeypatch)
    pipeline.train(run)
    assert [settings.revision for settings in trained_with] == [pushed]
    pinned = {"model_name_or_path": "org/m", "dtype": "float32", "revision": later}
    with pytest.raises(FingerprintError, match=f"tokenizer.commit = {pushed}, now it is {later}"):
        pipeline.train(made(model=pinned))
    next_process(monkeypatch)
    with pytest.raises(FingerprintError, match=f"tokenizer.commit = {pushed}, now it is {later}"):
        pipeline.prepare(made(model=pinned))


@pytest.mark.parametrize("finished", [True, False])
def test_scoring_goes_on_with_the_adapter_that_it_began_with(
    made, tmp_path, monkeypatch, tiny_model, finished
):
    hub = fake_hub(monkeypatch, tmp_path / "hub")
    for letter in "ab":
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(base, lora).save_pretrained(tmp_path / letter)
        hub.download("org/lora", letter, tmp_path / letter)

    def make(adapter="org/lora"):
        return made(model={"model_name_or_path": str(tiny_model), "adapter": adapter})

    old = hub.push("org/lora", "a")
    pipeline.prepare(make())
    if finished:
        before = pipeline.score(make())["identity"]
    else:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.shard_scoring, "publish_scores", lambda _: lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pipeline.score(make())
    new = hub.push("org/lora", "b")
    next_process(monkeypatch)
    scored = pipeline.score(make())
    assert scored["fingerprint"]["adapter"] == {"commit": old}
    assert not finished or scored["identity"] == before
    # What the config names is what it means, and --restart asks anew.
    with pytest.raises(FingerprintError, match=rf"adapter\.commit = {old}, now it is {new}"):
        pipeline.score(make(f"org/lora@{new}"))
    anew = make()
    anew.restart = frozenset({"score"})
    assert pipeline.score(anew)["fingerprint"]["adapter"] == {"commit": new}


@pytest.mark.parametrize(("preset", "said"), [("zero2", False), ("zero2_offload", True)])
def test_an_offloaded_optimizer_is_told_of_its_threads(made, trained_with, capsys, preset, said):
    run = made(train={"deepspeed": preset}, ray={"cpus_per_worker": 3})
    for stage in (pipeline.prepare, pipeline.score, pipeline.select, pipeline.train):
        stage(run)
    line = "the optimizer's step, with 3 thread(s) in each worker: ray.cpus_per_worker sets how"
    assert (line in capsys.readouterr().err) == said
    assert len(trained_with) == 1


@pytest.fixture
def on_hub(made, tmp_path, monkeypatch, tiny_model):
    """The hub with model org/m and dataset org/d at commits a; makes runs of them."""
    import datasets

    from refscale.corpus import hf_datasets

    hub = fake_hub(monkeypatch, tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in string_pairs(20)]

    def downloaded(models, dataset):
        """The machine's caches hold these commits and no others."""
        for folder in ("hub", "datasets"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        hf_datasets._load_dataset.cache_clear()
        for letter in models:
            hub.download("org/m", letter, tiny_model)
        if dataset:
            cache_dataset(tmp_path / "datasets", dataset, rows)

    def pushed(letter):
        hub.push("org/m", letter)
        hub.push("org/d", letter)
        next_process(monkeypatch)

    def make(*, revision=None, model=None, restart=()):
        source = {"dataset": "org/d", "revision": revision}
        run = made(
            model={"model_name_or_path": "org/m", "revision": model},
            corpus={"sources": [source], "shard_pairs": 10},
        )
        run.restart = frozenset(restart)
        return run

    pushed("a")
    downloaded("a", "a")
    yield SimpleNamespace(hub=hub, pushed=pushed, downloaded=downloaded, make=make)
    hf_datasets._load_dataset.cache_clear()


def commits(manifest):
    """Of the tokenizer and of the first source."""
    found = manifest["fingerprint"]
    return found["tokenizer"]["commit"], found["sources"][0]["contents"]["commit"]


@pytest.mark.parametrize("finished", [True, False])
def test_preparing_goes_on_with_the_commits_that_it_began_with(on_hub, monkeypatch, finished):
    if finished:
        before = pipeline.prepare(on_hub.make())["identity"]
    else:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.fragments, "merge_bucket", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pipeline.prepare(on_hub.make())
    on_hub.pushed("b")
    prepared = pipeline.prepare(on_hub.make())
    assert commits(prepared) == (commit("a"), commit("a"))
    assert not finished or prepared["identity"] == before
    # What the config names is what it means, and --restart asks anew.
    differs = f"commit = {commit('a')}, now it is {commit('b')}"
    on_hub.downloaded("ab", "a")
    with pytest.raises(FingerprintError, match=rf"tokenizer\.{differs}"):
        pipeline.prepare(on_hub.make(model=commit("b")))
    on_hub.downloaded("ab", "b")
    with pytest.raises(FingerprintError, match=rf"sources\.0\.contents\.{differs}"):
        pipeline.prepare(on_hub.make(revision=commit("b")))
    redone = pipeline.prepare(on_hub.make(restart=["prepare"]))
    assert commits(redone) == (commit("b"), commit("b"))


def test_a_finished_corpus_needs_neither_the_hub_nor_a_cache(on_hub, monkeypatch):
    prepared = pipeline.prepare(on_hub.make())
    on_hub.downloaded("", "")
    next_process(monkeypatch)
    on_hub.hub.failing = lambda: HfHubHTTPError("slow down", response=FakeHub.response(429))
    run = on_hub.make()
    assert pipeline.prepare(run)["identity"] == prepared["identity"]
    # Nor do the stages that build on it, before a model is loaded.
    require_encoding(run.config, prepared)
    scored = {"model": prepared["fingerprint"]["tokenizer"], "adapter": None}
    assert require_reference(run.config, {"fingerprint": scored}).revision == commit("a")


@pytest.mark.parametrize("loss", ["deleted", "damaged", "garbled"])
def test_a_finished_training_stays_finished_whatever_becomes_of_its_checkpoints_and_log(
    made, trained_with, loss
):
    run = made()
    for stage in (pipeline.prepare, pipeline.score, pipeline.select, pipeline.train):
        stage(run)
    before = pipeline.report(run)["training"]
    assert before["finished"] and before["num_logged"] == 1
    if loss == "deleted":
        run.store.delete("training")
    else:
        bad = b'{"step": 1, "loss": 0.1}\n' if loss == "damaged" else b"\xff{"
        run.store.write_bytes("training/log.jsonl", bad)
    for _ in range(2):
        pipeline.train(run)
        training = pipeline.report(run)["training"]
        assert training["finished"] and training["metrics"] == before["metrics"]
        assert training["num_logged"] == 0 and training["last_step"] == 1
    assert len(trained_with) == 1
    assert run.store.exists("training") == (loss != "deleted")
    run.restart = frozenset({"train"})
    pipeline.train(run)
    assert len(trained_with) == 2
    assert pipeline.report(run)["training"]["num_logged"] == 1


@pytest.fixture
def reported(made, tmp_path):
    """Reports on the run with another config than `made` gives; exit code and the config shown."""
    other = tmp_path / "other.yaml"
    config = made(select={"fraction": 0.25}, train={"seed": 7}).config
    other.write_text(dump_config(config))
    store = made().store

    def report():
        code = main(["report", str(other), "--run-dir", store.uri])
        return code, store.read_json("report.json")["config"] if code == 0 else None

    return report


def test_a_report_shows_and_leaves_the_config_that_the_stages_were_made_with(made, reported):
    run = made()
    claim(run)
    before = run.store.read_bytes("config.yaml")
    assert reported() == (0, run.config.model_dump(mode="json"))
    assert run.store.read_bytes("config.yaml") == before


def test_a_report_on_an_empty_folder_is_of_the_config_given(made, reported):
    code, config = reported()
    assert code == 0 and config["select"]["fraction"] == 0.25 and config["train"]["seed"] == 7
    assert yaml.safe_load(made().store.read_bytes("config.yaml")) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [("model: {", "config.yaml is not YAML"), ("selct: {}", "unknown key selct; did you mean")],
    ids=["broken", "unknown"],
)
def test_a_config_of_the_run_that_cannot_be_read_is_named(made, reported, capsys, text, said):
    run = made()
    claim(run)
    header = run.store.read_bytes("config.yaml").partition(b"\n")[0]
    run.store.write_bytes("config.yaml", header + b"\n" + text.encode())
    assert reported() == (2, None)
    err = " ".join(capsys.readouterr().err.split())
    assert f"{run.store.uri}/config.yaml" in err and said in err
    assert "any stage's command writes it anew" in err
    assert not run.store.exists("report.html")
