import json

import pytest
import yaml

from refscale.config import Config, SelectConfig, dump_config, parse_config
from refscale.config_file import load_config
from refscale.errors import ConfigError

MINIMAL = {"model": {"model_name_or_path": "m"}, "corpus": {"sources": [{"path": "a.jsonl"}]}}


@pytest.fixture
def write(tmp_path):
    def write_config(data) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return str(path)

    return write_config


def test_resolved_config_reads_back_to_the_same_config(write):
    config = load_config(write(MINIMAL), ["train.learning_rate=1e-5", "select.count=10"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert config.train.learning_rate == 1e-5
    assert (config.select.count, config.select.fraction) == (10, None)


def test_default_selection_is_the_largest_half_by_mean_margin(write):
    select = load_config(write(MINIMAL)).select
    assert (select.strategy, select.keep, select.fraction) == ("mean_margin", "largest", 0.5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rte=1", "unknown key train.learning_rte; did you mean learning_rate?"),
        ("selct.fraction=1", "unknown key selct; did you mean select?"),
        ("corpus.sources.0.formt=hh", "did you mean format?"),
        ("corpus.sources.7.format=hh", "'7' is not an index below 1"),
        ("select.fraction=10", "select.fraction: input should be less than or equal to 1, got 10"),
        ("select.threshold=.nan", "select.threshold: input should be a finite number, got nan"),
        ("select.keep=band", "keep: band and band: [low, high] go together"),
        ("ray.replicas={min: 3, max: 1}", "min 3 is larger than max 1"),
        ("train.max_grad_norm=.inf", "train.max_grad_norm: input should be a finite number, got"),
        ("ray.wait_for_room_s=.inf", "ray.wait_for_room_s: input should be a finite number, got"),
        ("train.learning_rate=1e999", "train.learning_rate: input should be a finite number, got"),
        ("select.band=[0, .nan]", "select.band.1: input should be a finite number, got nan"),
        ("train.trl.adam_epsilon=.inf", "train.trl: adam_epsilon should be a finite number, got"),
        ("train.peft={a: [1, -.inf]}", "train.peft: a.1 should be a finite number, got -inf"),
        ("train.deepspeed={a: {b: .nan}}", "train.deepspeed: a.b should be a finite number, got"),
        ("train.deepspeed=zero4", "train.deepspeed: got 'zero4'; did you mean zero3? It must be"),
        ("train.deepspeed=false", "train.deepspeed: got False; it must be one of zero1, zero2"),
        ("ray.replicas=many", "ray.replicas: input should be a valid integer"),
        ("ray.replicas={min: 1, mx: 2}", "unknown key ray.replicas.mx; did you mean max?"),
        ("nonsense", "--set needs section.key=value"),
        ("corpus.sources.0.columns={chosn: x}", "columns maps chosn"),
    ],
)
def test_wrong_override_is_one_line_with_value_and_rule(write, override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(write(MINIMAL), [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "train.deepspeed=zero4",
        "train.deepspeed=3",
        "ray.replicas={min: 4, max: 2}",
        "ray.replicas=many",
        "ray.replicas=0",
        "ray.replicas={min: x}",
    ],
)
def test_a_value_of_several_kinds_is_explained_once(write, override):
    with pytest.raises(ConfigError) as caught:
        load_config(write(MINIMAL), [override])
    said = str(caught.value)
    key = override.partition("=")[0]
    assert said.count(f"{key}") == 1 and "Replicas" not in said, said


def test_an_empty_section_is_one_of_defaults(write):
    text = yaml.safe_dump(MINIMAL) + "select:\nray:\n"
    config = load_config(write(text))
    assert config.select.fraction == 0.5 and config.ray.replicas == 1
    assert load_config(write(text), ["select.count=3"]).select.count == 3
    with pytest.raises(ConfigError, match="model is required"):
        load_config(write("model:\ncorpus: {sources: [{path: a}]}"))
    with pytest.raises(ConfigError, match="unknown key selct; did you mean select"):
        load_config(write(yaml.safe_dump(MINIMAL) + "selct:\n"))


def test_an_overriding_size_replaces_the_files(write):
    path = write({**MINIMAL, "select": {"fraction": 0.3}})
    select = load_config(path, ["select.keep=band", "select.band=[0.2,0.5]"]).select
    assert (select.band, select.fraction) == ((0.2, 0.5), None)
    path = write({**MINIMAL, "select": {"keep": "band", "band": [0.2, 0.5]}})
    select = load_config(path, ["select.keep=largest", "select.count=7"]).select
    assert (select.band, select.count) == (None, 7)


@pytest.mark.parametrize("packed", ["on", "off"])
def test_on_and_off_are_words_in_the_file_and_on_the_command_line(write, packed):
    text = yaml.safe_dump(MINIMAL) + f"train: {{packed: {packed}}}\n"
    assert load_config(write(text)).train.packed == packed
    assert load_config(write(MINIMAL), [f"train.packed={packed}"]).train.packed == packed


def test_a_number_with_an_exponent_is_one_also_where_any_value_goes(write):
    text = (
        yaml.safe_dump(MINIMAL) + "train: {trl: {adam_epsilon: 1e-8}, peft: {lora_dropout: .1}}\n"
    )
    train = load_config(write(text), ["train.trl.adam_beta2=9.5E-1"]).train
    assert train.trl == {"adam_epsilon": 1e-8, "adam_beta2": 0.95}
    assert train.peft == {"lora_dropout": 0.1}


def test_a_section_that_is_written_twice_is_refused(write):
    text = "train: {beta: 0.2}\n" + yaml.safe_dump(MINIMAL) + "train: {seed: 1}\n"
    with pytest.raises(ConfigError, match="at line 7: the key train occurs twice"):
        load_config(write(text))


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "model: {}"])
def test_broken_file_is_a_config_error(write, text):
    with pytest.raises(ConfigError):
        load_config(write(text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))


