"""The published grafted checkpoints of "Exploring Diffusion Transformer Designs via Grafting" (arXiv 2506.05340),
whose keys tell the operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from grafting import operators
from grafting.errors import UserError
from grafting.hosts.dit import PUBLISHED_MLP_RATIO, SIZES, DiT
from grafting.hosts.dit_weights import architecture_of, empty_dit, expansion_ratio_of, filled
from grafting.hosts.state_dicts import StateDict, below, listed, located, read_state_dict

# Slot name, operator name, operator config.
Entry: TypeAlias = tuple[str, str, dict[str, Any]]


def import_plan(
    state_dict: Mapping[str, Tensor],
    num_heads: int | None = None,
    window: int = 4,
    *,
    num_classes: int | None = None,
) -> list[Entry]:
    """Which slots of a published grafted checkpoint hold which operator: `(slot, operator, config)` in order.

    The operator is recognised by its parameters' names and its config read from their shapes; the window of
    sliding-window attention, which no shape tells, is `window`. Slots with the host's own layer have no
    entry. An MLP is the host's own at ratio 4 when depth and width are those of a standard size.

    Raises UserError listing the keys that no operator explains.
    """
    return _import_plan(state_dict, _host_arguments(state_dict, num_heads, num_classes), window)


def _host_arguments(state_dict: Mapping[str, Tensor], num_heads: int | None, num_classes: int | None) -> dict[str, Any]:
    """`architecture_of` the host that was grafted, even if no MLP of its own is left."""
    arguments = architecture_of(state_dict, num_heads, num_classes=num_classes)
    if any(size[:2] == (arguments["depth"], arguments["hidden_size"]) for size in SIZES.values()):
        arguments["mlp_ratio"] = PUBLISHED_MLP_RATIO
    return arguments


def _import_plan(state_dict: Mapping[str, Tensor], arguments: Mapping[str, Any], window: int) -> list[Entry]:
    entries: list[Entry] = []
    unplaceable: dict[str, list[str]] = {}
    for kind, attribute in (("mixer", "attn"), ("mlp", "mlp")):
        for index in range(arguments["depth"]):
            weights = below(state_dict, f"blocks.{index}.{attribute}.")
            names = frozenset(key.removesuffix(".weight") for key in weights if key.endswith(".weight"))
            if not _well_formed(names, weights):
                operator = None
            elif kind == "mixer":
                operator = _recognise_mixer(names, weights, window)
            else:
                operator = _recognise_mlp(names, weights, arguments["hidden_size"])
            if operator is None:
                unplaceable[f"blocks.{index}.{attribute}"] = sorted(weights)
            elif operator not in (("attention", {}), ("mlp", {"expansion_ratio": arguments["mlp_ratio"]})):
                entries.append((f"{kind}.{index}", *operator))
    if unplaceable:
        place, keys = next(iter(unplaceable.items()))
        others = f"; nor those of {listed(list(unplaceable)[1:])}" if len(unplaceable) > 1 else ""
        raise UserError(f"no known operator has the weights of {place}: {listed(keys, limit=16)}{others}")
    return entries


def _well_formed(names: frozenset[str], weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights and biases of linear layers and depthwise filters, and nothing else."""
    if frozenset(weights) != {f"{name}.{part}" for name in names for part in ("weight", "bias")}:
        return False
    return all(weights[f"{name}.weight"].ndim == (3 if name.endswith("_filter") else 2) for name in names)


def _recognise_mixer(
    names: frozenset[str], weights: Mapping[str, Tensor], window: int
) -> tuple[str, dict[str, Any]] | None:
    if names == {"qkv", "proj"}:
        return "attention", {}
    if names == {"Wqkv", "out_proj"}:
        return "sliding_window", {"window": window}
    filters = {
        frozenset({"short_filter", "inner_filter"}): "hyena_se",
        frozenset({"short_filter"}): "hyena_x",
        frozenset({"inner_filter"}): "hyena_y",
    }
    found = names - {"in_proj", "out_proj"}
    if {"in_proj", "out_proj"} <= names and found in filters:
        return filters[found], {"kernel_size": weights[f"{min(found)}.weight"].shape[-1]}
    return None


def _recognise_mlp(names: frozenset[str], weights: Mapping[str, Tensor], dim: int) -> tuple[str, dict[str, Any]] | None:
    if names == {"fc1", "fc2"}:
        return "mlp", {"expansion_ratio": expansion_ratio_of(weights["fc1.weight"].shape[0], dim)}
    if names == {"in_proj", "out_proj", "short_filter"}:
        tokens, _, width = weights["short_filter.weight"].shape
        ratio = expansion_ratio_of(weights["out_proj.weight"].shape[-1], dim)
        return "hyena_x_mlp", {"tokens": tokens, "expansion_ratio": ratio, "kernel_size": width}
    return None


def load_grafted(
    path: str | Path, num_heads: int | None = None, window: int = 4, *, num_classes: int | None = None
) -> tuple[DiT, list[Entry]]:
    """The DiT of a published grafted checkpoint, operators in place, in float32; and `import_plan`'s entries.

    Raises UserError when the weights cannot be read, hold an operator that is not known, or do not fit key
    for key.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the weights file of a grafted checkpoint")
    state_dict = read_state_dict(path)
    return located(path, lambda: _build_grafted(state_dict, num_heads, window, num_classes))


def _build_grafted(
    state_dict: StateDict, num_heads: int | None, window: int, num_classes: int | None
) -> tuple[DiT, list[Entry]]:
    arguments = _host_arguments(state_dict, num_heads, num_classes)
    entries = _import_plan(state_dict, arguments, window)
    model = empty_dit(arguments, "original")
    state_dict = dict(state_dict)
    for slot, name, config in entries:
        kind, _, index = slot.partition(".")
        attribute = "attn" if kind == "mixer" else "mlp"
        prefix = f"blocks.{index}.{attribute}."
        operator = operators.build(name, dim=arguments["hidden_size"], num_heads=arguments["num_heads"], **config)
        try:
            operator.load_reference(below(state_dict, prefix))
        except UserError as error:
            raise UserError(f"slot {slot}: {error}") from error
        setattr(model.blocks[int(index)], attribute, operator)
        # From here on under our own names, so that one strict pass covers the whole model.
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
        state_dict |= {prefix + key: value for key, value in operator.state_dict().items()}
    return filled(model, state_dict), entries
