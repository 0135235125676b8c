"""What the README and the docs show works as shown."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from grafting import operators
from grafting.config import ExperimentConfig, parse_config, read_config
from grafting.plan import GraftPlan
from grafting.surgery import graft

ROOT = Path(__file__).parent.parent


def blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_the_custom_operator(tiny_host, tmp_path):
    file = tmp_path / "my_operators.py"
    file.write_text(next(block for block in blocks("python") if block.startswith("# my_operators.py")))
    config = parse_config(blocks("yaml")[0])
    assert config.operators == ["my_operators.py"]
    operators.load_file(file)
    hybrid = graft(tiny_host, GraftPlan.from_config(config.graft, tiny_host))
    assert hybrid.operator("mixer.3").name == "mean_mixer"
    x = torch.randn(1, 49, 32)
    assert torch.allclose(*hybrid.operator("mixer.3")(x, (7, 7))[0, :2])


def test_the_documented_config_holds_every_key_with_its_default():
    raw = yaml.safe_load(blocks("yaml", "docs/configuration.md")[0])
    for group in raw["graft"]:
        group["slots"] = {key: value for key, value in group["slots"].items() if value is not None}
    config = parse_config(yaml.safe_dump(raw))
    default = ExperimentConfig.model_validate({"graft": raw["graft"]})
    assert config == default.model_copy(update={"evaluate": config.evaluate})

    def keys(value, prefix=""):
        if isinstance(value, dict):
            return {name for key, inner in value.items() for name in keys(inner, f"{prefix}{key}.")} | {prefix}
        return {prefix}

    documented = yaml.safe_load(blocks("yaml", "docs/configuration.md")[0])
    assert keys(documented) == keys(default.model_dump(mode="json"))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda file: file.stem)
def test_every_config_parses_and_names_known_slots_and_operators(file, tiny_host):
    config = read_config(file)
    if config.host == "embedded:digits-dit":
        assert len(GraftPlan.from_config(config.graft, tiny_host)) > 0
