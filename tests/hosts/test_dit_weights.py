"""Reading DiT weights in every published form, and refusing what is not one, in one line."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from grafting import operators
from grafting.errors import UserError
from grafting.hosts.dit import SIZES, DiT
from grafting.hosts.dit_diffusers import from_diffusers
from grafting.hosts.dit_grafted import import_plan, load_grafted
from grafting.hosts.dit_weights import architecture_of, load_dit
from grafting.hosts.state_dicts import read_state_dict

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 5,
    "learn_sigma": True,
}
GRAFTED = {  # golden name: what its plan must be
    "grafted_hyena_y": [(f"mixer.{index}", "hyena_y", {"kernel_size": 4}) for index in (1, 3)],
    "grafted_mlp_r3": [(f"mlp.{index}", "mlp", {"expansion_ratio": 3.0}) for index in (1, 3)],
    "grafted_swa": [(f"mixer.{index}", "sliding_window", {"window": 4}) for index in (1, 3)],
}


def small_dit(**changes):
    """A DiT whose every parameter is random, so that nothing is hidden behind a zero gate."""
    model = DiT(**{**SMALL, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def state_dict():
    return {key: value.clone() for key, value in small_dit().state_dict().items()}


def error_of(action):
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def assert_equal_weights(ours, expected):
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


# Files.


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "ema", "model", "state_dict"])
def test_pickles_are_unwrapped(tmp_path, state_dict, suffix, wrapper):
    path = tmp_path / f"weights{suffix}"
    torch.save(state_dict if wrapper is None else {wrapper: state_dict, "step": 3}, path)
    assert_equal_weights(read_state_dict(path), state_dict)


def test_ema_is_preferred_and_prefixes_are_dropped(tmp_path, state_dict):
    path = tmp_path / "train.pt"
    raw = {f"module.{key}": torch.zeros_like(value) for key, value in state_dict.items()}
    ema = {f"module._orig_mod.{key}": value for key, value in state_dict.items()}
    torch.save({"model": raw, "ema": ema, "opt": {"state": {}}}, path)
    assert_equal_weights(read_state_dict(str(path)), state_dict)


def test_the_original_training_checkpoint_with_its_arguments(tmp_path, state_dict):
    # train.py of the original stores argparse's Namespace beside the weights.
    path = tmp_path / "0050000.pt"
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256, cfg_scale=4.0)
    torch.save({"model": {}, "ema": state_dict, "opt": {}, "args": arguments}, path)
    assert_equal_weights(read_state_dict(path), state_dict)


def test_the_old_pickle_format(tmp_path, state_dict):
    path = tmp_path / "old.pt"
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    assert_equal_weights(read_state_dict(path), state_dict)


def test_safetensors(tmp_path, state_dict):
    path = tmp_path / "weights.safetensors"
    save_file(state_dict, path)
    assert_equal_weights(read_state_dict(path), state_dict)


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["bare pickle", "torch.save", "beside the weights", "old format"])
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, state_dict, form):
    trap, path = tmp_path / "ran", tmp_path / "evil.pt"
    evil = Malicious(trap)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif form == "torch.save":
        torch.save(evil, path)
    elif form == "beside the weights":
        torch.save({"ema": state_dict, "opt": evil}, path)
    else:
        torch.save({"ema": state_dict, "opt": evil}, path, _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = error_of(lambda: read_state_dict(path))
    assert not trap.exists()
    assert str(path) in message
    assert "refused" in message
    assert "mkdir" in message


def damaged(kind, path, state_dict):
    """Write a file that looks like weights and is not."""
    if path.suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=kind != "old truncated")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "random": bytes((index * 197 + 13) % 256 for index in range(5000)),
            "text": b"<!doctype html><html>Not found</html>",
            "truncated": whole[: len(whole) // 2],
            "cut at the end": whole[:-40],
            "old truncated": whole[: len(whole) // 2],
        }[kind]
    )


@pytest.mark.parametrize("kind", ["empty", "random", "text", "truncated", "cut at the end", "old truncated"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_damaged_files(tmp_path, state_dict, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    damaged(kind, path, state_dict)
    message = error_of(lambda: read_state_dict(path))
    assert str(path) in message
    assert "not a readable" in message


def test_a_zip_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "photos.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "not a readable PyTorch weights file" in error_of(lambda: read_state_dict(path))


def test_missing_folder_and_foreign_suffix(tmp_path):
    assert "weights not found" in error_of(lambda: read_state_dict(tmp_path / "none.pt"))
    assert "is a folder" in error_of(lambda: read_state_dict(tmp_path))
    (tmp_path / "weights.onnx").write_bytes(b"x")
    assert ".safetensors, .pt" in error_of(lambda: read_state_dict(tmp_path / "weights.onnx"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "no state dict but a list"),
        ({"a": torch.zeros(2), "epoch": 3}, "no tensor under epoch"),
        ({"ema": {}}, "holds no weights"),
        ({3: torch.zeros(2)}, "no tensor under 3"),
    ],
)
def test_pickles_that_are_no_state_dict(tmp_path, content, words):
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    message = error_of(lambda: read_state_dict(path))
    assert words in message
    assert str(path) in message


# Architecture.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": False},
        {"input_size": 12, "patch_size": 4},
        {"mlp_ratio": 2.0},
        {"mlp_ratio": 1.7},
        {"depth": 11, "num_heads": 4},
        {"in_channels": 16},
    ],
)
def test_architecture_comes_from_the_shapes(changes):
    arguments = {**SMALL, **changes}
    with torch.device("meta"):
        weights = DiT(**arguments).state_dict()
    found = architecture_of(weights, arguments["num_heads"])
    hidden = [int(arguments["hidden_size"] * each.pop("mlp_ratio")) for each in (found, arguments)]
    assert hidden[0] == hidden[1]
    assert found == arguments


@pytest.mark.parametrize("dim", [16, 1152])
def test_any_mlp_width_is_found_again(dim):
    with torch.device("meta"):
        weights = DiT(**{**SMALL, "hidden_size": dim, "depth": 1}).state_dict()
    for hidden in range(1, 4 * dim, 7):
        weights["blocks.0.mlp.fc1.weight"] = torch.empty(hidden, dim, device="meta")
        assert int(dim * architecture_of(weights, 2)["mlp_ratio"]) == hidden


@pytest.mark.parametrize("name", SIZES)
def test_standard_sizes_need_no_num_heads(name):
    depth, width, patch, heads = SIZES[name]
    with torch.device("meta"):
        weights = DiT(hidden_size=width, depth=depth, patch_size=patch, num_heads=heads).state_dict()
    found = architecture_of(weights)
    assert (found["num_heads"], found["patch_size"], found["input_size"]) == (heads, patch, 32)
    assert found["num_classes"] == 1000


def test_other_sizes_need_num_heads(state_dict):
    assert "give num_heads" in error_of(lambda: architecture_of(state_dict))
    assert "num_heads 3 does not divide" in error_of(lambda: architecture_of(state_dict, 3))
    assert "num_heads 0" in error_of(lambda: architecture_of(state_dict, 0))


def test_num_classes_tells_whether_there_is_a_null_class(state_dict):
    for given, classes, dropout in ((None, 5, 0.1), (5, 5, 0.1), (6, 6, 0.0)):
        found = architecture_of(state_dict, 2, num_classes=given)
        assert (found["num_classes"], found["class_dropout_prob"]) == (classes, dropout)
    assert "num_classes 9 does not fit" in error_of(lambda: architecture_of(state_dict, 2, num_classes=9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("pos_embed"), "missing pos_embed"),
        (lambda weights: weights.clear(), "missing x_embedder.proj.weight"),
        (lambda weights: weights.update({"pos_embed": torch.zeros(16, 16)}), "not 3-dimensional"),
        (lambda weights: weights.update({"pos_embed": torch.zeros(1, 15, 16)}), "15 positions"),
        (lambda weights: weights.update({"pos_embed": torch.zeros(1, 0, 16)}), "0 positions"),
        (lambda weights: weights.update({"final_layer.linear.weight": torch.zeros(7, 16)}), "has 7 rows"),
        (lambda weights: weights.update({"x_embedder.proj.weight": torch.zeros(16, 3, 2, 4)}), "2×4"),
        (lambda weights: weights.update({"blocks.999999999.x": torch.zeros(1)}), "block 3 of 4 is missing"),
        (
            lambda weights: weights.update({"transformer_blocks.0.x": weights.pop("pos_embed")}),
            "diffusers' names",
        ),
    ],
)
def test_what_is_not_a_dit(state_dict, change, words):
    weights = dict(state_dict)
    change(weights)
    message = error_of(lambda: architecture_of(weights, 2))
    assert "not the weights of a DiT" in message
    assert words in message


# The original's own files.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_dit_reads_the_golden_model(tmp_path, golden, golden_json, relative_error, suffix):
    path = tmp_path / f"dit{suffix}"
    weights, case = golden("dit_model"), golden("dit_forward")
    if suffix == ".pt":
        torch.save({"ema": weights}, path)
    else:
        save_file(weights, path)
    model = load_dit(path, num_heads=4)
    assert not model.training
    assert model.arguments == {**golden_json("dit_model")["model_config"], "convention": "original"}
    assert_equal_weights(model.state_dict(), weights)
    with torch.no_grad():
        assert relative_error(model(case["x"], case["t"], case["y"]), case["out"]) <= 1e-5
    assert not model.pos_embed.requires_grad
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name != "pos_embed")


def test_half_precision_files_give_a_float32_model(tmp_path, state_dict):
    path = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in state_dict.items()}, path)
    ours = load_dit(path, 2).state_dict()
    assert_equal_weights(ours, {key: value.half().float() for key, value in state_dict.items()})


def test_loading_leaves_the_random_state_alone(tmp_path, state_dict):
    path = tmp_path / "dit.safetensors"
    save_file(state_dict, path)
    before = torch.random.get_rng_state()
    load_dit(path, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("blocks.1.attn.proj.bias"), "missing blocks.1.attn.proj.bias"),
        (lambda weights: weights.update({"extra.weight": torch.zeros(2)}), "unexpected extra.weight"),
        (
            lambda weights: weights.update({"blocks.2.mlp.fc2.bias": torch.zeros(5)}),
            "blocks.2.mlp.fc2.bias is [5], expected [16]",
        ),
        (
            lambda weights: weights.update({"t_embedder.mlp.0.bias": torch.zeros(16, dtype=torch.int8)}),
            "torch.int8, not floating point",
        ),
        (lambda weights: weights.pop("pos_embed"), "missing pos_embed"),
    ],
)
def test_loading_is_strict(tmp_path, state_dict, change, words):
    path = tmp_path / "dit.safetensors"
    weights = dict(state_dict)
    change(weights)
    save_file(weights, path)
    message = error_of(lambda: load_dit(path, 2))
    assert words in message
    assert str(path) in message


def test_a_grafted_checkpoint_is_pointed_to_its_reader(golden_path):
    message = error_of(lambda: load_dit(golden_path("grafted_swa.ema"), 2))
    assert "import_reference" in message


# diffusers.


def diffusers_names(state_dict, depth):
    """The same weights under diffusers' names: an independent statement of the correspondence."""
    result = {
        "pos_embed.proj.weight": state_dict["x_embedder.proj.weight"],
        "pos_embed.proj.bias": state_dict["x_embedder.proj.bias"],
    }
    for kind in ("weight", "bias"):
        result[f"proj_out_1.{kind}"] = state_dict[f"final_layer.adaLN_modulation.1.{kind}"]
        result[f"proj_out_2.{kind}"] = state_dict[f"final_layer.linear.{kind}"]
        for index in range(depth):
            old, new = f"blocks.{index}", f"transformer_blocks.{index}"
            q, k, v = state_dict[f"{old}.attn.qkv.{kind}"].chunk(3)
            result |= {
                f"{new}.attn1.to_q.{kind}": q.clone(),
                f"{new}.attn1.to_k.{kind}": k.clone(),
                f"{new}.attn1.to_v.{kind}": v.clone(),
                f"{new}.attn1.to_out.0.{kind}": state_dict[f"{old}.attn.proj.{kind}"],
                f"{new}.ff.net.0.proj.{kind}": state_dict[f"{old}.mlp.fc1.{kind}"],
                f"{new}.ff.net.2.{kind}": state_dict[f"{old}.mlp.fc2.{kind}"],
                f"{new}.norm1.linear.{kind}": state_dict[f"{old}.adaLN_modulation.1.{kind}"],
                f"{new}.norm1.emb.timestep_embedder.linear_1.{kind}": state_dict[f"t_embedder.mlp.0.{kind}"],
                f"{new}.norm1.emb.timestep_embedder.linear_2.{kind}": state_dict[f"t_embedder.mlp.2.{kind}"],
            }
    for index in range(depth):
        result[f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table.weight"] = state_dict[
            "y_embedder.embedding_table.weight"
        ]
    return result


