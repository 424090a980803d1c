"""Loading a model to score with: adapters, defects, and what is chosen for the device."""

import shutil

import numpy as np
import pytest
import torch
from scoring_support import PACKED, PADDED, build, make_pairs, own_sums

from refscale.errors import ModelError
from refscale.scoring import loading
from refscale.scoring.devices import choose_dtype, compile_after, default_budget
from refscale.scoring.forward import Forward
from refscale.scoring.reference import ReferenceModel


@pytest.fixture(scope="module")
def llama():
    return build(*PACKED["llama"])


def test_a_lora_adapter_is_merged_into_the_reference(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    pairs = make_pairs(14)
    truth = own_sums(adapted.eval(), pairs.prompt_ids, pairs.chosen_ids)
    reference = ReferenceModel.load(
        str(tiny_model), dtype="float32", adapter=str(tmp_path / "adapter")
    )
    np.testing.assert_allclose(reference.score(pairs).chosen_logps, truth, atol=1e-3)
    plain = ReferenceModel.load(str(tiny_model), dtype="float32").score(pairs).chosen_logps
    assert np.abs(plain - truth).max() > 0.1


def test_an_adapter_without_the_weights_of_its_layers_is_refused(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "text.layers"): w for name, w in weights.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"with adapter.*missing adapter keys.*layers\.0"):
        ReferenceModel.load(str(tiny_model), adapter=str(tmp_path))


def test_an_adapter_without_weights_to_merge_is_refused(tiny_model, tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(base, tuning).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"type PROMPT_TUNING cannot be merged"):
        ReferenceModel.load(str(tiny_model), adapter=str(tmp_path))


def test_weights_that_a_checkpoint_lacks_are_not_made_up(tmp_path):
    from transformers import AutoModelForSequenceClassification

    config = build(*PACKED["llama"]).config
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack 1 of LlamaForCausalLM, such as lm_head.weight"):
        ReferenceModel.load(str(tmp_path))


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_whole_checkpoints_lack_nothing(name, tmp_path):
    kind, config = (PACKED | PADDED)[name]
    model = build(kind, {**config, "tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    pairs = make_pairs()
    wanted = own_sums(model, pairs.prompt_ids, pairs.chosen_ids)
    found = ReferenceModel.load(str(tmp_path), dtype="float32", path="padded").score(pairs)
    np.testing.assert_allclose(found.chosen_logps, wanted, rtol=0, atol=1e-3)


def test_a_model_that_is_left_off_the_gpus_is_refused(llama, monkeypatch):
    monkeypatch.setattr(llama, "hf_device_map", {"model": 0, "lm_head": "cpu"}, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"does not fit on 2 GPUs; raise ray.gpus_per_replica"):
        loading.require_whole(llama, set())
    monkeypatch.setattr(llama, "hf_device_map", {"model": 0, "lm_head": 1})
    loading.require_whole(llama, set())


def test_float32_never_runs_through_flash_attention(llama):
    model = Forward(llama)
    model._own_attention = "flash_attention_2"  # of a model that was loaded so
    before = llama.config._attn_implementation
    with model.attending("float32"):
        assert llama.config._attn_implementation == "sdpa"
    assert llama.config._attn_implementation == before


def test_what_cannot_be_loaded_is_one_line(tmp_path, tiny_model):
    with pytest.raises(ModelError, match="nothing does not exist") as caught:
        ReferenceModel.load(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="with adapter"):
        ReferenceModel.load(str(tiny_model), adapter=str(tmp_path))
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="incomplete metadata"):
        ReferenceModel.load(str(tmp_path / "cut"))


def test_a_model_says_what_was_chosen_and_why(tiny_model):
    reference = ReferenceModel.load(str(tiny_model), dtype="float32", token_budget=99)
    assert reference.info["dtype"] == "float32"
    assert reference.info["dtype_reason"] == "asked for"
    assert reference.info["path_reason"] == "the architecture is served"
    assert reference.info["token_budget"] == 99
    assert reference.info["vocab_size"] == 259
    reference.release()
    with pytest.raises(AttributeError):
        _ = reference.model


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("avx2 avx512_bf16", torch.bfloat16),
        ("amx_bf16", torch.bfloat16),
        ("avx2 avx512f", torch.float32),
        ("", torch.float32),
    ],
)
def test_dtype_follows_the_cpus_flags(monkeypatch, flags, dtype):
    has = set(flags.split())
    monkeypatch.setattr("refscale.scoring.devices._cpu_flags", lambda: has)
    chosen, reason = choose_dtype("auto", "cpu")
    assert chosen == dtype
    assert all(flag in reason for flag in has & {"avx512_bf16", "amx_bf16"})


@pytest.mark.parametrize(
    ("flags", "dtype", "kind", "seconds"),
    [
        ("", torch.float32, "cuda", 60),
        ("avx512_bf16 amx_bf16", torch.bfloat16, "cpu", 300),
        ("avx512_bf16 amx_bf16", torch.float32, "cpu", None),
        ("avx512_bf16", torch.bfloat16, "cpu", None),
    ],
)
def test_compiling_waits_until_it_pays(monkeypatch, flags, dtype, kind, seconds):
    monkeypatch.setattr("refscale.scoring.devices._cpu_flags", lambda: set(flags.split()))
    assert compile_after(dtype, torch.device(kind)) == seconds


def test_threads_are_set_when_asked(tiny_model):
    before = torch.get_num_threads()
    try:
        model = ReferenceModel.load(str(tiny_model), num_threads=1)
        assert torch.get_num_threads() == model.info["num_threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_the_budget_of_a_gpu_follows_its_free_memory(monkeypatch, llama):
    class Config:
        hidden_size, intermediate_size = 4096, 14336

    free = 40 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    found = default_budget(Config, torch.bfloat16, torch.device("cuda"))
    # 12 * 4096 + 3 * 14336 elements of 2 bytes a token, half of 40 GiB: over the cap.
    assert found == 65536
    free = 2**30
    assert default_budget(Config, torch.bfloat16, torch.device("cuda")) == 2912
    free = 2**20
    assert default_budget(Config, torch.bfloat16, torch.device("cuda")) == 2048
