"""Apply a plan to a host, and save and load what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from grafting import operators
from grafting.errors import UserError
from grafting.files import replacing_file, write_json
from grafting.hosts.base import Host, HostCard, SlotEntry
from grafting.hosts.codec import Codec
from grafting.hosts.dit import DiT, DiTHost
from grafting.operators import Operator, OperatorError
from grafting.plan import GraftPlan, describe_validation_error
from grafting.seeding import generator

FORMAT = 1
GRAFT_FILE, WEIGHTS_FILE = "graft.json", "model.safetensors"


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the dotted `path` leads."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if name.isdecimal() and isinstance(owner, (nn.ModuleList, nn.Sequential)):
        owner[int(name)] = new
    else:
        setattr(owner, name, new)


def build_for_slot(host: Host, slot: str, entry: SlotEntry, seed: int) -> Operator:
    """The operator of a plan entry, on the host's device.

    Fresh weights depend on (seed, slot) alone, whatever else is grafted.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "init", slot).initial_seed() % 2**63)
        try:
            if entry.init == "host":
                config = operators.parse_config(entry.operator, entry.config)
                new = operators.get(entry.operator).from_host(config, host.operator(slot))
            else:
                new = operators.build(entry.operator, dim=host.width, num_heads=host.num_heads, **entry.config)
        except OperatorError as error:
            raise UserError(f"slot {slot}: {error}") from error
    return new.to(host.device)


@torch.no_grad()
def _check_fit(host: Host, slot: str, operator: Operator) -> None:
    """Run the operator once on the host's grid, so that a misfit shows before any training."""
    rows, columns = host.grid
    x = torch.zeros(1, rows * columns, host.width, device=host.device)
    try:
        y = operator(x, host.grid)
    except UserError as error:
        raise UserError(f"slot {slot}: {error}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"slot {slot}: operator {operator.name!r} fails on tokens {tuple(x.shape)} with grid {host.grid}:"
            f" {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise UserError(f"slot {slot}: operator {operator.name!r} returned {got} for tokens {tuple(x.shape)}")


def graft(host: Host, plan: GraftPlan, seed: int = 0) -> Host:
    """A hybrid: a copy of the host whose planned slots hold new operators. The host is left untouched.

    Raises UserError when an operator does not fit its slot.
    """
    hybrid = host.copy()
    hybrid.new_slots = [slot for slot, _ in plan]
    checked: set[tuple[str, str]] = set()
    for slot, entry in plan:
        new = build_for_slot(host, slot, entry, seed)
        key = (entry.operator, json.dumps(entry.config, sort_keys=True))
        if key not in checked:
            _check_fit(host, slot, new)
            checked.add(key)
        replace_module(hybrid.model, host.slot(slot).module_path, new)
        hybrid.grafts[slot] = entry
    hybrid.model.eval()
    return hybrid


def save_host(host: Host, folder: str | Path) -> None:
    """Write a host or hybrid as `graft.json` and `model.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in host.model.state_dict().items()}
    with replacing_file(folder / WEIGHTS_FILE) as temporary:
        save_file(state, temporary)
    record = {
        "format": FORMAT,
        "family": host.family,
        "architecture": host.architecture(),
        "source": host.source,
        "vae": host.codec.spec if host.codec is not None else None,
        "card": host.card.model_dump(mode="json"),
        "grafts": {slot: entry.model_dump(mode="json") for slot, entry in host.grafts.items()},
        "new_slots": host.new_slots,
    }
    write_json(folder / GRAFT_FILE, record)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises UserError when it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"weights not found: {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"weights cannot be read: {path} is truncated or not safetensors ({error})") from error


def load_saved_host(folder: str | Path, codec: Codec | None = None) -> Host:
    """Rebuild what `save_host` wrote. Raises UserError when a file is missing, damaged or does not fit."""
    path = Path(folder) / GRAFT_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if record["format"] != FORMAT or record["family"] != DiTHost.family:
            raise UserError(f"{path}: format {record['format']!r} of family {record['family']!r} is not known here")
        model = DiT(**record["architecture"])
        card = HostCard.model_validate(record["card"])
        grafts = {slot: SlotEntry.model_validate(entry) for slot, entry in record["grafts"].items()}
        source, vae, new_slots = str(record["source"]), record["vae"], list(record["new_slots"])
    except UserError:
        raise
    except ValidationError as error:
        raise UserError(f"{path}: {describe_validation_error(error, '', HostCard)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    if codec is None and vae is not None:
        codec = Codec(vae)
    host = DiTHost(model, card=card, codec=codec, source=source, grafts=grafts, new_slots=new_slots)
    for slot, entry in grafts.items():
        try:
            new = operators.build(entry.operator, dim=host.width, num_heads=host.num_heads, **entry.config)
        except OperatorError as error:
            raise UserError(
                f"{path}: slot {slot}: {error} (a custom operator's file is named in operators:)"
            ) from error
        replace_module(model, host.slot(slot).module_path, new)
    state = load_weights(Path(folder) / WEIGHTS_FILE)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{Path(folder) / WEIGHTS_FILE} does not fit {path.name}: {reason[:300]}") from error
    model.eval()
    return host
