"""Small pretrained hosts that ship with the package, so that a real graft runs anywhere, without a network."""

from __future__ import annotations

from pathlib import Path

from grafting.errors import UserError, nearest

PREFIX = "embedded:"
HOSTS = {"digits-dit": "digits_dit"}
DATA = {"digits": "digits_dit"}


def folder(spec: str) -> Path:
    """Where `embedded:digits-dit` (or the data `embedded:digits`) lies. Raises UserError for an unknown name."""
    name = spec.removeprefix(PREFIX)
    known = {**HOSTS, **DATA}
    if name not in known:
        raise UserError(f"nothing embedded is called {spec!r}; {nearest(name, known)}")
    return Path(__file__).parent / known[name]
