"""A base may be held in fewer bits: its fingerprint, its modules and what a row gets beside others stay what they were."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapter_hub import base_model
from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.precision import Int8Linear, Precision, float_weight, loading
from adapter_hub.testing import SHAPES, tiny_model

HERE = ("float32", "bfloat16", "int8")    # what every processor has


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rounded_by_hand(rows: Tensor) -> Tensor:
    """Each row to 255 steps, one number after another."""
    rows = rows.detach()
    return torch.stack([torch.tensor([round(float(x / (row.abs().max() / 127))) for x in row]) * (row.abs().max() / 127) for row in rows])


def layers(o: int, i: int) -> list[nn.Module]:
    torch.manual_seed(o * i)
    made = [nn.Linear(i, o), nn.Linear(i, o, bias=False), Conv1D(o, i)]
    for module in made:
        nn.init.normal_(module.weight)
    return made


@pytest.mark.parametrize(("o", "i", "shape"), [(7, 5, (1,)), (16, 32, (3, 4)), (33, 2, (2, 1, 3)), (1, 9, (1, 1))])
def test_a_layer_in_eight_bits_is_the_product_of_the_rounded_numbers(o: int, i: int, shape: tuple[int, ...]) -> None:
    for module in layers(o, i):
        eight = Int8Linear.of(module)
        weight, x = float_weight(module), torch.randn(*shape, i)
        assert torch.allclose(eight.dequantised(), rounded_by_hand(weight), atol=1e-6)
        expected = nn.functional.linear(rounded_by_hand(x.reshape(-1, i)), rounded_by_hand(weight), module.bias).view(*shape, o)
        assert torch.allclose(eight(x), expected, atol=1e-5)


@torch.inference_mode()
def test_a_row_in_eight_bits_is_the_same_bytes_beside_any_other() -> None:
    eight, x = Int8Linear.of(layers(24, 16)[0]), torch.randn(5, 3, 16)
    x[4] *= 1000    # with one scale for the batch nothing would be left of the others
    assert torch.equal(eight(x)[:4], torch.stack([eight(row) for row in x[:4]]))


@torch.inference_mode()
def test_inputs_and_weights_of_zero_give_the_bias_and_what_is_not_finite_stays_so() -> None:
    module = layers(4, 6)[0]
    module.weight[1] = 0
    y = Int8Linear.of(module)(torch.stack([torch.zeros(6), torch.randn(6), torch.full((6,), torch.nan)]))
    assert torch.equal(y[0], module.bias) and y[1, 1] == module.bias[1] and torch.isfinite(y[1]).all() and y[2].isnan().all()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fingerprint_is_of_the_files_and_the_same_at_every_precision(
    shape: str, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path / "base", shape)
    file = folder / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    [expected] = {FrozenBase.load(folder, precision=precision).compute_fingerprint() for precision in HERE}
    assert FrozenBase.load(folder).fingerprint == expected
    fewer = FrozenBase.load(folder, precision="int8")
    monkeypatch.setattr(base_model, "_read", None)    # what one precision hashed, all remember: nothing is read again
    assert fewer.fingerprint == expected


@pytest.mark.parametrize("precision", HERE)
@pytest.mark.parametrize("shape", SHAPES)
def test_modules_keep_their_names_and_nothing_is_trained(shape: str, precision: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "base", shape)
    base, plain = FrozenBase.load(folder, precision=precision), FrozenBase.load(folder)
    assert set(base.modules) == set(plain.modules) and base.precision == precision
    assert base.model.state_dict().keys() >= plain.model.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    linear = {name for name, module in plain.modules.items() if isinstance(module, nn.Linear | Conv1D)} - {"lm_head"}
    assert linear == {name for name, module in base.modules.items() if isinstance(module, Int8Linear)} or precision != "int8"


def test_eight_bits_take_a_quarter_of_the_linear_layers_bytes(tmp_path: Path) -> None:
    def size(precision: str) -> int:
        modules = FrozenBase.load(tiny_model(tmp_path / "base", "llama"), precision=precision).modules
        return sum(t.numel() * t.element_size() for n, m in modules.items() if n.endswith("proj") for t in m.state_dict().values())

    assert size("float32") == 2 * size("bfloat16") and 0.25 < size("int8") / size("float32") < 0.3


@pytest.mark.parametrize(
    ("precision", "fact"),
    [
        ("float16", "Use bfloat16 there"),
        ("nf4", "nf4 does not run on device 'cpu'. Use cuda"),
        ("fp8", "'fp8' is not a precision. Known are float32, bfloat16"),
        (None, "None is not a precision"),
    ],
)
def test_a_precision_that_is_not_to_be_had_is_refused_with_the_next_step(precision: str, fact: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=fact):
        FrozenBase.load(tiny_model(tmp_path / "base"), precision=precision)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.NF4])
def test_without_bitsandbytes_it_is_said_what_to_install(precision: Precision) -> None:
    with pytest.raises(InvalidInput, match=f"{precision} on cuda needs the package bitsandbytes. Install it"):
        loading(precision, torch.device("cuda"))
