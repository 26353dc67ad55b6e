"""How a base model's weights are held in memory: in which type, or in how many bits. The files, and so the fingerprint, are the same.

    y = s_x s_w (x̂ Ŵᵀ) + b     int8 on the CPU: x̂ a token's inputs and Ŵ an output's weights as whole numbers of -127 to 127

Both scales are the largest magnitude over 127, of one token and of one output (Dettmers et al. 2022, "LLM.int8()", §2.1, without its
outliers). A token's own scale, and sums that are exact in int32, keep a row independent of its neighbours within one such layer; torch's
own dynamic quantisation has one scale for a whole batch. What is between the layers is computed in float32, whose rounding depends on the
neighbours, and the next layer may round that to another whole number: across a model rows agree as far as 8 bits reach.
"""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from functools import cache
from typing import Any, Self, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapter_hub.errors import InvalidInput

_config = cast(Any, BitsAndBytesConfig)
# m tokens, i inputs of a module, o outputs
_STEPS = 127


class Precision(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"    # on CUDA
    INT8 = "int8"          # linear layers in 8 bits: on the CPU by `Int8Linear`, on CUDA by bitsandbytes
    NF4 = "nf4"            # linear layers in 4 bits, on CUDA by bitsandbytes

    @classmethod
    def of(cls, name: object) -> Self:
        """Raises InvalidInput for one that there is not."""
        if name not in cls.__members__.values():
            raise InvalidInput(f"{name!r} is not a precision.", hint=f"Known are {', '.join(cls)}.")
        return cls(str(name))


def loading(precision: Precision, device: torch.device) -> dict[str, Any]:
    """What transformers' `from_pretrained` is told. Raises InvalidInput where the device or the package for it is not there."""
    if precision is Precision.FLOAT16 and device.type == "cpu":
        raise InvalidInput("float16 does not run on the CPU.", hint="Use bfloat16 there, or device='cuda'.")
    if precision is Precision.NF4 or (precision is Precision.INT8 and device.type != "cpu"):
        return _by_bitsandbytes(precision, device)
    if precision is Precision.INT8 and not _exact():
        raise InvalidInput("torch's int8 product overflows on this processor.", hint="Choose bfloat16.")
    return {"dtype": torch.float32 if precision is Precision.INT8 else getattr(torch, precision)}


def _by_bitsandbytes(precision: Precision, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":    # on a processor its first forward packs the weights anew, and what DoRA reads of them is wrong
        raise InvalidInput(f"{precision} does not run on device {str(device)!r}.", hint="Use cuda, or choose bfloat16.")
    if importlib.util.find_spec("bitsandbytes") is None:
        hint = "Install it (pip install bitsandbytes), or choose bfloat16."
        raise InvalidInput(f"{precision} on {device.type} needs the package bitsandbytes.", hint=hint)
    if precision is Precision.INT8:
        dtype, config = torch.float16, _config(load_in_8bit=True)    # its 8-bit product is computed so, whatever it is given
    else:
        dtype, config = torch.bfloat16, _config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"dtype": dtype, "quantization_config": config, "device_map": {"": device}}


@cache
def _exact() -> bool:
    """Whether sums do not saturate: without VNNI some did, unsaid (pytorch issue 136746)."""
    most = torch.full((64, 64), _STEPS, dtype=torch.int8)
    return bool((torch._int_mm(most, most) == 64 * _STEPS**2).all())


class Int8Linear(nn.Linear):
    """A linear layer in 8 bits, its inputs too; of two inputs or more, for torch's product of one is wrong. Made by `of`."""

    weight: nn.Parameter    # (o, i) int8
    scale: Tensor           # (o,) float32

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Linear | Conv1D) -> Self:
        weight = float_weight(module)
        scale = _scale(weight)
        made = cls(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(_rounded(weight, scale), requires_grad=False)
        made.register_buffer("scale", scale.squeeze(1))
        made.bias = module.bias
        return made.train(False)

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, self.in_features)
        scale = _scale(x)    # (m, 1)
        exact = torch._int_mm(_rounded(x, scale), self.weight.T)
        y = exact.to(scale.dtype).mul_(scale).mul_(self.scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*input.shape[:-1], self.out_features)

    def dequantised(self) -> Tensor:
        """(o, i)"""
        return self.weight * self.scale[:, None]


def _scale(rows: Tensor) -> Tensor:
    """Of each row, (…, 1)."""
    return rows.abs().amax(dim=1, keepdim=True).div_(_STEPS).clamp_(min=torch.finfo(rows.dtype).tiny)


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).round_().to(torch.int8)


def to_int8(model: PreTrainedModel) -> None:
    """Put `Int8Linear` in the place of the model's linear layers. The one that scores the vocabulary stays: every error there is seen."""
    scoring, made = cast(Any, model).get_output_embeddings(), dict[nn.Module, nn.Module]()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if linear and module is not scoring and module.weight.numel() > max(module.weight.shape):
            if module not in made:
                made[module] = Int8Linear.of(module)
            model.set_submodule(name, made[module])


def float_weight(module: nn.Module) -> Tensor:
    """(o, i), of a linear module; what it computes with, where it is held in fewer bits."""
    if isinstance(module, Int8Linear):
        return module.dequantised()
    weight: Tensor = dequantize_module_weight(module)    # itself, unless bitsandbytes packed it
    return weight.T if isinstance(module, Conv1D) else weight