@pytest.fixture(scope="module")
def theirs(state_dict):
    """A diffusers model that holds `state_dict`'s weights."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    model.load_state_dict(diffusers_names(state_dict, 3))
    return model.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    x = 0.05 * torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.tensor([0, 3, 500, 999]), torch.tensor([0, 2, 4, 5])


def save_diffusers(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def test_diffusers_folder_follows_the_original_network_by_default(tmp_path, theirs, state_dict, inputs):
    model = load_dit(save_diffusers(theirs, tmp_path))
    assert model.arguments == {**SMALL, "convention": "original"}
    ours = model.state_dict()
    torch.testing.assert_close(ours.pop("pos_embed"), state_dict["pos_embed"], rtol=0, atol=1e-6)
    assert_equal_weights(ours, {key: value for key, value in state_dict.items() if key != "pos_embed"})
    assert torch.equal(model(*inputs), small_dit()(*inputs))


@torch.no_grad()
def test_diffusers_convention_matches_diffusers_to_rounding(tmp_path, theirs, inputs, relative_error):
    save_diffusers(theirs, tmp_path)
    x, t, y = inputs
    expected = theirs(x, timestep=t, class_labels=y).sample
    model = load_dit(tmp_path, convention="diffusers")
    assert model.arguments["convention"] == "diffusers"
    # Float32 rounding through three blocks; the original convention is off by far more.
    assert relative_error(model(x, t, y), expected) <= 2e-6
    assert relative_error(load_dit(tmp_path)(x, t, y), expected) > 1e-3


@torch.no_grad()
def test_each_of_diffusers_deviations_is_needed(theirs, state_dict, inputs, relative_error):
    x, t, y = inputs
    # Tokens of low variance, so that the eps shows.
    weights = dict(state_dict, **{"x_embedder.proj.bias": torch.zeros(16)})
    weights["pos_embed"] = 0.01 * weights["pos_embed"]
    theirs = copy.deepcopy(theirs)
    theirs.load_state_dict(diffusers_names(weights, 3))
    theirs.pos_embed.pos_embed.mul_(0.01)
    expected = theirs(x, timestep=t, class_labels=y).sample

    def error(sinusoid, eps):
        model = DiT(**SMALL, convention="original").eval()
        model.load_state_dict(weights)
        model.t_embedder.convention = sinusoid
        for block in model.blocks:
            block.norm2.eps = eps
        return relative_error(model(x, t, y), expected)

    assert error("diffusers", 1e-5) <= 2e-6
    assert error("original", 1e-5) > 1e-4
    assert error("diffusers", 1e-6) > 1e-4


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"max_shard_size": "20KB"}])
def test_other_forms_of_the_diffusers_folder(tmp_path, theirs, state_dict, options):
    save_diffusers(theirs, tmp_path, **options)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    ours = load_dit(tmp_path).state_dict()
    assert torch.equal(ours["blocks.2.attn.qkv.weight"], state_dict["blocks.2.attn.qkv.weight"])


def test_a_pipeline_folder(tmp_path, theirs):
    save_diffusers(theirs, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_dit(tmp_path).depth == 3


def test_the_class_name_before_diffusers_had_a_dit(tmp_path, theirs):
    # facebook/DiT-XL-2-256 on the hub still has it, with more keys that mean nothing to a DiT.
    save_diffusers(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_dit(tmp_path).depth == 3


def test_unequal_copies_of_the_embedders_are_refused(theirs):
    weights = dict(theirs.state_dict())
    assert from_diffusers(theirs.config, weights)[0] == SMALL
    for part in ("timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"):
        key = f"transformer_blocks.2.norm1.emb.{part}"
        changed = weights[key].clone()
        changed.view(-1)[-1] += 1e-6
        message = error_of(lambda: from_diffusers(theirs.config, {**weights, key: changed}))  # noqa: B023
        assert key in message
        assert "cannot be converted" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("proj_out_1.bias"), "missing proj_out_1.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda weights: weights.update({"transformer_blocks.1.attn1.to_k.weight": torch.zeros(8, 16)}),
            "transformer_blocks.1.attn1.to_k.weight is [8, 16], expected [16, 16]",
        ),
    ],
)
def test_diffusers_weights_that_do_not_fit(theirs, change, words):
    weights = dict(theirs.state_dict())
    change(weights)
    assert words in error_of(lambda: from_diffusers(theirs.config, weights))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'"),
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"out_channels": 5}, "out_channels 5"),
        ({"num_layers": "three"}, "num_layers is 'three'"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": 9}, "sample_size 9"),
    ],
)
def test_diffusers_configs_that_are_no_dit(theirs, change, words):
    assert words in error_of(lambda: from_diffusers({**theirs.config, **change}, theirs.state_dict()))


def test_folders_that_are_no_dit(tmp_path, theirs):
    assert "no config.json" in error_of(lambda: load_dit(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "describes UNet2DModel" in error_of(lambda: load_dit(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\x80\x81 {")
    assert "not readable JSON" in error_of(lambda: load_dit(tmp_path))
    save_diffusers(theirs, tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert "has no diffusion_pytorch_model.safetensors" in error_of(lambda: load_dit(tmp_path))


def test_a_shard_outside_the_folder_is_refused(tmp_path, theirs, state_dict):
    save_file(state_dict, tmp_path / "elsewhere.safetensors")
    folder = save_diffusers(theirs, tmp_path / "model", max_shard_size="20KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"proj_out_1.bias": "../elsewhere.safetensors"}}))
    assert "not a readable index" in error_of(lambda: load_dit(folder))


def test_arguments_that_contradict_the_config(tmp_path, theirs):
    save_diffusers(theirs, tmp_path)
    assert "num_heads 2, not 4" in error_of(lambda: load_dit(tmp_path, 4))
    assert "num_classes 5, not 6" in error_of(lambda: load_dit(tmp_path, num_classes=6))
    config = json.loads((tmp_path / "config.json").read_text()) | {"norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "norm_eps 1e-06" in error_of(lambda: load_dit(tmp_path, convention="diffusers"))
    assert load_dit(tmp_path).num_heads == 2


# Published grafted checkpoints.


@pytest.mark.parametrize("name", GRAFTED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@torch.no_grad()
def test_grafted_checkpoints_match(tmp_path, golden, golden_path, relative_error, name, suffix):
    path = golden_path(f"{name}.ema")
    if suffix == ".pt":
        weights = load_file(path)
        path = tmp_path / "grafted.pt"
        torch.save({"ema": weights, "epoch": 1, "args": argparse.Namespace(seed=0)}, path)
    model, entries = load_grafted(path, num_heads=2)
    case = golden(f"{name}.io")
    assert entries == GRAFTED[name]
    assert not model.training
    assert relative_error(model(case["x"], case["t"], case["y"]), case["out"]) <= 1e-5


@torch.no_grad()
def test_the_window_is_the_callers(golden, golden_path, relative_error):
    case = golden("grafted_swa.io")
    model, entries = load_grafted(golden_path("grafted_swa.ema"), 2, window=2)
    assert entries[0] == ("mixer.1", "sliding_window", {"window": 2})
    assert relative_error(model(case["x"], case["t"], case["y"]), case["out"]) > 1e-3


def test_a_plain_dit_has_no_entries(tmp_path, state_dict):
    path = tmp_path / "dit.safetensors"
    save_file(state_dict, path)
    model, entries = load_grafted(path, 2)
    assert entries == []
    assert_equal_weights(model.state_dict(), state_dict)


def grafted(replacements):
    """A DiT with operators in some slots."""
    model = small_dit()
    for slot, name, config in replacements:
        kind, index = slot.split(".")
        operator = operators.build(name, dim=16, num_heads=2, **config)
        setattr(model.blocks[int(index)], "attn" if kind == "mixer" else "mlp", operator)
    return model


@pytest.mark.parametrize(
    "replacements",
    [
        [("mixer.0", "hyena_se", {"kernel_size": 5})],
        [("mixer.0", "hyena_x", {"kernel_size": 2}), ("mixer.2", "hyena_y", {"kernel_size": 7})],
        [("mlp.1", "hyena_x_mlp", {"tokens": 16, "expansion_ratio": 2.0, "kernel_size": 3})],
        [("mlp.0", "mlp", {"expansion_ratio": 0.8125}), ("mlp.1", "mlp", {"expansion_ratio": 6.0})],
        [
            *((f"mixer.{index}", "hyena_x", {"kernel_size": 4}) for index in range(3)),
            *(
                (f"mlp.{index}", "hyena_x_mlp", {"tokens": 16, "expansion_ratio": 1.5, "kernel_size": 4})
                for index in range(3)
            ),
        ],
    ],
    ids=["hyena_se", "two kinds", "hyena_x_mlp", "widths", "every slot"],
)
@torch.no_grad()
def test_plans_are_recognised_and_loaded(tmp_path, inputs, replacements):
    expected = grafted(replacements)
    weights = expected.state_dict()
    path = tmp_path / "grafted.pt"
    torch.save({"ema": weights}, path)
    assert import_plan(weights, 2) == replacements
    model, entries = load_grafted(path, 2)
    assert entries == replacements
    assert torch.equal(model(*inputs), expected(*inputs))


def test_mlps_all_replaced_in_a_standard_size_are_grafts():
    depth, width, patch, heads = SIZES["DiT-S/8"]
    with torch.device("meta"):
        weights = DiT(hidden_size=width, depth=depth, patch_size=patch, num_heads=heads, mlp_ratio=3.0).state_dict()
    assert import_plan(weights) == [(f"mlp.{index}", "mlp", {"expansion_ratio": 3.0}) for index in range(depth)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.update({"blocks.1.attn.A_log": torch.zeros(2)}), "blocks.1.attn: A_log, in_proj.bias"),
        (lambda weights: weights.pop("blocks.1.attn.in_proj.bias"), "blocks.1.attn: in_proj.weight"),
        (
            lambda weights: weights.update({"blocks.1.attn.short_filter.weight": torch.zeros(3)}),
            "blocks.1.attn: ",
        ),
        (lambda weights: weights.update({"blocks.0.mlp.gate.weight": torch.zeros(2, 2)}), "blocks.0.mlp: fc1.bias"),
    ],
)
def test_keys_that_no_operator_explains(tmp_path, change, words):
    weights = dict(grafted([("mixer.1", "hyena_x", {})]).state_dict())
    change(weights)
    message = error_of(lambda: import_plan(weights, 2))
    assert "no known operator has the weights" in message
    assert words in message
    path = tmp_path / "grafted.safetensors"
    save_file(weights, path)
    assert str(path) in error_of(lambda: load_grafted(path, 2))


def test_every_slot_that_no_operator_explains_is_named(state_dict):
    weights = {key.replace(".attn.qkv.", ".attn.q_norm."): value for key, value in state_dict.items()}
    message = error_of(lambda: import_plan(weights, 2))
    assert "blocks.0.attn: proj.bias, proj.weight, q_norm.bias, q_norm.weight" in message
    assert "nor those of blocks.1.attn, blocks.2.attn" in message


def test_a_slot_without_weights_is_named(state_dict):
    weights = {key: value for key, value in state_dict.items() if not key.startswith("blocks.1.mlp.")}
    assert "the weights of blocks.1.mlp: none" in error_of(lambda: import_plan(weights, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.update({"extra": torch.zeros(2)}), "unexpected extra"),
        (lambda weights: weights.pop("blocks.0.attn.proj.bias"), "blocks.0.attn: proj.weight"),
        (lambda weights: weights.update({"blocks.1.attn.in_proj.bias": torch.zeros(2)}), "slot mixer.1"),
        (
            lambda weights: weights.update({"t_embedder.mlp.0.bias": torch.zeros(2)}),
            "t_embedder.mlp.0.bias is [2]",
        ),
    ],
)
def test_grafted_loading_is_strict(tmp_path, change, words):
    weights = dict(grafted([("mixer.1", "hyena_x", {})]).state_dict())
    change(weights)
    path = tmp_path / "grafted.safetensors"
    save_file(weights, path)
    message = error_of(lambda: load_grafted(path, 2))
    assert words in message
    assert str(path) in message
