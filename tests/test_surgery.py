import pytest
import torch

from grafting import GraftPlan, UserError, graft, load_host
from grafting.operators import Operator, register


def plan_of(host, operator, *indices, kind="mixer", init="fresh", **config):
    group = {"slots": {"kind": kind, "indices": list(indices)}, "operator": operator, "config": config, "init": init}
    return GraftPlan.from_config([group], host)


def inputs():
    draw = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 7, 7, generator=draw), torch.tensor([3, 900]), torch.tensor([1, 10])


@torch.no_grad()
def test_the_host_is_left_untouched(tiny_host):
    before = tiny_host.denoise(*inputs())
    hybrid = graft(tiny_host, plan_of(tiny_host, "hyena_x", 1))
    assert torch.equal(tiny_host.denoise(*inputs()), before)
    assert not torch.allclose(hybrid.denoise(*inputs()), before)


@torch.no_grad()
def test_self_graft_from_the_hosts_weights_changes_nothing(tiny_host):
    groups = [
        {"slots": {"select": "all"}, "operator": "attention", "init": "host"},
        {
            "slots": {"kind": "mlp", "select": "all"},
            "operator": "mlp",
            "config": {"expansion_ratio": 2},
            "init": "host",
        },
    ]
    hybrid = graft(tiny_host, GraftPlan.from_config(groups, tiny_host))
    assert torch.equal(hybrid.denoise(*inputs()), tiny_host.denoise(*inputs()))


@torch.no_grad()
def test_round_trip_is_bit_for_bit(tiny_host, tmp_path):
    hybrid = graft(tiny_host, plan_of(tiny_host, "hyena_se", 0, 2, kernel_size=3))
    hybrid.save_pretrained(tmp_path / "hybrid")
    loaded = load_host(tmp_path / "hybrid")
    assert torch.equal(loaded.denoise(*inputs()), hybrid.denoise(*inputs()))
    assert loaded.grafts == hybrid.grafts
    assert loaded.card == hybrid.card


def test_a_hybrid_can_be_grafted_again(tiny_host):
    once = graft(tiny_host, plan_of(tiny_host, "hyena_x", 1))
    twice = graft(once, plan_of(once, "mlp", 3, kind="mlp", expansion_ratio=1))
    assert {slot: entry.operator for slot, entry in twice.grafts.items()} == {"mixer.1": "hyena_x", "mlp.3": "mlp"}
    assert twice.new_slots == ["mlp.3"]
    kept, original = twice.operator("mixer.1").state_dict(), once.operator("mixer.1").state_dict()
    assert all(torch.equal(kept[key], original[key]) for key in original)


def test_fresh_weights_depend_on_seed_and_slot_alone(tiny_host):
    def weight(seed, *indices):
        return graft(tiny_host, plan_of(tiny_host, "hyena_x", *indices), seed).operator("mixer.2").in_proj.weight

    assert torch.equal(weight(0, 2), weight(0, 0, 1, 2))
    assert not torch.equal(weight(0, 2), weight(1, 2))


def test_a_misfit_shows_at_once(tiny_host):
    with pytest.raises(UserError, match=r"slot mlp\.0: .*built for 16 tokens and got 49"):
        graft(tiny_host, plan_of(tiny_host, "hyena_x_mlp", 0, kind="mlp", tokens=16))

    @register("test_halves", kind="mixer")
    class Halves(Operator):
        def forward(self, x, grid):
            return x[:, ::2]

    with pytest.raises(UserError, match="returned"):
        graft(tiny_host, plan_of(tiny_host, "test_halves", 0))


def test_damaged_folders_are_one_line(tiny_host, tmp_path):
    folder = tmp_path / "hybrid"
    graft(tiny_host, plan_of(tiny_host, "hyena_x", 1)).save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_host(folder)
    weights.unlink()
    with pytest.raises(UserError, match="not found"):
        load_host(folder)
    weights.write_bytes(whole)
    record = folder / "graft.json"
    record.write_text(record.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(UserError, match="does not fit"):
        load_host(folder)
    record.write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        load_host(folder)


@pytest.mark.parametrize("spec", ["embedded:digit-dit", "embedded:digits", "no/such/folder", "no_such_file.pt"])
def test_unknown_hosts_are_one_line(spec):
    with pytest.raises(UserError) as caught:
        load_host(spec)
    assert "\n" not in str(caught.value)
    assert spec in str(caught.value)
