"""Find a host by what the user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from grafting.errors import UserError
from grafting.hosts import embedded
from grafting.hosts.base import Host, HostCard, SlotEntry
from grafting.hosts.codec import Codec
from grafting.hosts.dit import SIZES, Convention, DiT, DiTHost
from grafting.hosts.dit_grafted import load_grafted
from grafting.hosts.dit_weights import load_dit
from grafting.surgery import GRAFT_FILE, load_saved_host, load_weights

# Training steps at batch 256 of the published DiT-XL/2 by latent size (Peebles & Xie, section 5).
PUBLISHED_DIT_STEPS = {32: 7_000_000, 64: 3_000_000}


def load_host(
    spec: str | Path,
    *,
    vae: str | None = None,
    num_heads: int | None = None,
    convention: Convention = "original",
    revision: str | None = None,
) -> Host:
    """Load a host: `embedded:NAME`, a saved hybrid, an original `.pt` or `.safetensors`, a diffusers folder, a hub id.

    `vae` names the codec of a bare checkpoint; `num_heads` is asked for only where the sizes do not tell;
    `convention: diffusers` computes as diffusers' class does; `revision` pins a hub id.

    Raises UserError naming what was not found or does not fit.
    """
    text = str(spec)
    codec = Codec(vae) if vae is not None else None
    if text.startswith(embedded.PREFIX):
        return _load_embedded(text, codec)
    path = Path(text).expanduser()
    if (path / GRAFT_FILE).is_file():
        return load_saved_host(path, codec)
    if not path.exists():
        path = _download(text, revision)
        if (path / GRAFT_FILE).is_file():
            return load_saved_host(path, codec)
    model = load_dit(path, num_heads=num_heads, convention=convention)
    if codec is None and (path / "vae").is_dir():
        codec = Codec(str(path / "vae"))
    return DiTHost(model, card=_card_of(model, path.stem), codec=codec, source=text)


def import_reference(
    path: str | Path, *, num_heads: int | None = None, window: int = 4, vae: str | None = None
) -> Host:
    """A published grafted checkpoint (`{'ema': state_dict, …}` or safetensors) as a hybrid.

    The operators are recognised from the keys; a sliding window's width is not in them and is taken from
    `window` (the published models use 4). Raises UserError listing the keys that cannot be placed.
    """
    model, entries = load_grafted(Path(path), num_heads=num_heads, window=window)
    grafts = {slot: SlotEntry(operator=operator, config=config) for slot, operator, config in entries}
    codec = Codec(vae) if vae is not None else None
    card = _card_of(model, Path(path).stem)
    return DiTHost(model, card=card, codec=codec, source=str(path), grafts=grafts, new_slots=list(grafts))


def _card_of(model: DiT, name: str) -> HostCard:
    shape = (model.depth, model.hidden_size, model.patch_size, model.num_heads)
    size = next((size for size, known in SIZES.items() if known == shape), None)
    steps = PUBLISHED_DIT_STEPS.get(model.input_size) if size == "DiT-XL/2" and model.num_classes == 1000 else None
    return HostCard(name=size or name, pretraining_samples=steps * 256 if steps else None)


def _load_embedded(spec: str, codec: Codec | None) -> Host:
    folder = embedded.folder(spec)
    if spec.removeprefix(embedded.PREFIX) not in embedded.HOSTS:
        raise UserError(f"host: {spec!r} is data, not a host; known hosts: {', '.join(embedded.HOSTS)}")
    model = DiT(**json.loads((folder / "dit.json").read_text()))
    state = load_weights(folder / "dit.safetensors")
    model.load_state_dict({key: value.to(torch.float32) for key, value in state.items()})
    card = HostCard.model_validate_json((folder / "card.json").read_text())
    return DiTHost(model, card=card, codec=codec or Codec(spec), source=spec)


def _download(spec: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", spec) or spec.startswith("."):
        raise UserError(
            f"host: {spec!r} is no file or folder here; name one, a hub id (owner/name) or embedded:digits-dit"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"host: {spec!r} is no file or folder here and could not be downloaded ({reason[:160]})"
        ) from error
