"""Fingerprints: digests, differences, hashes of models, commits of what is on the hub."""

import httpx2
import pytest
from fake_hub import FakeHub, cache_dataset, commit, fake_hub, next_process
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
)

from refscale.config import ModelConfig, Source
from refscale.corpus import hf_datasets
from refscale.corpus.encoding import EncoderSettings, tokenizer_fingerprint
from refscale.corpus.sources import contents, locate
from refscale.errors import CorpusError, StorageError
from refscale.lineage import pinned_model, weights_of
from refscale.scoring.loading import merge_adapter
from refscale.storage.fingerprints import (
    digest,
    file_sha256,
    first_difference,
    hub_commit,
    model_fingerprint,
)


def test_first_difference_names_the_nested_field():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert first_difference({"a": 1}, {"a": 1, "c": 2}) == ("c", "absent", 2)
    assert first_difference({"a": 1}, {"a": 1})[0] == ""
    sources = [{"name": "x", "contents": {"a.jsonl": "1"}}, {"name": "y"}]
    changed = [{"name": "x", "contents": {"a.jsonl": "2"}}, {"name": "y"}]
    found = first_difference({"sources": sources}, {"sources": changed})
    assert found == ("sources.0.contents.a.jsonl", "1", "2")
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", [1], [1, 2])


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_model_fingerprint_follows_the_weights_and_not_their_place(model):
    before = model_fingerprint(str(model), None)
    # sha256 of b"weights"
    assert before["model.safetensors"].startswith("9a129038")
    moved = model.rename(model.with_name("moved"))
    assert model_fingerprint(str(moved), None) == before
    (moved / "model.safetensors").write_bytes(b"Weights")
    assert first_difference(before, model_fingerprint(str(moved), None))[0] == "model.safetensors"


def test_the_code_of_a_model_is_part_of_it(model):
    plain = model_fingerprint(str(model), None)
    assert set(plain) == {"config.json", "model.safetensors"}
    (model / "modeling_x.py").write_text("wrong")
    before = model_fingerprint(str(model), None)
    assert {**plain, "modeling_x.py": before["modeling_x.py"]} == before
    (model / "modeling_x.py").write_text("corrected")
    assert first_difference(before, model_fingerprint(str(model), None))[0] == "modeling_x.py"


def test_the_code_of_a_tokenizer_is_part_of_it_and_the_models_is_not(model):
    settings = EncoderSettings(str(model), None, True, None, 64, "keep_start")
    (model / "tokenizer.json").write_text("{}")
    (model / "modeling_x.py").write_text("any")
    plain = tokenizer_fingerprint(settings)
    assert set(plain) == {"tokenizer.json"}
    (model / "tokenization_x.py").write_text("wrong")
    before = tokenizer_fingerprint(settings)
    (model / "tokenization_x.py").write_text("corrected")
    assert set(before) == {"tokenizer.json", "tokenization_x.py"}
    assert first_difference(before, tokenizer_fingerprint(settings))[0] == "tokenization_x.py"


def test_hash_is_remembered_until_the_file_changes(model, monkeypatch):
    path = model / "model.safetensors"
    first = file_sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed again"))
        assert file_sha256(path) == first
    path.write_bytes(b"other weights")
    assert file_sha256(path) != first


