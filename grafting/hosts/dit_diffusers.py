"""DiTs saved by diffusers' `DiTTransformer2DModel`, under our own names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grafting.errors import UserError
from grafting.hosts.dit import PUBLISHED_CLASS_DROPOUT, PUBLISHED_MLP_RATIO, Convention, sincos_2d
from grafting.hosts.state_dicts import StateDict, check_fit, first_line, located, read_state_dict

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
# facebook/DiT-XL-2-256 still names the class that held DiTs before diffusers gave them one of their own.
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")


def read_diffusers_folder(folder: Path, convention: Convention) -> tuple[dict[str, Any], StateDict]:
    """`DiT` arguments and weights of a folder that `save_pretrained` wrote, or of a pipeline's folder."""
    if (folder / "transformer" / "config.json").is_file():
        folder = folder / "transformer"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: not a folder that diffusers saved a DiT in") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is not readable JSON ({first_line(error)})") from error
    if not isinstance(config, dict) or config.get("_class_name") not in DIFFUSERS_CLASSES:
        saved = config.get("_class_name") if isinstance(config, dict) else None
        raise UserError(f"{folder / 'config.json'} describes {saved or 'no model'}, not a DiTTransformer2DModel")
    if convention == "diffusers" and config.get("norm_eps", 1e-5) != 1e-5:
        raise UserError(
            f"{folder / 'config.json'}: norm_eps {config['norm_eps']} is not diffusers' own 1e-05; use"
            " convention original"
        )
    state_dict = _read_diffusers_weights(folder)
    return located(folder, lambda: from_diffusers(config, state_dict))


def _read_diffusers_weights(folder: Path) -> StateDict:
    for suffix in (".safetensors", ".bin"):
        single = folder / f"{DIFFUSERS_WEIGHTS}{suffix}"
        if single.is_file():
            return read_state_dict(single)
        index = folder / f"{DIFFUSERS_WEIGHTS}{suffix}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                if any(Path(shard).name != shard for shard in shards):
                    raise ValueError("a shard lies outside the folder")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is not a readable index of weights ({first_line(error)})") from error
            return {key: value for shard in shards for key, value in read_state_dict(folder / shard).items()}
    raise UserError(f"{folder} has no {DIFFUSERS_WEIGHTS}.safetensors and no {DIFFUSERS_WEIGHTS}.bin")


