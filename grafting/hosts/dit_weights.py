"""Weights of a DiT in every published form, read into our own DiT.

The original's `.pt` (with or without `{"ema": …}` around it), safetensors, a folder saved by diffusers, and
the grafted checkpoints of "Exploring Diffusion Transformer Designs via Grafting" (arXiv 2506.05340), whose
keys tell the operators. Nothing is executed: pickles that want to call anything are refused.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from grafting import operators
from grafting.errors import UserError
from grafting.hosts.dit import SIZES, Convention, DiT, sincos_2d

StateDict: TypeAlias = dict[str, Tensor]
# Slot name, operator name, operator config.
Entry: TypeAlias = tuple[str, str, dict[str, Any]]
Result = TypeVar("Result")

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
# facebook/DiT-XL-2-256 still names the class that held DiTs before diffusers gave them one of their own.
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
PUBLISHED_MLP_RATIO = 4.0
PUBLISHED_CLASS_DROPOUT = 0.1


def read_state_dict(path: str | Path) -> StateDict:
    """Tensors by name of a `.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin` file, on the CPU, as stored.

    Of a training checkpoint the `ema` weights are taken, else `model`, else `state_dict`; a prefix `module.`
    or `_orig_mod.` that all keys have is dropped. Pickles are read by torch's weights-only unpickler.

    Raises UserError when the file is missing, damaged, of another format, holds anything but tensors or would
    have to execute code.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"weights not found: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the weights file in it")
    if path.suffix == ".safetensors":
        try:
            loaded: Any = load_safetensors(path)
        except Exception as error:  # SafetensorError, OSError
            raise UserError(f"{path} is not a readable safetensors file ({_first_line(error)})") from error
    elif path.suffix in PICKLE_SUFFIXES:
        loaded = _load_pickle(path)
    else:
        known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise UserError(f"{path} is not a weights file; expected one that ends in {known}")
    return _flat_state_dict(loaded, path)


def _load_pickle(path: Path) -> Any:
    load: Callable[..., Any] = torch.load
    try:
        # The original's training script stores its arguments as an argparse.Namespace: plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            with path.open("rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"  # only torch's own zip format can be memory-mapped
            return load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever a damaged pickle makes the unpickler stumble on
        forbidden = re.search(r"GLOBAL\s+`?([\w.]+)", str(error))
        if forbidden:
            raise UserError(
                f"{path} is refused: its pickle asks for {forbidden[1]}, and only tensors and plain data are"
                " read; save the state dict alone, best as safetensors"
            ) from error
        raise UserError(
            f"{path} is not a readable PyTorch weights file: truncated, or of another format; get it again"
        ) from error


def _flat_state_dict(loaded: Any, path: Path) -> StateDict:
    """The tensors of what a file holds, unwrapped."""
    while isinstance(loaded, Mapping):
        wrapper = next((key for key in ("ema", "model", "state_dict") if isinstance(loaded.get(key), Mapping)), None)
        if wrapper is None:
            break
        loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds no state dict but a {type(loaded).__name__}")
    odd = [str(key) for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise UserError(f"{path} holds no state dict: no tensor under {_listed(odd)}")
    if not loaded:
        raise UserError(f"{path} holds no weights")
    state_dict = dict(loaded)
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


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
        raise UserError(f"not the weights of a DiT: missing {_listed(missing)}{hint}")
    for key, ndim in wanted.items():
        if state_dict[key].ndim != ndim:
            raise UserError(f"not the weights of a DiT: {key} is {_shape(state_dict[key])}, not {ndim}-dimensional")

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
    ratios = Counter(_ratio(w.shape[0], hidden_size) for w in weights if w is not None and w.ndim == 2)
    if not ratios or PUBLISHED_MLP_RATIO in ratios:
        return PUBLISHED_MLP_RATIO
    return ratios.most_common(1)[0][0]


def _ratio(hidden: int, dim: int) -> float:
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
        arguments, state_dict = _read_diffusers_folder(path, convention)
        for name, given in (("num_heads", num_heads), ("num_classes", num_classes)):
            if given is not None and given != arguments[name]:
                raise UserError(f"{path}: its config.json says {name} {arguments[name]}, not {given}")
    else:
        state_dict = read_state_dict(path)
        arguments = _located(path, lambda: architecture_of(state_dict, num_heads, num_classes=num_classes))
    return _located(path, lambda: _filled(_empty_dit(arguments, convention), state_dict))


def _read_diffusers_folder(folder: Path, convention: Convention) -> tuple[dict[str, Any], StateDict]:
    if (folder / "transformer" / "config.json").is_file():
        folder = folder / "transformer"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: not a folder that diffusers saved a DiT in") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is not readable JSON ({_first_line(error)})") from error
    if not isinstance(config, dict) or config.get("_class_name") not in DIFFUSERS_CLASSES:
        saved = config.get("_class_name") if isinstance(config, dict) else None
        raise UserError(f"{folder / 'config.json'} describes {saved or 'no model'}, not a DiTTransformer2DModel")
    if convention == "diffusers" and config.get("norm_eps", 1e-5) != 1e-5:
        raise UserError(
            f"{folder / 'config.json'}: norm_eps {config['norm_eps']} is not diffusers' own 1e-05; use"
            " convention original"
        )
    state_dict = _read_diffusers_weights(folder)
    return _located(folder, lambda: from_diffusers(config, state_dict))


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
                raise UserError(f"{index} is not a readable index of weights ({_first_line(error)})") from error
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
    _check(expected, state_dict)

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
            weights = _below(state_dict, f"blocks.{index}.{attribute}.")
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
        others = f"; nor those of {_listed(list(unplaceable)[1:])}" if len(unplaceable) > 1 else ""
        raise UserError(f"no known operator has the weights of {place}: {_listed(keys, limit=16)}{others}")
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
        return "mlp", {"expansion_ratio": _ratio(weights["fc1.weight"].shape[0], dim)}
    if names == {"in_proj", "out_proj", "short_filter"}:
        tokens, _, width = weights["short_filter.weight"].shape
        ratio = _ratio(weights["out_proj.weight"].shape[-1], dim)
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
    return _located(path, lambda: _build_grafted(state_dict, num_heads, window, num_classes))