def test_relative_paths_are_relative_to_the_config_file(write, tmp_path):
    (tmp_path / "m").mkdir()
    config = load_config(write(MINIMAL))
    assert config.corpus.sources[0].path == str(tmp_path / "a.jsonl")
    assert config.model.model_name_or_path == str(tmp_path / "m")


def test_a_deepspeed_config_named_by_its_path_is_read_into_the_config(write, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    for name in ("ds.json", "./ds.json", str(tmp_path / "ds.json")):
        config = load_config(write({**MINIMAL, "train": {"deepspeed": name}}))
        assert config.train.deepspeed == {"zero_optimization": {"stage": 1}}
    config = load_config(write(MINIMAL), ["train.deepspeed=ds.json"])
    # So it travels with a submitted job, whose nodes do not have the file.
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    (tmp_path / "bad.json").write_text("{zero: 1}")
    (tmp_path / "list.json").write_text("[1]")
    for name, said in (
        ("absent.json", "absent.json cannot be read as JSON: .*No such file.*; give a preset"),
        ("bad.json", r"bad\.json cannot be read as JSON: Expecting property name"),
        ("list.json", r"list\.json must hold a JSON object, got list"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            load_config(write(MINIMAL), [f"train.deepspeed={name}"])
        assert "\n" not in str(caught.value)


def test_a_key_of_a_deepspeed_config_changes_what_the_file_holds(write, tmp_path):
    held = {"zero_optimization": {"stage": 1, "overlap_comm": True}, "gradient_clipping": 0.5}
    (tmp_path / "ds.json").write_text(json.dumps(held))
    path = write({**MINIMAL, "train": {"deepspeed": "ds.json"}})
    inside = "train.deepspeed.zero_optimization.stage=3"
    changed = {**held, "zero_optimization": {"stage": 3, "overlap_comm": True}}
    assert load_config(path, [inside]).train.deepspeed == changed
    named = ["train.deepspeed=ds.json", inside]
    assert load_config(write(MINIMAL), named).train.deepspeed == changed
    # One that is replaced whole need not be there.
    path = write({**MINIMAL, "train": {"deepspeed": "absent.json"}})
    assert load_config(path, ["train.deepspeed=zero3"]).train.deepspeed == "zero3"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.deepspeed=zero2", "train.deepspeed.gradient_clipping=0.5"],
            "--set train.deepspeed.gradient_clipping: train.deepspeed is 'zero2' and has no keys;"
            " set train.deepspeed itself",
        ),
        (["ray.replicas=2", "ray.replicas.max=8"], "ray.replicas is 2 and has no keys"),
        (["train.report_to=[wandb]", "train.report_to.0.x=1"], "train.report_to.0 is 'wandb' and"),
    ],
    ids=["preset", "number", "item"],
)
def test_a_key_below_a_value_is_refused_and_the_value_not_dropped(write, overrides, said):
    with pytest.raises(ConfigError) as caught:
        load_config(write(MINIMAL), overrides)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_below_nothing_makes_a_section(write):
    nothing = write({**MINIMAL, "train": {"deepspeed": None, "peft": None}})
    below = ["train.deepspeed.zero_optimization.stage=1", "train.peft.r=4"]
    train = load_config(nothing, below).train
    assert (train.deepspeed, train.peft) == ({"zero_optimization": {"stage": 1}}, {"r": 4})
    assert load_config(write(MINIMAL), ["train.trl.adam_beta2=0.9"]).train.trl["adam_beta2"] == 0.9


def test_hub_id_that_is_no_folder_stays_as_it_is(write):
    data = {**MINIMAL, "model": {"model_name_or_path": "org/name"}}
    assert load_config(write(data)).model.model_name_or_path == "org/name"


def test_every_field_of_the_schema_that_is_not_self_evident_is_described():
    schema = json.dumps(Config.model_json_schema())
    assert '"additionalProperties": false' in schema


def test_a_selection_that_matches_no_lengths_has_the_fingerprint_it_had_before():
    plain, matched = SelectConfig(), SelectConfig(match_lengths=True)
    assert "match_lengths" not in plain.deciding_options()
    assert {**plain.deciding_options(), "match_lengths": True} == matched.deciding_options()
