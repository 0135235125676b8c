"""A DiT's architecture from its weights, and a DiT with these weights: the original's `.pt`, safetensors, or a
folder saved by diffusers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grafting.errors import UserError
from grafting.hosts.dit import PUBLISHED_CLASS_DROPOUT, PUBLISHED_MLP_RATIO, SIZES, Convention, DiT
from grafting.hosts.dit_diffusers import read_diffusers_folder
from grafting.hosts.state_dicts import check_fit, listed, located, read_state_dict, shape_of


def architecture_of(
    state_dict: Mapping[str, Tensor], num_heads: int | None = None, *, num_classes: int | None = None
) -> dict[str, Any]:
    """Arguments of the `DiT` constructor that the shapes of an original state dict tell.

    Shapes do not tell the number of heads: without `num_heads` it is that of the standard size with the same
    depth and width. Nor do they tell whether the last label is the null class: it is, as in every published
    DiT, unless `num_classes` equals the number of rows. Blocks may hold other operators than attention and
    MLP; then `mlp_ratio` is 4 if any block has it, else the commonest.

    Raises UserError when the keys or shapes are not a DiT's, or the number of heads is needed.
    """
    wanted = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "y_embedder.embedding_table.weight": 2,
        "blocks.0.adaLN_modulation.1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    missing = [key for key in wanted if key not in state_dict]
    if missing:
        hint = (
            "; these are diffusers' names: give the folder that save_pretrained wrote"
            if any(key.startswith("transformer_blocks.") for key in state_dict)
            else ""
        )
        raise UserError(f"not the weights of a DiT: missing {listed(missing)}{hint}")
    for key, ndim in wanted.items():
        if state_dict[key].ndim != ndim:
            raise UserError(f"not the weights of a DiT: {key} is {shape_of(state_dict[key])}, not {ndim}-dimensional")

    hidden_size, in_channels, patch_size, patch_columns = state_dict["x_embedder.proj.weight"].shape
    tokens = state_dict["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    if hidden_size < 4 or hidden_size % 4 or in_channels < 1:
        raise UserError(f"not the weights of a DiT: {in_channels} latent channels and width {hidden_size}")
    if patch_size != patch_columns or patch_size < 1 or side * side != tokens or tokens < 1:
        raise UserError(
            f"not the weights of a DiT: patches of {patch_size}×{patch_columns} on {tokens} positions do not"
            " make a square"
        )
    blocks = {int(match[1]) for key in state_dict if (match := re.match(r"blocks\.(\d+)\.", key))}
    depth = len(blocks)
    if blocks != set(range(depth)):
        raise UserError(f"not the weights of a DiT: block {min(set(range(depth)) - blocks)} of {depth} is missing")
    outputs = state_dict["final_layer.linear.weight"].shape[0]
    if outputs not in (patch_size**2 * in_channels, 2 * patch_size**2 * in_channels):
        raise UserError(
            f"not the weights of a DiT: final_layer.linear.weight has {outputs} rows for {in_channels} latent"
            f" channels in patches of {patch_size}×{patch_size}"
        )
    rows = state_dict["y_embedder.embedding_table.weight"].shape[0]
    if num_classes is None:
        num_classes = rows - 1
    if rows - num_classes not in (0, 1) or num_classes < 1:
        raise UserError(f"num_classes {num_classes} does not fit y_embedder.embedding_table.weight with {rows} rows")
    return {
        "input_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": _heads(num_heads, depth, hidden_size),
        "mlp_ratio": _mlp_ratio(state_dict, depth, hidden_size),
        "class_dropout_prob": PUBLISHED_CLASS_DROPOUT if rows > num_classes else 0.0,
        "num_classes": num_classes,
        "learn_sigma": outputs == 2 * patch_size**2 * in_channels,
    }


def _heads(num_heads: int | None, depth: int, hidden_size: int) -> int:
    if num_heads is None:
        for standard_depth, width, _, heads in SIZES.values():
            if (standard_depth, width) == (depth, hidden_size):
                return heads
        raise UserError(
            f"weights do not tell the number of attention heads, and {depth} blocks of width {hidden_size}"
            " are no standard size; give num_heads"
        )
    if num_heads < 1 or hidden_size % num_heads:
        raise UserError(f"num_heads {num_heads} does not divide the width {hidden_size} of these weights")
    return num_heads


def _mlp_ratio(state_dict: Mapping[str, Tensor], depth: int, hidden_size: int) -> float:
    weights = [state_dict.get(f"blocks.{index}.mlp.fc1.weight") for index in range(depth)]
    ratios = Counter(expansion_ratio_of(w.shape[0], hidden_size) for w in weights if w is not None and w.ndim == 2)
    if not ratios or PUBLISHED_MLP_RATIO in ratios:
        return PUBLISHED_MLP_RATIO
    return ratios.most_common(1)[0][0]


def expansion_ratio_of(hidden: int, dim: int) -> float:
    """The ratio from which `int(dim * ratio)` gives `hidden` again."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def load_dit(
    path: str | Path,
    num_heads: int | None = None,
    convention: Convention = "original",
    *,
    num_classes: int | None = None,
) -> DiT:
    """A DiT in float32 from an original weights file, or from a folder of diffusers.

    The folder is what `DiTTransformer2DModel.save_pretrained` wrote, or a whole `DiTPipeline`. By default the
    network computes what the original does; `convention="diffusers"` follows diffusers' own deviations, the
    time sinusoid and the second norm's eps. `num_heads` and `num_classes` are those of `architecture_of`.

    Raises UserError when the weights cannot be read or do not fit key for key.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        arguments, state_dict = read_diffusers_folder(path, convention)
        for name, given in (("num_heads", num_heads), ("num_classes", num_classes)):
            if given is not None and given != arguments[name]:
                raise UserError(f"{path}: its config.json says {name} {arguments[name]}, not {given}")
    else:
        state_dict = read_state_dict(path)
        arguments = located(path, lambda: architecture_of(state_dict, num_heads, num_classes=num_classes))
    return located(path, lambda: filled(empty_dit(arguments, convention), state_dict))


def empty_dit(arguments: Mapping[str, Any], convention: Convention) -> DiT:
    """A DiT with uninitialised weights: initialising 675 million parameters to overwrite them takes long."""
    with torch.device("meta"):
        model = DiT(**arguments, convention=convention)
    return model.to_empty(device="cpu")


def filled(model: DiT, state_dict: Mapping[str, Tensor]) -> DiT:
    """The model with these weights, which must fit key for key and shape for shape; in evaluation mode."""
    check_fit({key: tuple(value.shape) for key, value in model.state_dict().items()}, state_dict)
    model.load_state_dict(dict(state_dict))
    return model.eval()
