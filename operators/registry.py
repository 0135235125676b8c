"""The operator contract and the registry that finds operators by name.

An operator is a module `forward(x: [B, N, D], grid: (rows, columns)) -> [B, N, D]` with N = rows × columns in
raster order. Registering one is a decorator and nothing else:

    @register("scale", kind="mixer")
    class Scale(Operator):
        class Config(OperatorConfig):
            init: float = 1.0
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from grafting.errors import UserError, nearest

Kind = Literal["mixer", "mlp", "pair"]
Grid = tuple[int, int]


class OperatorError(UserError):
    """An operator was named, configured or loaded wrongly; the message is one line for the user."""


class OperatorConfig(BaseModel):
    """Base of every operator's typed config. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Operator(nn.Module):
    """A module that can fill a slot of a host.

    Subclasses set `Config`, build their parameters in `__init__(dim, num_heads, config)` and define
    `forward(x [B, N, D], grid) -> [B, N, D]`. They may define `from_host`, `load_reference` and `flops`.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    Config: ClassVar[type[OperatorConfig]] = OperatorConfig

    def __init__(self, dim: int, num_heads: int, config: OperatorConfig) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.config = config

    @classmethod
    def from_host(cls, config: OperatorConfig, old_module: nn.Module) -> Operator:
        """Build this operator starting from the weights of the module it replaces.

        Raises OperatorError where no such start is defined.
        """
        raise OperatorError(f"operator {cls.name!r} cannot start from the host's weights; use init: fresh")

    def load_reference(self, state_dict: Mapping[str, Tensor]) -> None:
        """Read the weights of the published reference implementation under their own names, strictly."""
        load_strictly(self, state_dict)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward pass over one sample of `tokens` tokens.

        A multiply-add counts as two. The default counts every parameter matrix once per token and is exact
        only for operators without token mixing beyond their parameters.
        """
        return 2 * tokens * sum(p.numel() for p in self.parameters() if p.ndim > 1)

    def extra_repr(self) -> str:
        fields = ", ".join(f"{k}={v!r}" for k, v in self.config.model_dump().items())
        return f"dim={self.dim}" + (f", {fields}" if fields else "")


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """`load_state_dict` whose every failure is one OperatorError line naming the keys."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if missing or unexpected:
        raise OperatorError(
            f"weights do not fit {getattr(module, 'name', type(module).__name__)!r}:"
            f" missing {missing or 'none'}, unexpected {unexpected or 'none'}"
        )
    for key, value in state_dict.items():
        if own[key].shape != value.shape:
            raise OperatorError(
                f"weights do not fit {getattr(module, 'name', type(module).__name__)!r}: {key} is"
                f" {tuple(value.shape)}, expected {tuple(own[key].shape)}"
            )
    module.load_state_dict(dict(state_dict))


_registry: dict[str, type[Operator]] = {}
_loaded_files: dict[Path, str] = {}
_plugins_loaded = False
ENTRY_POINT_GROUP = "grafting.operators"
OperatorType = TypeVar("OperatorType", bound=type[Operator])


def register(name: str, *, kind: Kind) -> Callable[[OperatorType], OperatorType]:
    """Class decorator that makes an operator known under `name`.

    Raises OperatorError when another class already has the name.
    """

    def add(cls: OperatorType) -> OperatorType:
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise OperatorError(f"operator {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        cls.name, cls.kind = name, kind
        _registry[name] = cls
        return cls

    return add


def load_plugins() -> None:
    """Import, once, what installed packages offer under the entry-point group `grafting.operators`."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for entry_point in entry_points(group=ENTRY_POINT_GROUP):
            entry_point.load()


def load_file(path: str | Path) -> None:
    """Execute a Python file of the user's that registers operators. Loading a file twice has no effect.

    Raises OperatorError when the file is missing, fails to import or registers nothing.
    """
    path = Path(path).expanduser().resolve()
    if path in _loaded_files:
        return
    if not path.is_file():
        raise OperatorError(f"operator file not found: {path}")
    module_name = f"grafting_user_operators_{path.stem}_{len(_loaded_files)}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise OperatorError(f"operator file is not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    before = set(_registry)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        for name in set(_registry) - before:
            del _registry[name]
        reason = str(error).splitlines()[0] if str(error) else ""
        raise OperatorError(f"operator file {path} failed: {type(error).__name__}: {reason}") from error
    if set(_registry) == before:
        raise OperatorError(f"operator file {path} registers no operator (use @grafting.operators.register)")
    _loaded_files[path] = module_name


def names(kind: Kind | None = None) -> list[str]:
    """Names of the registered operators, sorted, optionally of one kind only."""
    load_plugins()
    return sorted(name for name, cls in _registry.items() if kind is None or cls.kind == kind)


def get(name: str) -> type[Operator]:
    """The operator class of a name. Raises OperatorError naming the nearest known name."""
    load_plugins()
    if name not in _registry:
        raise OperatorError(f"unknown operator {name!r}; {nearest(name, names())}")
    return _registry[name]


def parse_config(name: str, config: Mapping[str, Any]) -> OperatorConfig:
    """Validate an operator's config. Raises OperatorError naming the key and the nearest known one."""
    cls = get(name)
    try:
        return cls.Config.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(key, cls.Config.model_fields)
            raise OperatorError(f"operator {name!r} has no config key {key!r}; {hint}") from None
        raise OperatorError(f"operator {name!r}, config key {key!r}: {first['msg']}") from None


def build(name: str, *, dim: int, num_heads: int = 1, **config: Any) -> Operator:
    """Build a fresh operator of width `dim`, e.g. `build("hyena_x", dim=1152, kernel_size=4)`."""
    return get(name)(dim, num_heads, parse_config(name, config))
