"""The judge's client against a real local endpoint that misbehaves by script."""

import email.utils
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from judge_server import JudgeServer, Reply

from refscale.cli import main
from refscale.corpus.shapes import canonical_pair
from refscale.errors import ConfigError, EvaluationError, RefscaleError
from refscale.evaluation import mtbench, win_rate
from refscale.evaluation.judge import (
    Judge,
    JudgeConfig,
    judge_config,
    parse_extra,
    parse_preference,
    parse_rating,
)
from refscale.schema import CORPUS, HOLDOUT
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store


def conversation(text):
    return [{"role": "user", "content": text}]


def echo(_number, request):
    return f"heard {request['messages'][-1]['content']}"


def asked(server):
    return [request["messages"][-1]["content"] for request in server.requests]


def files(folder):
    return [path for path in Path(folder).rglob("*.json") if path.is_file()]


def test_replies_come_in_order_and_a_second_judge_asks_nothing(tmp_path):
    with JudgeServer(echo) as server:
        first = Judge(server.config(prompt_price=10, completion_price=30), Store(tmp_path))
        texts = [str(i) for i in range(20)]
        replies = first.ask([conversation(text) for text in texts])
        assert [reply.text for reply in replies] == [f"heard {text}" for text in texts]
        assert sorted(asked(server)) == sorted(texts)
        assert first.usage.prompt_tokens == 2000 and first.usage.completion_tokens == 200
        # (2000 x 10 + 200 x 30) / 1e6 = 0.026
        assert first.usage.cost(first.config) == pytest.approx(0.026)

        second = Judge(server.config(), Store(tmp_path))
        again = second.ask([conversation(text) for text in texts])
        assert [reply.text for reply in again] == [reply.text for reply in replies]
        assert len(server.requests) == 20
        assert (second.usage.cached, second.usage.requests) == (20, 0)


def test_equal_requests_are_asked_once_and_other_sampling_is_another_request(tmp_path):
    with JudgeServer(echo) as server:
        judge = Judge(server.config(), Store(tmp_path))
        assert len({reply.key for reply in judge.ask([conversation("x")] * 5)}) == 1
        assert len(server.requests) == 1
        Judge(server.config(temperature=0.5), Store(tmp_path)).ask([conversation("x")])
        assert len(server.requests) == 2


def test_null_in_extra_takes_a_field_out_of_the_request(tmp_path):
    def reasoning(number, request):
        unknown = {"max_tokens", "temperature"} & request.keys()
        return Reply(status=400, body=b"use max_completion_tokens") if unknown else "[[7]]"

    extra = parse_extra('{"max_tokens": null, "temperature": null, "max_completion_tokens": 99}')
    with JudgeServer(reasoning) as server:
        (refused,) = Judge(server.config(), Store(tmp_path)).ask([conversation("x")])
        assert "use max_completion_tokens" in refused.error
        (reply,) = Judge(server.config(extra=extra), Store(tmp_path)).ask([conversation("x")])
        assert reply.text == "[[7]]"
        assert server.requests[-1].keys() == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("max_tokens=null", "Expecting value"),
        ("[1]", "got list"),
        ('{"seed": NaN}', "NaN is not JSON"),
    ],
)
@pytest.mark.parametrize("command", ["mtbench", "compare"])
def test_extra_fields_on_the_command_line_are_a_json_object(tmp_path, capsys, command, text, said):
    path = tmp_path / "config.yaml"
    path.write_text("model: {model_name_or_path: m}\ncorpus: {sources: [{path: pairs.jsonl}]}\n")
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m"]
    arguments = [command, str(path), "--run-dir", str(tmp_path / "run"), *judge]
    assert main([*arguments, "--judge-extra", text]) == 2
    err = capsys.readouterr().err
    assert "--judge-extra must be a JSON object" in err and said in err
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--judge-extra", '{"messages": null}']) == 2
    assert "may not hold messages" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["mtbench", "compare"])
def test_extra_fields_reach_the_judge(tmp_path, monkeypatch, command):
    class Stop(RefscaleError):
        """Far enough."""

    given = []

    def take(*arguments, **_options):
        given.extend(argument for argument in arguments if isinstance(argument, JudgeConfig))
        raise Stop("far enough")

    monkeypatch.setattr(mtbench, "run_mtbench", take)
    monkeypatch.setattr(win_rate, "win_rate", take)
    path = tmp_path / "config.yaml"
    path.write_text("model: {model_name_or_path: m}\ncorpus: {sources: [{path: pairs.jsonl}]}\n")
    judge = ["--judge-url", "http://h/v1", "--judge-model", "m", "--judge-extra", '{"seed": 3}']
    assert main([command, str(path), "--run-dir", str(tmp_path / "run"), *judge]) == 1
    assert [config.extra for config in given] == [{"seed": 3}]


