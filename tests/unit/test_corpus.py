"""Rows of every shape become the right pairs, and each defect is refused with its own code."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refscale.corpus.pairs import LEFT_OUT, REASONS, Pair, Refusal, fraction_of, passthrough
from refscale.corpus.shapes import canonical_pair, detect_shape, implicit_prompt
from refscale.errors import CorpusError

USER = {"role": "user", "content": "Which?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("This one.", "That one."))
GOOD = {"prompt": "Which?", "chosen": " This.", "rejected": " That."}
GOOD_CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More?\n\nAssistant: Sure",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More?\n\nAssistant: No",
}
HELP = {"context": [USER], "response1": "one", "response2": "two", "overall_preference": -2}


def pair(row, shape="trl", columns=None, **options) -> Pair:
    result = canonical_pair(row, shape, columns, **options)
    assert isinstance(result, Pair), result
    return result


def refused(row, shape="trl", **options) -> str:
    result = canonical_pair(row, shape, **options)
    assert isinstance(result, Refusal), result
    assert result.reason in REASONS
    assert result.detail
    return result.reason


# -- shapes --------------------------------------------------------------------------------------


def test_strings_and_chats_with_a_prompt():
    text = pair(GOOD)
    assert (text.prompt, text.chosen, text.rejected) == ("Which?", " This.", " That.")
    assert not text.conversational
    chat = pair(GOOD_CHAT)
    assert (chat.prompt, chat.chosen, chat.rejected) == ([USER], [YES], [NO])
    assert json.loads(chat.prompt_text) == [USER]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # One completion starts like the other: no letter is stolen.
        ("Q: A: yes", "Q: A: yes indeed", ("Q: A:", " yes", " yes indeed")),
        ("Q: x yes", "Q: x no", ("Q: x", " yes", " no")),  # as TRL
        ("Q:\nyes", "Q:\nno", ("Q:\n", "yes", "no")),  # as TRL
        ("Q: yep", "Q: yes", ("Q:", " yep", " yes")),
        ("Q: a\nb", "Q: a c", ("Q: a", "\nb", " c")),
        ("yes", "no", ("", "yes", "no")),
        # Without spaces a word starts after full-width punctuation, and the role marker stays.
        (
            "问：一加一等于几？答：二。",
            "问：一加一等于几？答：三。",
            ("问：一加一等于几？答：", "二。", "三。"),
        ),
        ("问：几？\n答：二。", "问：几？\n答：三。", ("问：几？\n答：", "二。", "三。")),
        ("質問、答え「はい」", "質問、答え「いいえ」", ("質問、答え「", "はい」", "いいえ」")),
        # At the end of a text it ends a word: the shorter completion is not empty.
        ("答：二。", "答：二。因为对。", ("答：", "二。", "二。因为对。")),
        ("答：好？！", "答：好？", ("答：", "好？！", "好？")),
        # The space of Latin texts, and their punctuation, are as they were.
        ("答： yes", "答： no", ("答：", " yes", " no")),
        ("Q:A:yes", "Q:A:no", ("", "Q:A:yes", "Q:A:no")),
        ("“yes”", "“no”", ("", "“yes”", "“no”")),
    ],
)
def test_an_implicit_string_prompt_ends_at_a_word(chosen, rejected, expected):
    assert implicit_prompt(chosen, rejected) == expected


def test_an_implicit_string_prompt_is_trls_where_the_texts_part_at_a_word():
    from trl.data_utils import extract_prompt

    rng = random.Random(0)
    words = "alpha beta gamma delta".split()
    for i in range(100):
        prompt = " ".join(rng.choice(words) for _ in range(rng.randint(1, 6)))
        row = {"chosen": f"{prompt} x{i}", "rejected": f"{prompt} y{i}"}
        found = pair(row)
        assert {
            "prompt": found.prompt,
            "chosen": found.chosen,
            "rejected": found.rejected,
        } == extract_prompt(row)


def test_an_implicit_chat_prompt_is_the_shared_turns():
    system = {"role": "system", "content": "Be brief."}
    found = pair({"chosen": [system, USER, YES], "rejected": [system, USER, NO]})
    assert (found.prompt, found.chosen, found.rejected) == ([system, USER], [YES], [NO])


def test_full_conversations_beside_their_prompt_messages_lose_the_repetition():
    row = {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}
    assert pair(row).pair_id == pair(GOOD_CHAT).pair_id


def test_hh_transcripts_split_at_the_last_assistant_turn():
    found = pair(HH, "hh")
    assert found.prompt == "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More?\n\nAssistant:"
    assert (found.chosen, found.rejected) == (" Sure", " No")
    explicit = {"prompt": found.prompt, **HH}
    assert pair(explicit, "hh").pair_id == found.pair_id
    completions = {"prompt": found.prompt, "chosen": " Sure", "rejected": " No"}
    assert pair(completions, "hh").pair_id == found.pair_id
    assert pair(completions, "trl").pair_id == found.pair_id


def test_ultrafeedback_prompt_strings_meet_their_conversations():
    row = {"prompt": "Which?", "chosen": [USER, YES], "rejected": [USER, NO]}
    assert pair(row, "ultrafeedback").pair_id == pair(GOOD_CHAT).pair_id
    answers = {"prompt": "Which?", "chosen": [YES], "rejected": [NO]}
    assert pair(answers, "ultrafeedback").pair_id == pair(GOOD_CHAT).pair_id
    assert refused({**row, "prompt": "Who?"}, "ultrafeedback") == "prompt_mismatch"
    assert refused(row, "trl") == "wrong_type"


def test_helpsteer3_prefers_by_the_sign():
    first = pair(HELP, "helpsteer3")
    assert (first.chosen[0]["content"], first.rejected[0]["content"]) == ("one", "two")
    second = pair({**HELP, "overall_preference": 1}, "helpsteer3")
    assert second.chosen == first.rejected
    assert second.pair_id == first.swapped_id
    assert json.loads(first.passthrough) == {"overall_preference": -2}
    assert refused({**HELP, "overall_preference": 0}, "helpsteer3") == "tie"
    assert refused({**HELP, "overall_preference": None}, "helpsteer3") == "unlabelled"
    assert refused({**HELP, "overall_preference": "A"}, "helpsteer3") == "wrong_type"


def test_columns_are_mapped_by_name():
    row = {"question": "Which?", "good": " This.", "bad": " That.", "prompt_id": 3}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    found = pair(row, "columns", columns)
    assert found.pair_id == pair(GOOD).pair_id
    assert json.loads(found.passthrough) == {"prompt_id": 3}


def test_other_conventions_of_role_names_are_the_same_pair():
    row = {
        "prompt": [{"from": "human", "value": "Which?"}],
        "chosen": {"from": "gpt", "value": "This one."},
        "rejected": [{"role": "Assistant", "content": "That one.", "name": None}],
    }
    assert pair(row).pair_id == pair(GOOD_CHAT).pair_id


def test_a_shape_is_detected_by_the_majority_and_defects_do_not_vote():
    assert detect_shape([{}, GOOD, "junk", {**GOOD, "chosen": None}], "x")[0] == "trl"
    assert detect_shape([GOOD_CHAT, GOOD], "x")[0] == "trl"
    assert detect_shape([HH, HH, GOOD], "x")[0] == "hh"
    assert detect_shape([{**HH, "prompt": "\n\nHuman: Hi"}], "x")[0] == "hh"
    assert detect_shape([HELP], "x")[0] == "helpsteer3"
    row = {"prompt": "Which?", "chosen": [USER, YES], "rejected": [USER, NO]}
    assert detect_shape([row], "x")[0] == "ultrafeedback"
    with pytest.raises(CorpusError, match=r"answer_a, question.*format: columns"):
        detect_shape([{"question": "?", "answer_a": "x"}], "x")


# -- defects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": " This."}, "identical_pair"),
        ({"chosen": ""}, "empty_chosen"),
        ({"rejected": " \n"}, "empty_rejected"),
        ({"chosen": None}, "null_field"),
        ({"prompt": None}, "null_field"),
        ({"chosen": 3}, "wrong_type"),
        ({"rejected": [NO]}, "wrong_type"),
        ({"chosen": "\ud800 half"}, "bad_encoding"),
    ],
)
def test_defects_of_string_rows(change, reason):
    assert refused({**GOOD, **change}) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": []}, "empty_messages"),
        ({"prompt": []}, "empty_messages"),
        ({"chosen": ["hello"]}, "wrong_type"),
        ({"chosen": [{**YES, "content": 3}]}, "wrong_type"),
        ({"chosen": [{"type": "image"}]}, "bad_roles"),
        ({"chosen": [{**YES, "content": [{"type": "image"}]}]}, "wrong_type"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "null_field"),
        ({"chosen": [{"role": "assistant", "content": " "}]}, "empty_chosen"),
        ({"chosen": [{"role": "narrator", "content": "x"}]}, "bad_roles"),
        ({"chosen": [YES, USER]}, "bad_roles"),
        ({"chosen": [USER]}, "bad_roles"),
        ({"prompt": [USER, USER]}, "bad_roles"),
        ({"prompt": [USER, YES]}, "bad_roles"),
        ({"rejected": [YES]}, "identical_pair"),
        ({"tools": "not json"}, "wrong_type"),
    ],
)
def test_defects_of_chat_rows(change, reason):
    assert refused({**GOOD_CHAT, **change}) == reason


def test_defects_of_other_rows():
    assert refused([1]) == "wrong_type"
    assert refused({"prompt": "a", "chosen": "b"}) == "missing_field"
    assert refused({"chosen": "same", "rejected": "same"}) == "identical_pair"
    assert refused({"chosen": "Q: ", "rejected": "Q: yes"}) == "empty_chosen"
    assert refused({"chosen": [USER, YES], "rejected": [USER, YES]}) == "identical_pair"
    assert refused({"chosen": [YES], "rejected": [NO]}) == "empty_messages"
    other = HH["rejected"].replace("Hello", "Hey")
    assert refused({**HH, "rejected": other}, "hh") == "prompt_mismatch"
    assert refused({**HH, "chosen": "Hello"}, "hh") == "bad_roles"
    more = {key: f"{value}\n\nHuman: ok" for key, value in HH.items()}
    assert refused(more, "hh") == "bad_roles"


def test_empty_completions_are_kept_if_allowed():
    assert pair({**GOOD, "chosen": ""}, allow_empty=True).chosen == ""
    both = {**GOOD, "chosen": "", "rejected": ""}
    assert refused(both, allow_empty=True) == "identical_pair"


# -- identity ------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(prompt=texts, chosen=texts, rejected=texts, extra=texts, seed=st.integers(0, 99))
def test_pair_id_does_not_depend_on_field_order_or_other_columns(
    prompt, chosen, rejected, extra, seed
):
    def shuffled(items):
        items = list(items)
        random.Random(seed).shuffle(items)
        return dict(items)

    row = {"prompt": prompt, "chosen": chosen + "a", "rejected": rejected + "b"}
    if row["chosen"] != row["rejected"]:
        plain = pair(row)
        assert pair(shuffled({**row, "x": extra}.items())).pair_id == plain.pair_id
        swapped = pair({**row, "chosen": row["rejected"], "rejected": row["chosen"]})
        assert swapped.pair_id == plain.swapped_id != plain.pair_id
        assert swapped.prompt_hash == plain.prompt_hash
        chat = {
            "prompt": [shuffled({"role": "user", "content": prompt}.items())],
            "chosen": [shuffled({"role": "assistant", "content": row["chosen"]}.items())],
            "rejected": [shuffled({"role": "assistant", "content": row["rejected"]}.items())],
        }
        assert pair(shuffled(chat.items())).pair_id != plain.pair_id
        assert pair(shuffled(chat.items())).pair_id == pair(chat).pair_id


def test_pairs_without_a_prompt_are_held_out_one_by_one():
    rows = [{"chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(400)]
    hashes = [pair(row).prompt_hash for row in rows]
    assert len(set(hashes)) == 400
    held = sum(fraction_of(content, 0, "holdout") < 0.25 for content in hashes)
    # 100 expected; the standard deviation of the count is 8.7.
    assert 65 < held < 135
    # What is settled together meets: duplicates, however they are written, and the swapped pair.
    again = pair({"prompt": "", "chosen": "yes 0", "rejected": "no 0"})
    swapped = pair({"chosen": "no 0", "rejected": "yes 0"})
    assert hashes[0] == again.prompt_hash == swapped.prompt_hash
    assert again.pair_id == swapped.swapped_id
    # One prompt is one hash, whatever is answered.
    assert pair(GOOD).prompt_hash == pair({**GOOD, "chosen": " Both."}).prompt_hash


def test_text_that_moves_between_prompt_and_completion_is_another_pair():
    moved = {"prompt": "Which? ", "chosen": "This.", "rejected": "That."}
    assert pair(moved).pair_id != pair(GOOD).pair_id


def test_tools_make_another_pair():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert pair({**GOOD_CHAT, "tools": tools}).pair_id != pair(GOOD_CHAT).pair_id
    assert (
        pair({**GOOD_CHAT, "tools": json.dumps(tools)}).pair_id
        == pair({**GOOD_CHAT, "tools": tools}).pair_id
    )


def test_fractions_are_uniform_and_depend_on_seed_and_purpose():
    values = [fraction_of(str(i).encode(), 0, "holdout") for i in range(2000)]
    # The mean of 2,000 uniform numbers has a standard deviation of 0.0065.
    assert abs(sum(values) / 2000 - 0.5) < 0.03
    assert values[0] != fraction_of(b"0", 1, "holdout")
    assert values[0] != fraction_of(b"0", 0, "weight")


# -- passthrough ---------------------------------------------------------------------------------


def test_passthrough_is_strict_json_and_bounded():
    assert json.loads(passthrough({"a": 1, "b": None, "ü": "é"})) == {"a": 1, "b": None, "ü": "é"}

    def no_nan(value):
        raise AssertionError(value)

    odd = {"nan": float("nan"), "deep": [{"inf": float("inf")}], "raw": b"123", "half": "\ud800"}
    found = json.loads(passthrough(odd), parse_constant=no_nan)
    assert found["nan"] is None
    assert found["deep"] == [{"inf": None}]
    assert found["raw"] == "<3 bytes>"
    large = passthrough({"small": 1, "large": "x" * 1_000_000})
    assert len(large) < 20_000
    assert json.loads(large) == {"small": 1, LEFT_OUT: ["large"]}