def test_folder_without_weights_is_refused(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(StorageError, match="holds no"):
        model_fingerprint(str(model), None)


# -- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return fake_hub(monkeypatch, tmp_path / "hub")


def test_the_hub_says_what_main_is_and_not_the_cache_of_this_machine(hub, model, capsys):
    hub.download("org/m", "a", model)
    ref = hub.cache_main("org/m", "a")
    hub.push("org/m", "b")
    assert model_fingerprint("org/m", None) == {"commit": commit("b")}
    assert capsys.readouterr().err == f"hub       org/m: main is commit {commit('b')}\n"
    # Loading by commit does not tell the cache, and offline it is all there is.
    assert ref.read_text() == commit("b")


def test_a_push_in_the_middle_of_a_process_changes_nothing_it_loads(hub, monkeypatch):
    before = hub.push("org/m", "a")
    assert hub_commit("org/m", None) == before
    after = hub.push("org/m", "b")
    assert hub_commit("org/m", None) == hub_commit("org/m", before) == before
    next_process(monkeypatch)
    assert hub_commit("org/m", None) == after


@pytest.mark.parametrize(
    "error",
    [
        lambda: OfflineModeIsEnabled("offline"),
        lambda: httpx2.ConnectError("no route"),  # no OSError
        lambda: httpx2.ReadTimeout("slow"),
        lambda: HfHubHTTPError("down", response=FakeHub.response(503)),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_without_the_hub_the_cache_says_what_main_is(hub, tmp_path, capsys, error, file):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / file).write_text("{}")
    hub.download("org/m", "a", tmp_path / "files")
    hub.cache_main("org/m", "a")
    hub.failing = error
    for _ in range(2):
        assert model_fingerprint("org/m", None) == {"commit": commit("a")}
    assert hub_commit("org/m", commit("a")) == commit("a")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hub       org/m: main is commit {commit('a')} in this machine's cache")
    assert f"({type(error()).__name__})" in line
    with pytest.raises(StorageError, match="neither a folder nor a hub model"):
        hub_commit("org/m", commit("b"))


def test_what_the_hub_refuses_is_not_taken_from_the_cache(hub, model):
    hub.download("org/m", "a", model)
    hub.cache_main("org/m", "a")
    with pytest.raises(StorageError, match=r"neither .* that can be reached \(RevisionNotFound"):
        model_fingerprint("org/m", None)
    hub.failing = lambda: GatedRepoError("ask", response=hub.response(403))
    with pytest.raises(StorageError, match="GatedRepoError"):
        model_fingerprint("org/m", None)


def test_what_is_no_hub_id_is_said_like_a_model_that_is_not_there(tmp_path):
    """With the real HfApi, which refuses names and knows that tests are offline."""
    for name, error in ((str(tmp_path / "absent"), "HFValidationError"), ("o/m", "OfflineMode")):
        with pytest.raises(StorageError, match=f"neither a folder nor a hub model .*{error}"):
            model_fingerprint(name, None)


def test_a_model_stays_at_the_commit_of_an_earlier_stage_unless_the_config_names_another(
    hub, model
):
    old, old_adapter = hub.push("org/m", "a"), hub.push("org/lora", "c")
    config = ModelConfig(model_name_or_path="org/m", adapter="org/lora")
    scored = weights_of(pinned_model(config))
    new, new_adapter = hub.push("org/m", "b"), hub.push("org/lora", "d")
    assert scored == {"model": {"commit": old}, "adapter": {"commit": old_adapter}}
    pinned = pinned_model(config, scored)
    assert (pinned.revision, pinned.adapter) == (old, f"org/lora@{old_adapter}")
    assert weights_of(pinned) == scored
    named = ModelConfig(model_name_or_path="org/m", revision=new, adapter=f"org/lora@{new_adapter}")
    assert pinned_model(named, scored) == named
    # Commits of one repository are not looked for in another.
    hub.push("org/other", "e")
    other = config.model_copy(update={"model_name_or_path": "org/other"})
    assert pinned_model(other, scored).revision == commit("e")


@pytest.mark.parametrize(
    "error",
    [
        lambda: httpx2.ConnectError("no route"),
        lambda: HfHubHTTPError("too many requests", response=FakeHub.response(429)),
    ],
)
def test_an_outage_leaves_a_model_at_its_commit_and_the_machine_needs_no_cache(
    hub, monkeypatch, capsys, error
):
    old = hub.push("org/m", "a")
    config = ModelConfig(model_name_or_path="org/m")
    scored = weights_of(pinned_model(config))
    hub.push("org/m", "b")
    next_process(monkeypatch)
    hub.failing = error
    assert weights_of(pinned_model(config, scored)) == scored
    assert f"org/m stays at commit {old}: model 'org/m' is neither" in capsys.readouterr().err
    named = config.model_copy(update={"revision": old})
    assert weights_of(pinned_model(named, scored)) == scored
    for other in (config, config.model_copy(update={"revision": "b"})):
        with pytest.raises(StorageError, match="neither a folder nor a hub model"):
            pinned_model(other, None if other is config else scored)


def test_folders_have_no_commit(hub, model):
    config = ModelConfig(model_name_or_path=str(model), adapter=str(model))
    assert pinned_model(config, {"model": {"commit": commit("a")}}) == config
    at = model.rename(model.with_name("m@b"))
    assert "model.safetensors" in model_fingerprint(str(at), None)
    assert hub.asked == []


def test_an_adapter_is_merged_at_its_commit(hub, tmp_path, tiny_model):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_model)

    def merged(adapter):
        return merge_adapter(base(), adapter).model.layers[0].self_attn.q_proj.weight

    for seed, letter in enumerate("ab"):
        torch.manual_seed(seed)
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(base(), lora).save_pretrained(tmp_path / letter)
        hub.download("org/lora", letter, tmp_path / letter)
    hub.push("org/lora", "b")
    config = ModelConfig(model_name_or_path=str(tiny_model), adapter="org/lora")
    pinned = pinned_model(config)
    assert weights_of(pinned)["adapter"] == {"commit": commit("b")}
    hub.cache_main("org/lora", "a")  # what another machine would load without a commit
    ours, theirs = merged(pinned.adapter), merged(str(tmp_path / "b"))
    assert torch.equal(ours, theirs) and not torch.equal(ours, merged(str(tmp_path / "a")))


@pytest.fixture
def cached_dataset(tmp_path, monkeypatch):
    """Puts rows into the cache of `datasets` as a commit of the hub dataset org/d."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    hf_datasets._load_dataset.cache_clear()

    def put(letter, count):
        cache_dataset(tmp_path / "datasets", letter, [{"prompt": letter}] * count)

    yield put
    hf_datasets._load_dataset.cache_clear()


def test_a_hub_dataset_is_read_at_the_commit_that_the_driver_resolved(hub, cached_dataset):
    cached_dataset("a", 3)
    hub.push("org/d", "a")
    source = Source(dataset="org/d")
    found = locate(source, 0)
    assert found.dataset.revision == commit("a") and contents(found) == {"commit": commit("a")}
    assert hf_datasets.dataset_rows(found.dataset) == 3
    assert str(found.dataset) == f"split train of commit {commit('a')}"
    # A machine that cannot reach the hub and has another version, of as many rows.
    hub.push("org/d", "b")
    other = hf_datasets.DatasetRef("hub", "org/d", None, commit("b"), "train")
    with pytest.raises(
        CorpusError, match=f"at commit {'b' * 40}, and this machine's .* {'a' * 40}"
    ):
        hf_datasets.dataset_rows(other)


def test_a_hub_dataset_of_another_subset_is_another(hub, cached_dataset):
    cached_dataset("a", 3)
    ref = hf_datasets.DatasetRef("hub", "org/d", None, commit("a"), "train")
    both = [hf_datasets.dataset_fingerprint(ref)]
    both.append(hf_datasets.dataset_fingerprint(hf_datasets.replace(ref, subset="hard")))
    assert both == [{"commit": commit("a")}, {"commit": commit("a"), "subset": "hard"}]


def test_a_hub_dataset_that_cannot_be_resolved_is_read_as_it_is_cached_and_said(
    hub, cached_dataset, capsys
):
    cached_dataset("a", 3)
    hub.failing = lambda: OfflineModeIsEnabled("offline")
    found = locate(Source(dataset="org/d"), 0)
    assert found.dataset.revision is None and contents(found)["dataset"].startswith("3 rows")
    assert "each machine reads the version in its own cache" in capsys.readouterr().err
