"""Packed steps equal TRL's padded ones: outputs, loss, every parameter's gradient."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_support import (
    changed,
    model_dir,
    rows,
    run,
    selection_rows,
    settings,
    write_selection,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from refscale.errors import TrainingError
from refscale.scoring import attention
from refscale.training import packed_dpo, start_check
from refscale.training.packed_dpo import PackedCollator, install, pack_pairs, refusal

# Fixtures of training_support, which pytest finds by their names here.
__all__ = ["model_dir", "rows", "settings"]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CPU = torch.device("cpu")
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
SERVED = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, tied head": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama, one head group": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, attention_bias=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "gemma2, soft-capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    ),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = SERVED[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # far from uniform predictions
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def random_examples(*lengths: tuple[int, int, int], seed: int = 1) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {
            name: rng.integers(3, 64, size=length).tolist()
            for name, length in zip(names, triple, strict=True)
        }
        for triple in lengths
    ]


# An ordinary pair, single tokens, an empty prompt, a rejected side of one, equal lengths.
EXAMPLES = random_examples((5, 3, 4), (1, 1, 6), (0, 3, 2), (9, 7, 1), (4, 2, 2))
# Completions with a common beginning, an equal completion, and a prompt that occurs again.
SHARING = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 10, 11]},
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [12]},
    {"prompt_ids": [], "chosen_ids": [13, 14], "rejected_ids": [13, 15, 16]},
    {"prompt_ids": [20], "chosen_ids": [21, 22], "rejected_ids": [21]},
]


def forward_backward(
    model: Any, examples: list[dict[str, list[int]]], *, packed: bool, checkpointing: bool = False
) -> tuple[Any, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model)
    add_fused_lm_head(model, outputs=OUTPUTS)
    if packed:
        install(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = PackedCollator(pad_token_id=0)(examples)
    with packed_dpo.step():
        return _forward_backward(model, batch, packed)


def _forward_backward(model: Any, batch: dict[str, Any], packed: bool) -> Any:
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
        fused_lm_head=True,
        use_cache=False,
        **({"pack": batch["pack"]} if packed else {}),
    )
    # A different weight for each token, so that no error can cancel in a sum.
    weights = torch.linspace(-1, 2, outputs.log_probs.numel()).view(outputs.log_probs.shape)
    (outputs.log_probs * weights).sum().backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("examples", [EXAMPLES, SHARING], ids=["pairs", "sharing pairs"])
@pytest.mark.parametrize("name", SERVED)
def test_outputs_and_every_gradient_equal_the_padded_step(
    name: str, examples: list[dict[str, list[int]]], checkpointing: bool
) -> None:
    model = make(name)
    assert refusal(model, CPU) is None
    padded, padded_grads = forward_backward(model, examples, packed=False)
    packed, packed_grads = forward_backward(
        model, examples, packed=True, checkpointing=checkpointing
    )
    assert packed.is_top1.equal(padded.is_top1)
    for output in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(
            getattr(packed, output), getattr(padded, output), atol=1e-5, rtol=1e-5
        )
    assert packed_grads.keys() == padded_grads.keys()
    for parameter, expected in padded_grads.items():
        assert expected.abs().max() > 0, f"{parameter} has no gradient to compare"
        # Float32 rounding: 2^-24 a term, over some hundred terms a sum.
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            packed_grads[parameter], expected, atol=1e-5 * scale, rtol=1e-4, msg=parameter
        )


def test_a_pairs_log_probs_do_not_depend_on_its_neighbours() -> None:
    model = make("llama")
    together, _ = forward_backward(model, EXAMPLES, packed=True)
    for i, example in enumerate(EXAMPLES):
        alone, _ = forward_backward(model, [example], packed=True)
        for row, side in ((0, i), (1, i + len(EXAMPLES))):
            width = alone.log_probs.shape[1]
            torch.testing.assert_close(
                together.log_probs[side, :width], alone.log_probs[row], atol=1e-6, rtol=1e-5
            )


def test_the_layout_is_that_of_the_docstring() -> None:
    pack = pack_pairs([([7, 8], [9], [4, 5])])
    assert pack.input_ids.tolist() == [[7, 8, 4]]
    assert pack.position_ids.tolist() == [[0, 1, 2]]
    assert pack.rows.tolist() == [1, 1, 2]
    assert pack.targets.tolist() == [4, 9, 5]
    assert pack.terms.tolist() == [1, 0, 2]
    assert pack.shape == (2, 3)
    assert pack.slots.tolist() == [1, 4, 5]


def test_a_pack_holds_each_prompt_once_and_no_padding() -> None:
    batch = PackedCollator(pad_token_id=0)(EXAMPLES)
    pack = batch["pack"]
    # All tokens but each completion's last.
    tokens = sum(len(ids) for example in EXAMPLES for ids in example.values())
    assert pack.input_ids.shape == (1, tokens - 2 * len(EXAMPLES))
    # Every slot that TRL scores is filled, by the token that it scores there.
    flat = batch["input_ids"][:, 1:].reshape(-1)
    scored = batch["completion_mask"][:, 1:].reshape(-1).nonzero()[:, 0]
    assert pack.slots.sort().values.equal(scored)
    assert pack.targets[pack.terms].equal(flat[pack.slots])


def test_an_unpacked_call_is_untouched() -> None:
    model = make("qwen2")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    add_fused_lm_head(model)
    install(model)
    torch.testing.assert_close(model(ids).logits, expected)


REFUSED = {
    "state from token to token": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "carry state",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_not_served_are_named_with_the_reason(name: str) -> None:
    build, reason = REFUSED[name]
    model = build()
    if reason == "carry state":
        model.config.layer_types = ["full_attention", "linear_attention"]
    assert reason in str(refusal(model, CPU))


def test_learned_positions_are_served_or_refused_but_never_wrong() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
    )
    if refusal(model, CPU) is not None:
        return
    padded, _ = forward_backward(model, EXAMPLES, packed=False)
    packed, _ = forward_backward(model, EXAMPLES, packed=True)
    torch.testing.assert_close(packed.log_probs, padded.log_probs, atol=1e-5, rtol=1e-5)


def test_packed_training_equals_padded_training(settings: Any, tmp_path: Path) -> None:
    policies, curves = [], []
    for packed in ("on", "off"):
        metrics, logs = run(changed(settings, packed=packed, max_steps=8))
        assert metrics["train_path"].startswith("packed" if packed == "on" else "padded")
        policies.append(AutoModelForCausalLM.from_pretrained(settings.policy_dir))
        names = ("loss", "rewards/margins", "entropy", "logits/chosen", "grad_norm", "num_tokens")
        curves.append([[log[name] for name in names] for log in logs])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4, atol=1e-4)
    for a, b in zip(*(policy.parameters() for policy in policies), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_under_autocast_layers_attend_in_bfloat16(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def record(query: torch.Tensor, value: torch.Tensor, softcap: Any) -> str:
        seen.add((query.dtype, value.dtype))
        return "recorded"

    monkeypatch.setattr(attention, "_no_varlen", record)
    asked = changed(settings, packed="on", max_steps=1)
    run(dataclasses.replace(asked, bf16=True))  # weights are float32 without DeepSpeed
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_lora_trains_packed(settings: Any) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    losses = []
    for packed in ("on", "off"):
        _, logs = run(changed(settings, packed=packed, peft=lora, gradient_checkpointing=True))
        losses.append([log["loss"] for log in logs])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def test_a_model_that_is_not_served_falls_back_with_the_reason(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_dpo, "refusal", lambda *_: "llama is not served today")
    metrics, _ = run(changed(settings, packed="auto"))
    assert metrics["train_path"] == "padded: llama is not served today"
    with pytest.raises(TrainingError, match=r"train.packed is on, but llama is not served today"):
        run(changed(settings, packed="on"))


def test_layers_that_ask_for_more_than_packs_serve_train_padded(
    settings: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sinks = GptOssForCausalLM(
        GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ).eval()
    folder = tmp_path / "gpt-oss"
    sinks.save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings.model_name_or_path).save_pretrained(folder)
    asked = dataclasses.replace(
        changed(settings, trl={"router_aux_loss_coef": 0.0}, max_steps=1),
        model_name_or_path=str(folder),
        selection_files=[write_selection(tmp_path / "g.parquet", selection_rows(sinks, 8))],
    )
    metrics, (log,) = run(asked)
    assert "s_aux, which packs do not serve" in metrics["train_path"]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_family_whose_packed_step_breaks_off_trains_padded(settings: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Its layers make a mask of their own, which packs assert that there is none of.
    doge = DogeForCausalLM(DogeConfig(**SIZES, keep_window_size=64)).eval()
    folder = tmp_path / "doge"
    doge.save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings.model_name_or_path).save_pretrained(folder)
    asked = dataclasses.replace(
        changed(settings, trl={"router_aux_loss_coef": 0.0}, max_steps=1),
        model_name_or_path=str(folder),
        selection_files=[write_selection(tmp_path / "d.parquet", selection_rows(doge, 8))],
    )
    metrics, (log,) = run(asked)
    assert metrics["train_path"].startswith("padded: a packed step breaks off: a pack has neither")
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.distributed.DistBackendError])
def test_what_no_other_path_helps_against_ends_the_training(
    settings: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("not the model's fault")

    monkeypatch.setattr(start_check, "_sample_sums", fail)
    with pytest.raises((error, TrainingError), match="not the model's fault"):
        run(changed(settings, packed="auto"))


def test_a_packed_path_that_is_wrong_is_found_out_and_not_taken(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(pairs: Any) -> Any:
        pack = pack_pairs(pairs)
        odd = torch.arange(pack.position_ids.shape[1]) % 2
        return dataclasses.replace(pack, position_ids=pack.position_ids + 3 * odd)

    monkeypatch.setattr(packed_dpo, "pack_pairs", wrong)
    metrics, logs = run(changed(settings, packed="auto"))
    assert metrics["train_path"].startswith("padded: packed and padded sums differ by")
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_a_router_loss_is_trained_on_padded_rows_and_packs_go_without_it(
    settings: Any, tmp_path: Path, coefficient: float | None
) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ).eval()
    folder = tmp_path / "mixtral"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings.model_name_or_path).save_pretrained(folder)
    mixtral = dataclasses.replace(
        changed(settings, trl={"router_aux_loss_coef": coefficient}, max_steps=1),
        model_name_or_path=str(folder),
        selection_files=[write_selection(tmp_path / "m.parquet", selection_rows(model, 8))],
    )
    metrics, (log,) = run(mixtral)
    if coefficient is None:
        assert "router loss over the tokens of padded rows" in metrics["train_path"]
        # The loss of DPO is ln 2, and the config's coefficient is 0.001.
        assert log["loss"] == pytest.approx(math.log(2) + 1e-3 * log["aux_loss"], abs=1e-5)
    else:
        assert metrics["train_path"] == "packed" and "aux_loss" not in log
        assert log["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("packed", ["on", "off"])
def test_a_tokenizer_without_any_id_for_padding_trains(settings: Any, packed: str) -> None:
    folder = Path(settings.model_name_or_path).parent / f"no-padding-{packed}"
    shutil.copytree(settings.model_name_or_path, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("pad_token", "eos_token"):
        config.pop(name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id is None
    expected, before = run(changed(settings, packed=packed))
    metrics, logs = run(
        dataclasses.replace(changed(settings, packed=packed), model_name_or_path=str(folder))
    )
    assert metrics["train_path"] == expected["train_path"]
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in before])
