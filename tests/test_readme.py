"""What the README shows works as shown."""

import re
from pathlib import Path

import torch

from grafting import operators
from grafting.config import parse_config
from grafting.plan import GraftPlan
from grafting.surgery import graft

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


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
