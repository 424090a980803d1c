"""Encoding against TRL itself, to the token; and what it refuses."""

import random
from types import SimpleNamespace

import pytest
from support import CHATML, byte_tokenizer

from refscale.corpus.encoding import Encoded, Encoder, EncoderSettings, common_prefix_length
from refscale.corpus.pairs import Pair, Refusal
from refscale.corpus.shapes import canonical_pair
from refscale.errors import ModelError

WORDS = "the cat sat on a mat yes no indeed blue 42 naïve\n\nend".split(" ")


def bpe_tokenizer():
    """A trained BPE that adds <s> in front, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS) * 3, "user assistant system"], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    # Renders the generation prompt differently from the full conversation, as thinking models do.
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if tools %}tools {{ tools | length }}\n{% endif %}"
        "{% if add_generation_prompt %}[assistant] <think>{% endif %}"
    )
    return tokenizer


TOKENIZERS = {"bytes": byte_tokenizer, "bpe": bpe_tokenizer}


def text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def string_rows(count: int) -> list[dict]:
    rng = random.Random(1)
    rows = []
    for i in range(count):
        prompt = text(rng, 1, 20) + rng.choice(["", " ", "\n", ":"])
        # Without a space in front tokens merge across the boundary.
        rows.append(
            {
                "prompt": prompt,
                "chosen": rng.choice(["", " "]) + text(rng, 1, 25) + f"{i}",
                "rejected": rng.choice(["", " "]) + text(rng, 1, 25) + f"{i}x",
            }
        )
    rows.append({"prompt": "Q:", "chosen": " a<|endoftext|>", "rejected": " b</s>"})
    rows.append({"prompt": "", "chosen": "long enough", "rejected": "long also"})
    return rows


def chat_rows(count: int) -> list[dict]:
    rng = random.Random(2)
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": text(rng, 1, 12)}]
        if i % 3 == 0:
            prompt = [
                {"role": "system", "content": text(rng, 1, 5)},
                *prompt,
                {"role": "assistant", "content": text(rng, 1, 5)},
                {"role": "user", "content": text(rng, 1, 5)},
            ]
        rows.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": f"{text(rng, 1, 25)} {i}"}],
                "rejected": [{"role": "assistant", "content": f"{text(rng, 1, 25)} no {i}"}],
            }
        )
    return rows


def trl_ids(rows: list[dict], tokenizer, max_length: int) -> list[tuple]:
    """(prompt_ids, chosen_ids, rejected_ids) as TRL's trainer and collator leave them."""
    import datasets
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),
        datasets.Dataset.from_list(rows),
        tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"),
        "train",
    )
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    found = []
    for row in prepared:
        batch = collator([row])
        sides = []
        for i in (0, 1):
            length = int(batch["attention_mask"][i].sum())
            ids = batch["input_ids"][i][:length].tolist()
            mask = batch["completion_mask"][i][:length].tolist()
            sides.append([t for t, m in zip(ids, mask, strict=True) if m])
            prompt = [t for t, m in zip(ids, mask, strict=True) if not m]
        found.append((prompt, *sides))
    return found


def ours(rows: list[dict], encoder: Encoder) -> list[Encoded | Refusal]:
    pairs = [canonical_pair(row, "trl") for row in rows]
    assert all(isinstance(pair, Pair) for pair in pairs), pairs
    return encoder.encode(pairs)


