import contextlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grafting.config import ExperimentConfig, parse_config, read_config
from grafting.errors import UserError

MINIMAL = "graft: [{slots: {select: all}, operator: hyena_x}]"


def test_overrides_and_defaults():
    config = parse_config(
        MINIMAL, ["distill.steps=7", "finetune.lr_new=1e-4", "graft.0.operator=hyena_y", "finetune=null"]
    )
    assert config.distill.steps == 7
    assert config.graft[0].operator == "hyena_y"
    assert config.finetune is None
    assert "denoising_loss" in config.evaluate


def test_resolved_yaml_reads_back():
    config = parse_config(MINIMAL)
    assert parse_config(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("grafft: []", [], "unknown key 'grafft'; did you mean 'graft'"),
        (MINIMAL, ["distill.stepz=3"], "unknown key 'distill.stepz'; did you mean 'steps'"),
        (MINIMAL, ["distil.steps=3"], "did you mean 'distill'"),
        (MINIMAL, ["graft.3.operator=x"], "list of 1"),
        (MINIMAL, ["seed"], "key=value"),
        (MINIMAL, ["distill.lr=-1"], "distill.lr"),
        (MINIMAL, ["distill.lr=.inf"], "distill.lr"),
        (MINIMAL, ["name=../escape"], "name"),
        ("graft: []", [], "graft"),
        ("[1, 2]", [], "mapping"),
        ("a: [", [], "not valid YAML"),
    ],
)
def test_mistakes_are_one_line(text, overrides, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")) as caught:
        parse_config(text, overrides)
    assert "\n" not in str(caught.value)


def test_binary_and_missing_files(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match="cannot be read"):
        read_config(path)
    path.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(UserError, match="not a text file"):
        read_config(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([*ExperimentConfig.model_fields, "slots", "kind", "select", "indices", "steps"]) | st.text(
    max_size=6
)
configs = st.dictionaries(
    keys, values | st.dictionaries(keys, values, max_size=4) | st.lists(st.dictionaries(keys, values))
)


@settings(max_examples=300, deadline=None)
@given(
    configs | values,
    st.lists(st.text(max_size=20) | st.builds("{}.{}={}".format, keys, keys, st.text(max_size=6)), max_size=2),
)
def test_random_configs_never_give_a_traceback(config, overrides):
    message = "one line"
    try:
        parse_config(yaml.safe_dump(config), overrides)
    except UserError as error:
        message = str(error).strip()
    assert message
    assert "\n" not in message


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_random_text_never_gives_a_traceback(text):
    with contextlib.suppress(UserError):
        parse_config(text)
