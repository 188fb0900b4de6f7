"""``param_groups``, and the projection of tensors outside of an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import NORM_BOUND, norm_deviation
from torch import nn

import fastwrs
from fastwrs import Rescale, Shrink

pytestmark = pytest.mark.cpu


def roles(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Per parameter: the axis that it is rescaled along, else "decayed" or "left alone"."""
    groups = fastwrs.param_groups(model, weight_decay=0.25, **options)
    found: dict[str, Any] = {}
    for group in groups:
        assert group["params"]
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert name not in found
            assert dict(model.named_parameters())[name] is param
            option = group["rescale"] or group["shrink"]
            assert group["weight_decay"] in ((0.0,) if option else (0.0, 0.25))
            found[name] = option.axis if option else ("decayed" if group["weight_decay"] else "left alone")
    assert found.keys() == dict(model.named_parameters()).keys()
    fastwrs.AdamW(groups)  # every parameter has the axis of its group
    return found


def test_a_convolutional_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8, 4))
    expected = {
        "0.weight": "out",
        "0.bias": "left alone",
        "1.weight": "decayed",
        "1.bias": "decayed",
        "2.weight": "decayed",
        "2.bias": "decayed",
        "4.weight": "out",
        "4.bias": "left alone",
    }
    assert roles(model) == expected
    assert roles(model, head="skip") == {**expected, "4.weight": "left alone"}
    assert roles(model, head=("0",)) == {**expected, "0.weight": "left alone"}
    assert roles(model, rescale=None) == {k: "left alone" if v == "out" else v for k, v in expected.items()}
    assert roles(model, rescale=None, shrink=Shrink(0.1, axis="in"))["0.weight"] == "in"


def test_groups_carry_the_options() -> None:
    rescale, shrink = Rescale(every=4, target=2.0, axis="in"), Shrink(0.1, axis="in", power=0.5)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    scaled, norms, rest = fastwrs.param_groups(model, rescale=rescale, shrink=shrink, weight_decay=0.5)
    assert (scaled["rescale"], scaled["shrink"], scaled["weight_decay"]) == (rescale, shrink, 0.0)
    assert (norms["rescale"], norms["shrink"], norms["weight_decay"]) == (None, None, 0.5)
    assert (rest["rescale"], rest["shrink"], rest["weight_decay"]) == (None, None, 0.0)
    optimizer = fastwrs.AdamW([scaled, norms, rest])  # AdamW's own decay of 1e-2 reaches no group
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5, 0.0]


def test_transposed_convolutions() -> None:
    model = nn.ModuleDict({f"d{k}": kind(3, 4, 2) for k, kind in ((1, nn.ConvTranspose1d), (3, nn.ConvTranspose3d))})
    assert roles(model) == {
        "d1.weight": (0, 2),
        "d1.bias": "left alone",
        "d3.weight": (0, 2, 3, 4),
        "d3.bias": "left alone",
    }
    assert {role for name, role in roles(model, rescale=Rescale(axis="in")).items() if "weight" in name} == {(0,)}
    assert roles(model, rescale=Rescale(axis="tensor"))["d3.weight"] == "tensor"
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2))
    with pytest.warns(UserWarning, match="^0: .*ConvTranspose2d with groups=2 is not rescaled"):
        assert roles(grouped) == {"0.weight": "left alone", "0.bias": "left alone"}


@pytest.mark.usefixtures("backend")
def test_output_channels_of_a_transposed_convolution_get_their_norm() -> None:
    model = nn.ConvTranspose2d(3, 5, 2, bias=False)
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=Rescale(target=3.0)))
    model(torch.ones(1, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert norm_deviation(model.weight.detach(), (0, 2, 3), 3.0) <= NORM_BOUND[torch.float32]


def test_depthwise_weights_take_out() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 12, 1), nn.Conv2d(1, 6, 3), nn.Conv2d(6, 12, 3, groups=3)
    )
    weights = {name: role for name, role in roles(model, rescale=Rescale(axis="in")).items() if "weight" in name}
    assert weights == {"0.weight": "out", "1.weight": "in", "2.weight": "out", "3.weight": "in"}