def test_no_more_requests_are_in_flight_than_asked_for(tmp_path):
    def slow(number, request):
        return Reply("x", delay_s=0.03)

    with JudgeServer(slow) as server:
        Judge(server.config(concurrency=3), Store(tmp_path)).ask(
            [conversation(str(i)) for i in range(12)]
        )
        assert 2 <= server.most_in_flight <= 3


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(status=429, headers={"Retry-After": "0"}),
        Reply(status=500),
        Reply(status=503),
        Reply(status=529),
        Reply(body=b"<html>gateway</html>"),
        Reply(body=b'{"choices": []}'),
        Reply("late", delay_s=1.0),
        Reply("half", cut=True),
    ],
    ids=["429", "500", "503", "529", "html", "no-choice", "timeout", "cut"],
)
def test_passing_trouble_is_retried_and_nothing_is_lost(tmp_path, trouble):
    def script(number, request):
        return trouble if number < 3 else echo(number, request)

    with JudgeServer(script) as server:
        config = server.config(timeout_s=0.5, concurrency=3, max_attempts=20)
        judge = Judge(config, Store(tmp_path))
        replies = judge.ask([conversation(str(i)) for i in range(6)])
        assert [reply.text for reply in replies] == [f"heard {i}" for i in range(6)]
        # At least: on a busy machine a good reply may be late too.
        assert judge.usage.retries >= 3 and judge.usage.failed == 0


def test_retry_after_is_honoured_by_all_requests(tmp_path):
    def script(number, request):
        if number == 0:
            return Reply(status=429, headers={"Retry-After": "0.4"})
        return echo(number, request)

    with JudgeServer(script) as server:
        judge = Judge(server.config(concurrency=1), Store(tmp_path))
        judge.ask([conversation("a"), conversation("b")])
        assert server.times[1] - server.times[0] >= 0.4


def test_retry_after_may_be_a_date(tmp_path):
    def script(number, request):
        # An HTTP date has whole seconds: between 1 and 2 s from now.
        when = email.utils.formatdate(time.time() + 2, usegmt=True)
        return Reply(status=503, headers={"Retry-After": when}) if number == 0 else "done"

    with JudgeServer(script) as server:
        Judge(server.config(), Store(tmp_path)).ask([conversation("a")])
        assert server.times[1] - server.times[0] >= 0.9


def test_a_request_that_keeps_failing_is_reported_and_asked_again_the_next_time(tmp_path):
    broken = True

    def script(number, request):
        return (
            Reply(status=500, body=b"out of order")
            if broken and "1" in asked_for(request)
            else "ok"
        )

    def asked_for(request):
        return request["messages"][-1]["content"]

    with JudgeServer(script) as server:
        judge = Judge(server.config(max_attempts=3), Store(tmp_path))
        replies = judge.ask([conversation(str(i)) for i in range(3)])
        assert [reply.text for reply in replies] == ["ok", None, "ok"]
        assert "HTTP 500: out of order" in replies[1].error and replies[1].attempts == 3
        assert judge.usage.failed == 1
        broken = False
        assert [r.text for r in judge.ask([conversation(str(i)) for i in range(3)])] == ["ok"] * 3
        # 3 attempts at the broken one, 2 good ones, then that one alone.
        assert len(server.requests) == 6


def test_a_refused_request_fails_alone_and_at_once(tmp_path):
    def script(number, request):
        long = request["messages"][-1]["content"] == "long"
        return Reply(status=400, body=b"context too long") if long else "ok"

    with JudgeServer(script) as server:
        replies = Judge(server.config(), Store(tmp_path)).ask(
            [conversation("long"), conversation("short")]
        )
        assert [reply.text for reply in replies] == [None, "ok"]
        assert len(server.requests) == 2


