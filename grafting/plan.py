"""Which slot gets which operator: selectors, groups and the plan they resolve to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grafting import operators
from grafting.errors import UserError, nearest
from grafting.hosts.base import Host, SlotEntry


class SlotSelector(BaseModel):
    """Slots of one kind, chosen by a rule and a ratio or by their indices.

    With k = round(ratio · n) of n slots: `interleave` spreads them evenly and starts late (half of eight are
    1, 3, 5, 7), `first` and `last` take the shallow and the deep ends, `measured` takes those with the lowest
    score in the JSON file `scores` (`{"mixer.0": 0.3, …}`).
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["mixer", "mlp", "pair"] = "mixer"
    select: Literal["all", "interleave", "first", "last", "measured"] | None = None
    ratio: float | None = Field(None, gt=0, le=1)
    indices: list[int] | None = None
    scores: str | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> SlotSelector:
        if (self.select is None) == (self.indices is None):
            raise ValueError("give either select or indices")
        if self.indices is not None and self.ratio is not None:
            raise ValueError("ratio has no meaning beside indices")
        if self.select not in (None, "all") and self.ratio is None:
            raise ValueError(f"select: {self.select} needs a ratio")
        if self.select == "all" and self.ratio not in (None, 1.0):
            raise ValueError("select: all takes every slot; use interleave, first or last with a ratio")
        if (self.select == "measured") != (self.scores is not None):
            raise ValueError("select: measured goes with scores: a JSON file of a score for each slot")
        return self

    def resolve(self, host: Host) -> list[str]:
        """Names of the chosen slots of a host. Raises UserError when one does not exist."""
        available = {slot.index: name for name, slot in host.slots.items() if slot.kind == self.kind}
        order = sorted(available)
        if not order:
            raise UserError(f"graft.slots: {host.card.name} has no slots of kind {self.kind!r}")
        if self.indices is not None:
            for index in self.indices:
                if index not in available:
                    raise UserError(
                        f"graft.slots.indices: {self.kind}.{index} is out of range; {host.card.name} has"
                        f" {self.kind}.{order[0]} to {self.kind}.{order[-1]}"
                    )
            if len(set(self.indices)) < len(self.indices):
                raise UserError(f"graft.slots.indices: an index is named twice in {self.indices}")
            return [available[index] for index in self.indices]
        total = len(order)
        count = round((1.0 if self.ratio is None else self.ratio) * total)
        if count == 0:
            raise UserError(f"graft.slots.ratio: {self.ratio} of {total} slots is none; use at least {1 / total:.3g}")
        if self.select == "first":
            chosen = order[:count]
        elif self.select == "last":
            chosen = order[-count:]
        elif self.select == "measured":
            scores = self._read_scores([available[index] for index in order])
            chosen = sorted(sorted(order, key=lambda index: scores[available[index]])[:count])
        else:
            chosen = [order[i] for i in range(total) if (i + 1) * count // total > i * count // total]
        return [available[index] for index in chosen]

    def _read_scores(self, slots: Sequence[str]) -> dict[str, float]:
        assert self.scores is not None
        path = Path(self.scores).expanduser()
        try:
            scores = {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"graft.slots.scores: cannot read {path}: {error}; it maps slot names to numbers"
            ) from error
        missing = [name for name in slots if name not in scores]
        if missing:
            raise UserError(f"graft.slots.scores: {path} has no score for {', '.join(missing[:4])}")
        return scores


class GraftGroup(BaseModel):
    """Slots that get the same operator. `init: host` starts from the replaced layer's weights."""

    model_config = ConfigDict(extra="forbid")

    slots: SlotSelector
    operator: str
    config: dict[str, Any] = {}
    init: Literal["fresh", "host"] = "fresh"


@dataclass(frozen=True)
class GraftPlan:
    """An ordered mapping of slot names to what they get."""

    entries: dict[str, SlotEntry] = field(default_factory=dict)

    @classmethod
    def from_config(cls, groups: Sequence[Mapping[str, Any] | GraftGroup], host: Host) -> GraftPlan:
        """Resolve groups against a host.

        Raises UserError for unknown operators and config keys, an operator of another kind than its slots,
        slots out of range, and two operators for one slot.
        """
        entries: dict[str, SlotEntry] = {}
        for raw in groups:
            group = raw if isinstance(raw, GraftGroup) else _parse_group(raw)
            operator = operators.get(group.operator)
            if operator.kind != group.slots.kind:
                raise UserError(
                    f"graft: operator {group.operator!r} is of kind {operator.kind!r} and cannot fill slots of kind"
                    f" {group.slots.kind!r}; known for them: {', '.join(operators.names(group.slots.kind)) or 'none'}"
                )
            config = operators.parse_config(group.operator, group.config).model_dump(mode="json")
            for slot in group.slots.resolve(host):
                if slot in entries:
                    raise UserError(
                        f"graft: slot {slot} is given both {entries[slot].operator!r} and {group.operator!r};"
                        " name each slot once"
                    )
                entries[slot] = SlotEntry(operator=group.operator, config=config, init=group.init)
        return cls(entries)

    def __iter__(self) -> Iterator[tuple[str, SlotEntry]]:
        return iter(self.entries.items())

    def __len__(self) -> int:
        return len(self.entries)


def _parse_group(raw: Mapping[str, Any]) -> GraftGroup:
    try:
        return GraftGroup.model_validate(dict(raw))
    except ValidationError as error:
        raise describe_validation_error(error, "graft", GraftGroup) from None


def describe_validation_error(error: ValidationError, prefix: str, model: type[BaseModel]) -> UserError:
    """The first problem of a pydantic error as one line with the key's path and the nearest known key."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a misspelt key explains the rest
    path = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    where = ".".join(str(part) for part in ([prefix] if prefix else []) + path)
    if first["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        hint = nearest(str(path[-1]), owner.model_fields) if owner is not None else "remove it"
        return UserError(f"unknown key {where!r}; {hint}")
    message = first["msg"].removeprefix("Value error, ")
    given = repr(first.get("input"))
    shown = f" (got {given})" if len(given) <= 60 and first["type"] not in ("missing", "value_error") else ""
    return UserError(f"{where or 'config'}: {message[:1].lower() + message[1:]}{shown}")


def _model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel] | None:
    """The pydantic model that a key path leads to, through optional and list fields."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return None
        current = current.model_fields[part].annotation
        while not isinstance(current, type) or not issubclass(current, BaseModel):
            inner = [
                argument
                for argument in getattr(current, "__args__", ())
                if isinstance(argument, type) and issubclass(argument, BaseModel)
            ] or [argument for argument in getattr(current, "__args__", ()) if getattr(argument, "__args__", ())]
            if not inner:
                return None
            current = inner[0]
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None