def from_diffusers(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], StateDict]:
    """Constructor arguments and original state dict of a diffusers `DiTTransformer2DModel`.

    Queries, keys and values are joined into `qkv`; the fixed position table, which diffusers does not store,
    is computed. diffusers keeps a copy of the label and time embedders in every block and reads block i's
    there (block 0's in the final layer): DiT has one, so the copies must be exactly equal.

    Raises UserError for a config that is not a DiT's, unequal copies, and missing, unexpected or mis-shaped
    tensors.
    """
    arguments = _arguments_of_diffusers(config)
    width, patch, channels = arguments["hidden_size"], arguments["patch_size"], arguments["in_channels"]
    outputs = patch**2 * channels * (2 if arguments["learn_sigma"] else 1)
    linear = {  # original name: (diffusers name, output width, input width)
        "final_layer.adaLN_modulation.1": ("proj_out_1", 2 * width, width),
        "final_layer.linear": ("proj_out_2", outputs, width),
    }
    joined: dict[str, list[str]] = {}
    for index in range(arguments["depth"]):
        new, old = f"blocks.{index}", f"transformer_blocks.{index}"
        linear |= {
            f"{new}.adaLN_modulation.1": (f"{old}.norm1.linear", 6 * width, width),
            **{f"{new}.attn.{part}": (f"{old}.attn1.to_{part}", width, width) for part in "qkv"},
            f"{new}.attn.proj": (f"{old}.attn1.to_out.0", width, width),
            f"{new}.mlp.fc1": (f"{old}.ff.net.0.proj", 4 * width, width),
            f"{new}.mlp.fc2": (f"{old}.ff.net.2", width, 4 * width),
        }
        for kind in ("weight", "bias"):
            joined[f"{new}.attn.qkv.{kind}"] = [f"{new}.attn.{part}.{kind}" for part in "qkv"]
    embedders: dict[str, tuple[str, tuple[int, ...]]] = {
        "t_embedder.mlp.0.weight": ("timestep_embedder.linear_1.weight", (width, 256)),
        "t_embedder.mlp.0.bias": ("timestep_embedder.linear_1.bias", (width,)),
        "t_embedder.mlp.2.weight": ("timestep_embedder.linear_2.weight", (width, width)),
        "t_embedder.mlp.2.bias": ("timestep_embedder.linear_2.bias", (width,)),
        "y_embedder.embedding_table.weight": (
            "class_embedder.embedding_table.weight",
            (arguments["num_classes"] + 1, width),
        ),
    }
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "x_embedder.proj.weight": ("pos_embed.proj.weight", (width, channels, patch, patch)),
        "x_embedder.proj.bias": ("pos_embed.proj.bias", (width,)),
    }
    for name, (source, rows, columns) in linear.items():
        shapes[f"{name}.weight"] = (f"{source}.weight", (rows, columns))
        shapes[f"{name}.bias"] = (f"{source}.bias", (rows,))

    tokens = (arguments["input_size"] // patch) ** 2
    copies = [f"transformer_blocks.{index}.norm1.emb." for index in range(arguments["depth"])]
    expected = dict(shapes.values())
    expected |= {prefix + source: shape for prefix in copies for source, shape in embedders.values()}
    if "pos_embed.pos_embed" in state_dict:  # some versions stored it
        expected["pos_embed.pos_embed"] = (1, tokens, width)
    check_fit(expected, state_dict)

    converted = {name: state_dict[source] for name, (source, _) in shapes.items()}
    for name, (source, _) in embedders.items():
        converted[name] = state_dict[copies[0] + source]
        for prefix in copies[1:]:
            if not torch.equal(state_dict[prefix + source], converted[name]):
                raise UserError(
                    f"{prefix}{source} differs from the copy in block 0; DiT has one embedder for all blocks,"
                    " so weights whose copies were trained apart cannot be converted"
                )
    for name, parts in joined.items():
        converted[name] = torch.cat([converted.pop(part) for part in parts])
    stored = state_dict.get("pos_embed.pos_embed")
    converted["pos_embed"] = sincos_2d(width, math.isqrt(tokens))[None] if stored is None else stored
    return arguments, converted


def _arguments_of_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    required = {
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
    }
    for key, value in required.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: {key} is {config[key]!r}, and a DiT has {value!r}")
    sizes: dict[str, int] = {}
    defaults = {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "num_layers": 28,
        "sample_size": 32,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    for key, default in defaults.items():
        value = config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.json: {key} is {value!r}, not a positive whole number")
        sizes[key] = value
    channels, out_channels = sizes["in_channels"], config.get("out_channels")
    if out_channels not in (None, channels, 2 * channels):
        raise UserError(f"config.json: out_channels {out_channels!r} is neither {channels} nor {2 * channels}")
    hidden_size = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    if sizes["sample_size"] % sizes["patch_size"] or hidden_size % 4:
        raise UserError(
            f"config.json: sample_size {sizes['sample_size']} is not a multiple of patch_size"
            f" {sizes['patch_size']}, or the width {hidden_size} not of 4"
        )
    return {
        "input_size": sizes["sample_size"],
        "patch_size": sizes["patch_size"],
        "in_channels": channels,
        "hidden_size": hidden_size,
        "depth": sizes["num_layers"],
        "num_heads": sizes["num_attention_heads"],
        "mlp_ratio": PUBLISHED_MLP_RATIO,
        "class_dropout_prob": PUBLISHED_CLASS_DROPOUT,
        "num_classes": sizes["num_embeds_ada_norm"],
        "learn_sigma": out_channels == 2 * channels,
    }