def test_a_wrong_key_ends_the_run_names_the_status_and_shows_no_key(tmp_path, monkeypatch):
    secret = "sk-very-secret-1234"
    monkeypatch.setenv("JUDGE_KEY", secret)

    def script(number, request):
        if number < 2:
            return "kept"
        return Reply(status=401, body=f"Incorrect API key provided: {secret}".encode())

    with JudgeServer(script) as server:
        judge = Judge(server.config(api_key_env="JUDGE_KEY", concurrency=1), Store(tmp_path))
        with pytest.raises(EvaluationError) as caught:
            judge.ask([conversation(str(i)) for i in range(50)])
        assert "HTTP 401" in str(caught.value) and "2 of 50 judgements are kept" in str(
            caught.value
        )
        assert secret not in str(caught.value) and "***" in str(caught.value)
        assert len(server.requests) == 3  # not 50
        assert server.headers[0]["Authorization"] == f"Bearer {secret}"
        assert len(files(tmp_path)) == 2
        assert all(secret not in path.read_text() for path in files(tmp_path))
        assert secret not in repr(judge.config)


def test_a_redirect_is_not_followed_so_the_key_goes_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with JudgeServer(echo) as other:
        redirect = Reply(status=302, headers={"Location": f"{other.url}/chat/completions"})
        with JudgeServer(lambda number, request: redirect) as server:
            judge = Judge(server.config(api_key_env="JUDGE_KEY"), Store(tmp_path))
            (reply,) = judge.ask([conversation("x")])
        assert reply.text is None and "HTTP 302" in reply.error
        assert not other.requests


def test_a_dead_endpoint_fails_after_its_attempts(tmp_path):
    with JudgeServer(echo) as server:
        config = server.config(max_attempts=2)
    (reply,) = Judge(config, Store(tmp_path)).ask([conversation("x")])
    assert reply.text is None and "refused" in reply.error.lower() and reply.attempts == 2


def test_a_reply_of_no_text_or_broken_unicode_is_kept(tmp_path):
    replies = {
        "null": b'{"choices": [{"message": {"content": null}}]}',
        "half": b'{"choices": [{"message": {"content": "\\ud800 [[7]]"}}]}',
    }

    def script(number, request):
        return Reply(body=replies[request["messages"][-1]["content"]])

    with JudgeServer(script) as server:
        judge = Judge(server.config(), Store(tmp_path))
        null, half = judge.ask([conversation("null"), conversation("half")])
        assert null.text == "" and half.text == "? [[7]]"
        assert judge.usage.without_counts == 2
        assert len(files(tmp_path)) == 2


def test_a_damaged_file_of_the_cache_is_asked_again(tmp_path):
    with JudgeServer(echo) as server:
        Judge(server.config(), Store(tmp_path)).ask([conversation("x")])
        (path,) = files(tmp_path)
        path.write_text(path.read_text()[:40])
        (reply,) = Judge(server.config(), Store(tmp_path)).ask([conversation("x")])
        assert reply.text == "heard x" and len(server.requests) == 2
        assert json.loads(path.read_text())["judgement"]["text"] == "heard x"


KILLED = """
import sys
from refscale.evaluation.judge import Judge, JudgeConfig
from refscale.storage.store import Store
config = JudgeConfig(base_url=sys.argv[1], model="scripted", concurrency=2)
conversations = [[{"role": "user", "content": str(i)}] for i in range(40)]
Judge(config, Store(sys.argv[2])).ask(conversations)
"""


def test_a_killed_run_pays_for_nothing_twice(tmp_path):
    def slow(number, request):
        return Reply(echo(number, request), delay_s=0.05)

    with JudgeServer(slow) as server:
        process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(tmp_path)])
        deadline = time.monotonic() + 30
        while len(files(tmp_path)) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.2)
        kept, before = len(files(tmp_path)), len(server.requests)
        assert 6 <= kept < 40
        judge = Judge(server.config(concurrency=8, backoff_s=1.0), Store(tmp_path))
        replies = judge.ask([conversation(str(i)) for i in range(40)])
        assert [reply.text for reply in replies] == [f"heard {i}" for i in range(40)]
        assert len(server.requests) - before == 40 - kept
        assert judge.usage.cached == kept


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[8.5]]", 8.5),
        ("[[ 9 ]]", 9),
        ("[[9/10]]", 9),
        ("Rating: [6]", 6),
        ("The **rating** is **[6]**, for the loop in arr[1] is right.", 6),
        ("My rating is [6], for the loop over arr[1] is right.", 6),
        ("All is well. [8].", 8),
        ("The code reads arr[1] and so", None),
        ("The code reads arr[1]", None),
        ("As [1] says, it is good.", None),
        ("Rating: [6]. Or rather [7]", None),
        ("[1] is cited, but the rating is [[4]]", 4),
        ("[[5]] ... so again [[5]]", 5),
        ("[[3]] or rather [[9]]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[rating]]", None),
        ("a solid seven", None),
        ("", None),
    ],
)
def test_rating_is_read_or_refused(text, rating):
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "A"),
        ("so [[B]].", "B"),
        ("[[C]]", "tie"),
        ("[[A]] first, yet in the end [[B]]", None),
        ("A is better", None),
        ("[[D]]", None),
    ],
)
def test_preference_is_read_or_refused(text, verdict):
    assert parse_preference(text) == verdict


