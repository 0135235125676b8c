"""Finding, configuring and registering operators; every misuse is one line."""

from __future__ import annotations

import pytest
import torch

from grafting import operators
from grafting.errors import UserError
from grafting.operators import Operator, OperatorConfig, OperatorError, registry

CUSTOM = '''
import torch
from torch import nn
from grafting.operators import Operator, OperatorConfig, register

@register("scale", kind="mixer")
class Scale(Operator):
    """Multiplies tokens by learned factors."""

    class Config(OperatorConfig):
        start: float = 2.0

    def __init__(self, dim, num_heads, config):
        super().__init__(dim, num_heads, config)
        self.factors = nn.Parameter(torch.full((dim,), config.start))

    def forward(self, x, grid):
        return x * self.factors
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "_loaded_files", dict(registry._loaded_files))


def error_of(action):
    with pytest.raises(OperatorError) as caught:
        action()
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_by_kind():
    assert {"attention", "sliding_window", "hyena_x", "hyena_y", "hyena_se"} <= set(operators.names("mixer"))
    assert {"mlp", "hyena_x_mlp"} <= set(operators.names("mlp"))
    assert not set(operators.names("mixer")) & set(operators.names("mlp"))
    assert operators.names() == sorted(operators.names())


@pytest.mark.parametrize("name", operators.names())
def test_every_operator_keeps_the_contract(name):
    grid, dim = (16, 16), 8
    operator = operators.build(name, dim=dim, num_heads=2)
    x = torch.randn(2, 256, dim, requires_grad=True)
    out = operator(x, grid)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in operator.parameters())
    assert x.grad is not None
    assert operator.flops(256) > 0
    assert operator.__doc__


def test_unknown_operator_names_the_nearest():
    assert "did you mean 'hyena_x'" in error_of(lambda: operators.build("hyenax", dim=8))
    assert "known: attention" in error_of(lambda: operators.get("zzz"))


def test_unknown_config_key_names_the_nearest():
    message = error_of(lambda: operators.build("hyena_x", dim=8, kernel_sise=4))
    assert "'hyena_x'" in message
    assert "'kernel_sise'" in message
    assert "did you mean 'kernel_size'" in message
    assert "known: none" in error_of(lambda: operators.build("attention", dim=8, window=4))


@pytest.mark.parametrize(("key", "value"), [("kernel_size", 0), ("kernel_size", "four"), ("kernel_size", None)])
def test_bad_config_value_names_the_key(key, value):
    message = error_of(lambda: operators.parse_config("hyena_x", {key: value}))
    assert "'hyena_x'" in message
    assert "'kernel_size'" in message


def test_a_config_is_frozen():
    config = operators.parse_config("hyena_x", {"kernel_size": 5})
    assert config.model_dump() == {"kernel_size": 5}
    with pytest.raises(ValueError, match="frozen"):
        config.kernel_size = 6


def test_a_name_is_registered_once():
    @operators.register("twice", kind="mixer")
    class First(Operator):
        def forward(self, x, grid):
            return x

    message = error_of(lambda: operators.register("twice", kind="mlp")(type("Second", (Operator,), {})))
    assert "'twice' is already registered" in message
    assert "First" in message
    assert operators.get("twice") is First


def test_the_same_class_may_be_registered_again():
    cls = operators.get("mlp")
    assert operators.register("mlp", kind="mlp")(cls) is cls


def test_custom_operator_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM)
    operators.load_file(file)
    assert "scale" in operators.names("mixer")
    operator = operators.build("scale", dim=3, start=0.5)
    assert torch.equal(operator(torch.ones(1, 2, 3), (1, 2)), torch.full((1, 2, 3), 0.5))
    assert "did you mean 'start'" in error_of(lambda: operators.build("scale", dim=3, strat=1.0))


def test_a_file_is_loaded_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM)
    operators.load_file(file)
    cls = operators.get("scale")
    operators.load_file(str(file))
    assert operators.get("scale") is cls


def test_missing_file(tmp_path):
    assert "mine.py" in error_of(lambda: operators.load_file(tmp_path / "mine.py"))


def test_file_that_registers_nothing(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    assert "registers no operator" in error_of(lambda: operators.load_file(file))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module_anywhere\n", "no_such_module_anywhere"),
        (CUSTOM + "\nraise ValueError('first line\\nsecond line')\n", "ValueError: first line"),
        (CUSTOM.replace('"scale"', '"hyena_x"'), "already registered"),
    ],
)
def test_file_that_fails(tmp_path, source, words):
    file = tmp_path / "broken.py"
    file.write_text(source)
    before = operators.names()
    message = error_of(lambda: operators.load_file(file))
    assert words in message
    assert "broken.py" in message
    assert operators.names() == before


def test_a_file_that_failed_can_be_mended(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM + "\nraise ValueError('not yet')\n")
    error_of(lambda: operators.load_file(file))
    file.write_text(CUSTOM)
    operators.load_file(file)
    assert "scale" in operators.names()


def test_plugin_package_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "grafting_plugin_for_test.py").write_text(CUSTOM.replace('"scale"', '"plugged"'))
    info = tmp_path / "grafting_plugin_for_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: grafting-plugin-for-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[grafting.operators]\nplugged = grafting_plugin_for_test\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    assert "plugged" in operators.names("mixer")
    assert operators.build("plugged", dim=3).config.start == 2.0


def test_an_operator_without_from_host_or_flops_has_the_defaults():
    @operators.register("plain", kind="mixer")
    class Plain(Operator):
        def __init__(self, dim, num_heads, config):
            super().__init__(dim, num_heads, config)
            self.linear = torch.nn.Linear(dim, dim)

        def forward(self, x, grid):
            return self.linear(x)

    operator = operators.build("plain", dim=3)
    assert operator.flops(5) == 2 * 5 * 9
    assert "use init: fresh" in error_of(lambda: Plain.from_host(OperatorConfig(), operator))