def as_ids(encoded: list) -> list[tuple]:
    return [(e.prompt_ids, e.chosen_ids, e.rejected_ids) for e in encoded if isinstance(e, Encoded)]


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("kind", ["strings", "chats"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_equal_trls_after_its_collator(name, kind, cut):
    max_length = {"bytes": 64, "bpe": 20}[name] if cut else 1024
    tokenizer = TOKENIZERS[name]()
    rows = string_rows(60) if kind == "strings" else chat_rows(60)
    encoded = ours(rows, Encoder(tokenizer, max_length=max_length))
    expected = trl_ids(rows, TOKENIZERS[name](), max_length)
    # What TRL drops we refuse; pairs that are equal once they are cut TRL keeps.
    refused = [(row, e) for row, e in zip(rows, encoded, strict=True) if isinstance(e, Refusal)]
    assert {e.reason for _, e in refused} <= {"prompt_too_long", "identical_tokens"}
    equal = sum(chosen == rejected for _, chosen, rejected in expected)
    assert equal == sum(e.reason == "identical_tokens" for _, e in refused)
    assert as_ids(encoded) == [ids for ids in expected if ids[1] != ids[2]]
    if cut:
        assert any(isinstance(e, Encoded) and e.chosen_truncated for e in encoded)
        assert any(e.reason == "prompt_too_long" for _, e in refused)
    if name == "bpe":
        assert any(isinstance(e, Encoded) and e.boundary_shifted for e in encoded)


def test_tools_and_template_kwargs_reach_the_template_as_in_trl():
    rows = chat_rows(4)
    for row in rows:
        row["tools"] = '[{"type": "function", "function": {"name": "f"}}]'
    encoded = ours(rows, Encoder(bpe_tokenizer(), max_length=512))
    assert as_ids(encoded) == trl_ids(rows, bpe_tokenizer(), 512)
    plain = ours(chat_rows(4), Encoder(bpe_tokenizer(), max_length=512))
    assert as_ids(plain) != as_ids(encoded)


def test_each_row_decides_by_itself_whether_eos_is_added():
    tokenizer = byte_tokenizer()
    mixed = [chat_rows(1)[0], string_rows(1)[0]]
    chat, string = ours(mixed, Encoder(tokenizer, max_length=512))
    assert string.chosen_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in chat.chosen_ids
    # The order of the rows changes nothing.
    assert as_ids(ours(mixed[::-1], Encoder(tokenizer, max_length=512))) == as_ids([string, chat])


def test_eos_is_not_doubled():
    tokenizer = byte_tokenizer()
    row = {"prompt": "Q", "chosen": "a<|endoftext|>", "rejected": "b"}
    (encoded,) = ours([row], Encoder(tokenizer, max_length=64))
    assert encoded.chosen_ids.count(tokenizer.eos_token_id) == 1


def reason(row: dict, **options) -> str:
    tokenizer = options.pop("tokenizer", None) or byte_tokenizer()
    (result,) = ours([row], Encoder(tokenizer, **{"max_length": 32, **options}))
    return result.reason if isinstance(result, Refusal) else "kept"


def test_what_cannot_be_learned_from_is_refused():
    row = {"prompt": "p" * 31, "chosen": "a", "rejected": "b"}
    assert reason(row) == "kept"  # one token of each side is left
    assert reason({**row, "prompt": "p" * 32}) == "prompt_too_long"
    # The sides differ only beyond max_length.
    assert reason({"prompt": "p", "chosen": "c" * 40, "rejected": "c" * 41}) == "identical_tokens"
    assert reason(row, truncation="quarantine") == "too_long"
    assert reason({**row, "prompt": "short"}, truncation="quarantine") == "kept"
    # Without a prompt, the completion's first token has no log-prob, and there is no second.
    eos = {"prompt": "", "chosen": "<|endoftext|>", "rejected": "b"}
    assert reason(eos) == "no_scored_tokens"


def test_a_text_that_brings_the_bos_the_tokenizer_adds_is_refused():
    row = {"prompt": "<s>the cat", "chosen": " sat", "rejected": " on"}
    assert reason(row, tokenizer=bpe_tokenizer()) == "double_bos"
    assert reason({**row, "prompt": "the cat"}, tokenizer=bpe_tokenizer()) == "kept"


def test_a_row_the_template_refuses_does_not_take_others_with_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not this one') }}{% endif %}"
        + CHATML
    )
    rows = chat_rows(3)
    rows[1]["prompt"] = [{"role": "user", "content": "bad"}]
    results = ours(rows, Encoder(tokenizer, max_length=512))
    assert [isinstance(r, Refusal) for r in results] == [False, True, False]
    assert results[1].reason == "template_failed"
    assert "not this one" in results[1].detail


def test_the_fast_path_is_left_where_the_wrapper_does_more():
    assert Encoder(byte_tokenizer(), max_length=8)._fast is not None

    class Wrapped:
        """A tokenizer whose call differs from its backend's."""

        is_fast, eos_token, bos_token, bos_token_id = True, "<|endoftext|>", None, None

        def __init__(self):
            self.inner = byte_tokenizer()
            self.backend_tokenizer = self.inner.backend_tokenizer

        def __call__(self, texts, add_special_tokens=True):
            return self.inner([t.upper() for t in texts], add_special_tokens=add_special_tokens)

    encoder = Encoder(Wrapped(), max_length=64)
    assert encoder._fast is None
    (encoded,) = ours([{"prompt": "q", "chosen": "a", "rejected": "b"}], encoder)
    assert byte_tokenizer().decode(encoded.chosen_ids)[0] == "A"


def test_common_prefix_length_equals_a_plain_loop():
    rng = random.Random(0)
    for _ in range(300):
        a = [rng.randint(0, 1) for _ in range(rng.randint(0, 9))]
        b = a[: rng.randint(0, len(a))] + [rng.randint(0, 1) for _ in range(rng.randint(0, 4))]
        n = 0
        while n < min(len(a), len(b)) and a[n] == b[n]:
            n += 1
        assert common_prefix_length(a, b) == n


def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path):
    settings = EncoderSettings(str(tmp_path), None, False, None, 64, "keep_start")
    with pytest.raises(ModelError, match="model_name_or_path"):
        settings.load()