def test_config_refuses_a_key_in_place_of_its_name_without_showing_it():
    with pytest.raises(ConfigError, match="not the key") as caught:
        judge_config(base_url="http://h/v1", model="m", api_key_env="sk-abc-123")
    assert "sk-abc-123" not in str(caught.value)
    with pytest.raises(ValueError, match="not the key") as raw:
        JudgeConfig(base_url="http://h/v1", model="m", api_key_env="sk-abc-123")
    assert "sk-abc-123" not in str(raw.value)


def test_config_names_each_defect_in_one_line():
    with pytest.raises(ConfigError) as caught:
        judge_config(base_url="ftp://h", model="m", concurrency=0)
    assert "judge base_url: must begin with http:// or https://" in str(caught.value)
    assert "judge concurrency" in str(caught.value) and "\n" not in str(caught.value)
    assert judge_config(base_url="http://h/v1/", model="m", timeout_s=None).timeout_s == 120


def test_a_named_but_unset_key_is_an_error_before_any_request(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = JudgeConfig(base_url="http://h/v1", model="m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, which is not set"):
        Judge(config, Store(tmp_path))


def test_a_win_rate_without_its_key_or_prompt_is_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = JudgeConfig(base_url="http://h/v1", model="m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, which is not set"):
        win_rate.win_rate(config)
    monkeypatch.setenv("NO_SUCH_KEY", "secret")
    assert "secret" not in repr(win_rate.win_rate(config))
    row = {"name": "pair-v1", "system_prompt": "", "prompt_template": "", "output_format": "[[A]]"}
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="have no pair-v2; they have pair-v1"):
        win_rate.win_rate(config, judge_prompts=str(path))
    win_rate.win_rate(judge_prompts=str(path))  # nobody is asked


# -- what is judged --------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CALL_AS_JSON = (
    '[{"function": {"arguments": {"city": "Zürich"}, "name": "weather"}, "type": "function"}]'
)
PARTS = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "warm?"}]


def held_out_texts(folder, *prompts):
    """What a judge is shown of held-out pairs that have these prompts."""
    rows = []
    for number, prompt in enumerate(prompts):
        sides = {
            side: [{"role": "assistant", "content": side}] if isinstance(prompt, list) else side
            for side in ("chosen", "rejected")
        }
        pair = canonical_pair({"prompt": prompt, **sides}, "trl")
        rows.append(
            {
                "pair_id": number.to_bytes(16, "big"),
                "split": HOLDOUT,
                "prompt_ids": [number],
                "conversational": pair.conversational,
                "prompt": pair.prompt_text,
            }
        )
    schema = pa.schema([CORPUS.field(name) for name in rows[0]])
    corpus = StageFolder(Store(folder), "corpus")
    corpus.begin({})
    shard = corpus.commit_shard("shard-00000", pa.Table.from_pylist(rows, schema=schema))
    corpus.finish({}, [shard], counts={}, seconds=0.0)
    return [row["text"] for row in win_rate._holdout_prompts(corpus, len(rows))]


def test_a_held_out_request_is_shown_to_the_judge_as_its_text(tmp_path):
    said = held_out_texts(tmp_path, "Is it hot?", conversation("Is it cold?"), conversation(PARTS))
    assert said == ["Is it hot?", "Is it cold?", "Is it warm?"]


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_held_out_conversation_shows_a_call_of_a_tool_where_a_turn_says_nothing(
    tmp_path, nothing
):
    calling = {"role": "assistant", "content": nothing, "tool_calls": [CALL]}
    speaking = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
    answer = {"role": "tool", "content": "17 degrees"}
    asking = {"role": "user", "content": PARTS}
    said = held_out_texts(tmp_path, [asking, calling, answer], [asking, speaking, answer])
    assert said == [
        f"user: Is it warm?\n\nassistant: {CALL_AS_JSON}\n\ntool: 17 degrees",
        "user: Is it warm?\n\nassistant: I look.\n\ntool: 17 degrees",
    ]