def test_attention_embeddings_and_recurrent_weights() -> None:
    model = nn.ModuleDict(
        {
            "same": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "other": nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
            "embedding": nn.Embedding(7, 4),
            "lstm": nn.LSTM(4, 4),
            "bilinear": nn.Bilinear(2, 3, 4),
        }
    )
    found = roles(model)
    scaled = {name for name, role in found.items() if role == "out"}
    projections = {f"other.{key}_proj_weight" for key in "qkv"}
    assert scaled == {"same.in_proj_weight", "same.out_proj.weight", "other.out_proj.weight"} | projections
    assert set(found.values()) == {"out", "left alone"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_parametrized_weights_are_left_alone() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.utils.weight_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    )
    assert {name for name, role in roles(model).items() if role == "out"} == {"3.weight"}


def test_norm_types() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

    model = nn.Sequential(nn.Linear(4, 4), Scale(), nn.RMSNorm(4), nn.InstanceNorm1d(4, affine=True))
    assert roles(model)["1.gain"] == "left alone"
    for types in (Scale, (Scale,)):
        assert roles(model, norm_types=types) | {"0.weight": "", "0.bias": ""} == {
            "0.weight": "",
            "0.bias": "",
            "1.gain": "decayed",
            "2.weight": "decayed",
            "3.weight": "decayed",
            "3.bias": "decayed",
        }


class Tied(nn.Module):
    def __init__(self, embedding_first: bool) -> None:
        super().__init__()
        embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        head.weight = embedding.weight
        for name, module in (("a", embedding), ("b", head)) if embedding_first else (("a", head), ("b", embedding)):
            self.add_module(name, module)


def test_tied_parameters_have_their_first_role_unless_skipped() -> None:
    assert roles(Tied(embedding_first=True)) == {"a.weight": "left alone"}
    assert roles(Tied(embedding_first=False)) == {"a.weight": "out"}
    assert roles(Tied(embedding_first=False), head="skip") == {"a.weight": "left alone"}
    shared = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    shared[1].weight = shared[0].weight
    assert roles(shared) == {"0.weight": "out"}
    assert roles(shared, head="skip") == {"0.weight": "left alone"}


def test_complex_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 4))
    assert roles(model) == {"0.weight": "left alone", "0.bias": "left alone", "1.weight": "out", "1.bias": "left alone"}


def test_one_input_channel_and_norms_in_a_head() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(1, 5, 2, bias=False), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    assert roles(model, rescale=Rescale(axis="in"))["0.weight"] == (0, 2, 3)
    found = roles(model, head=("1",))
    assert (found["1.0.weight"], found["1.1.weight"], found["1.1.bias"]) == ("left alone", "decayed", "decayed")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_frozen_lazy_and_loose_parameters_are_not_lost() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loose = nn.Parameter(torch.ones(3, 3))
            self.layer = nn.Linear(3, 3).requires_grad_(False)

    assert roles(Loose()) == {"loose": "left alone", "layer.weight": "out", "layer.bias": "left alone"}
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyConv2d(4, 3))
    assert {name for name, role in roles(lazy).items() if role == "out"} == {"0.weight", "1.weight"}


