import json

import pytest

from grafting import GraftPlan, UserError


def slots(host, **selector):
    plan = GraftPlan.from_config([{"slots": {"kind": "mixer", **selector}, "operator": "hyena_x"}], host)
    return [int(name.split(".")[1]) for name, _ in plan]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"select": "all"}, [0, 1, 2, 3]),
        ({"select": "interleave", "ratio": 0.5}, [1, 3]),
        ({"select": "interleave", "ratio": 0.75}, [1, 2, 3]),
        ({"select": "interleave", "ratio": 0.25}, [3]),
        ({"select": "first", "ratio": 0.5}, [0, 1]),
        ({"select": "last", "ratio": 0.5}, [2, 3]),
        ({"indices": [2, 0]}, [2, 0]),
    ],
)
def test_selectors(tiny_host, selector, expected):
    assert slots(tiny_host, **selector) == expected


def test_measured_takes_the_lowest_scores(tiny_host, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"mixer.0": 3, "mixer.1": 0.5, "mixer.2": 2, "mixer.3": 0.1}))
    assert slots(tiny_host, select="measured", ratio=0.5, scores=str(path)) == [1, 3]
    path.write_text(json.dumps({"mixer.0": 3}))
    with pytest.raises(UserError, match=r"no score for mixer\.1"):
        slots(tiny_host, select="measured", ratio=0.5, scores=str(path))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"slots": {"indices": [9]}, "operator": "hyena_x"}, r"mixer\.9 is out of range"),
        ({"slots": {"select": "all"}, "operator": "hyena_z"}, "unknown operator 'hyena_z'; did you mean 'hyena_"),
        ({"slots": {"select": "all"}, "operator": "mlp"}, "cannot fill slots of kind 'mixer'"),
        ({"slots": {"select": "all"}, "operator": "hyena_x", "config": {"kernel": 3}}, "did you mean 'kernel_size'"),
        ({"slots": {"select": "interleave"}, "operator": "hyena_x"}, "needs a ratio"),
        ({"slots": {"select": "last", "ratio": 0.01}, "operator": "hyena_x"}, "is none"),
        ({"slots": {"selct": "all"}, "operator": "hyena_x"}, "did you mean 'select'"),
        ({"slots": {"kind": "pair", "select": "all"}, "operator": "hyena_x"}, "kind"),
    ],
)
def test_wrong_groups_are_one_line(tiny_host, group, words):
    with pytest.raises(UserError, match=words) as caught:
        GraftPlan.from_config([group], tiny_host)
    assert "\n" not in str(caught.value)


def test_two_operators_for_one_slot_are_an_error(tiny_host):
    groups = [
        {"slots": {"indices": [0, 1]}, "operator": "hyena_x"},
        {"slots": {"indices": [1]}, "operator": "hyena_y"},
    ]
    with pytest.raises(UserError, match=r"mixer\.1 is given both 'hyena_x' and 'hyena_y'"):
        GraftPlan.from_config(groups, tiny_host)


def test_groups_of_both_kinds(tiny_host):
    groups = [
        {"slots": {"indices": [0]}, "operator": "hyena_x"},
        {"slots": {"kind": "mlp", "indices": [0]}, "operator": "mlp", "config": {"expansion_ratio": 1}},
    ]
    plan = GraftPlan.from_config(groups, tiny_host)
    assert [(slot, entry.operator) for slot, entry in plan] == [("mixer.0", "hyena_x"), ("mlp.0", "mlp")]
