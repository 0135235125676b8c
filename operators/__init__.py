"""Operators that can fill a host's slots, found by name. One file per family."""

from grafting.operators import attention, hyena, mlp
from grafting.operators.registry import (
    Grid,
    Kind,
    Operator,
    OperatorConfig,
    OperatorError,
    build,
    get,
    load_file,
    names,
    parse_config,
    register,
)

__all__ = [
    "Grid",
    "Kind",
    "Operator",
    "OperatorConfig",
    "OperatorError",
    "attention",
    "build",
    "get",
    "hyena",
    "load_file",
    "mlp",
    "names",
    "parse_config",
    "register",
]