def _build_grafted(
    state_dict: StateDict, num_heads: int | None, window: int, num_classes: int | None
) -> tuple[DiT, list[Entry]]:
    arguments = _host_arguments(state_dict, num_heads, num_classes)
    entries = _import_plan(state_dict, arguments, window)
    model = _empty_dit(arguments, "original")
    state_dict = dict(state_dict)
    for slot, name, config in entries:
        kind, _, index = slot.partition(".")
        attribute = "attn" if kind == "mixer" else "mlp"
        prefix = f"blocks.{index}.{attribute}."
        operator = operators.build(name, dim=arguments["hidden_size"], num_heads=arguments["num_heads"], **config)
        try:
            operator.load_reference(_below(state_dict, prefix))
        except UserError as error:
            raise UserError(f"slot {slot}: {error}") from error
        setattr(model.blocks[int(index)], attribute, operator)
        # From here on under our own names, so that one strict pass covers the whole model.
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
        state_dict |= {prefix + key: value for key, value in operator.state_dict().items()}
    return _filled(model, state_dict), entries


def _empty_dit(arguments: Mapping[str, Any], convention: Convention) -> DiT:
    """A DiT with uninitialised weights: initialising 675 million parameters to overwrite them takes long."""
    with torch.device("meta"):
        model = DiT(**arguments, convention=convention)
    return model.to_empty(device="cpu")


def _filled(model: DiT, state_dict: Mapping[str, Tensor]) -> DiT:
    """The model with these weights, which must fit key for key and shape for shape; in evaluation mode."""
    _check({key: tuple(value.shape) for key, value in model.state_dict().items()}, state_dict)
    model.load_state_dict(dict(state_dict))
    return model.eval()


def _check(expected: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    if missing or unexpected:
        grafted = any(re.match(r"blocks\.\d+\.(attn|mlp)\.", key) for key in unexpected)
        raise UserError(
            f"weights do not fit this DiT: missing {_listed(missing)}, unexpected {_listed(unexpected)}"
            + ("; a grafted checkpoint is read by grafting.import_reference" if grafted else "")
        )
    for key, shape in expected.items():
        value = state_dict[key]
        if tuple(value.shape) != shape:
            raise UserError(f"weights do not fit this DiT: {key} is {_shape(value)}, expected {list(shape)}")
        if not value.is_floating_point():
            raise UserError(f"weights do not fit this DiT: {key} is {value.dtype}, not floating point")


def _below(state_dict: Mapping[str, Tensor], prefix: str) -> StateDict:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _located(path: Path, action: Callable[[], Result]) -> Result:
    """The action's result; its UserError says which file it was about."""
    try:
        return action()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _listed(keys: Iterable[str], limit: int = 4) -> str:
    keys = list(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return (", ".join(keys[:limit]) or "none") + more


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