def test_a_model_that_is_one_layer() -> None:
    assert roles(nn.Linear(3, 4)) == {"weight": "out", "bias": "left alone"}
    assert roles(nn.Linear(3, 4), head="skip") == {"weight": "left alone", "bias": "left alone"}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "keep"}, ValueError, "head must be 'rescale', 'skip' or a tuple"),
        ({"head": ("nowhere",)}, ValueError, "the model has no module 'nowhere'"),
        ({"head": ["0"]}, TypeError, "head must be"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite"),
        ({"norm_types": "LayerNorm"}, TypeError, "norm_types must be module classes"),
        ({"rescale": 1.0}, TypeError, "rescale must be None or fastwrs.Rescale"),
        ({"shrink": Shrink(0.1, axis="in")}, ValueError, "need the same axis"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastwrs.param_groups(nn.Sequential(nn.Linear(3, 4)), **options)


@pytest.mark.bad_input
def test_bad_model() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"):
        fastwrs.param_groups([nn.Linear(3, 4)])  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- projection


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("axis", "dims"), [("out", (1, 2)), ("in", (1,)), ("tensor", (0, 1, 2)), (0, (0,)), ([0, -1], (0, 2))]
)
def test_projection_of_several_dtypes(axis: Any, dims: tuple[int, ...]) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
    tensors = [nn.Parameter(torch.randn(4, 3, 5, dtype=torch.float64).to(dtype)) for dtype in dtypes]
    versions = [tensor._version for tensor in tensors]
    before = fastwrs.channel_norms(iter(tensors), axis=axis)
    for tensor, norms in zip(tensors, before, strict=True):
        wanted = torch.linalg.vector_norm(tensor.detach().double(), dim=dims)
        assert norms.dtype == (torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        assert not norms.requires_grad
        torch.testing.assert_close(norms.double(), wanted, rtol=3e-7, atol=0)
    fastwrs.rescale_(iter(tensors), axis=axis, target=1.5)
    for tensor, version in zip(tensors, versions, strict=True):
        assert norm_deviation(tensor.detach(), dims, 1.5) <= NORM_BOUND[tensor.dtype]
        assert tensor._version > version


@pytest.mark.usefixtures("backend")
def test_projection_of_one_tensor_zeros_and_empty_ones() -> None:
    single = torch.tensor([[3.0, 4.0], [0.0, 0.0], [float("inf"), 1.0]])
    assert [norms.tolist() for norms in fastwrs.channel_norms(single)] == [[5.0, 0.0, float("inf")]]
    fastwrs.rescale_(single)
    torch.testing.assert_close(single, torch.tensor([[0.6, 0.8], [0.0, 0.0], [float("inf"), 1.0]]))
    fastwrs.rescale_([])
    assert fastwrs.channel_norms([]) == []
    empty = torch.zeros(3, 0)
    fastwrs.rescale_([empty, single, single])
    assert [norms.tolist() for norms in fastwrs.channel_norms([empty])] == [[0.0, 0.0, 0.0]]
    assert fastwrs.channel_norms(torch.tensor(-2.0), axis="tensor")[0].item() == 2.0
    assert fastwrs.channel_norms(torch.ones(2, 1).expand(2, 4))[0].tolist() == [2.0, 2.0]


@pytest.mark.bad_input
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        (torch.ones(5), {}, r"tensors\[1\] of shape \(5,\): axis 'out' needs at least 2 dimensions"),
        (torch.ones(2, 3), {"axis": 2}, r"tensors\[\d\] of shape .*dimension 2"),
        (torch.ones(2, 3), {"axis": "rows"}, "axis must be one of"),
        (torch.ones(2, 3), {"target": 0.0}, "target must be > 0"),
        (torch.ones(2, 3), {"target": float("nan")}, "target must be finite"),
        (torch.ones(2, 3, dtype=torch.int64), {}, r"tensors\[1\] .*integer dtype"),
        (torch.ones(2, 3, dtype=torch.complex64), {}, r"tensors\[1\] .*complex"),
        (torch.ones(2, 3).to_sparse(), {}, r"tensors\[1\] .*sparse"),
        (torch.ones(2, 1).expand(2, 3), {}, r"tensors\[1\] .*overlaps itself"),
        ("text", {}, r"tensors\[1\] must be a tensor, got str"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_projection_refuses_before_it_writes(bad: Any, options: dict[str, Any], message: str) -> None:
    good = [torch.full((2, 3), 2.0), torch.full((2, 3), 3.0)]
    with pytest.raises((TypeError, ValueError), match=message):
        fastwrs.rescale_([good[0], bad, good[1]], **options)
    assert [tensor.unique().tolist() for tensor in good] == [[2.0], [3.0]]


@pytest.mark.bad_input
def test_projection_refuses_shared_memory() -> None:
    memory = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"tensors\[0\] of shape \(3, 3\) and tensors\[1\] of shape \(2, 3\) share"):
        fastwrs.rescale_([memory[:3], memory[2:]])
    assert torch.equal(memory, torch.ones(4, 3))
