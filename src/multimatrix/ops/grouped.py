"""Rows times the matrix of their group: torch's `grouped_mm` where it serves, one product a group elsewhere.

Neither depends on the data in its shapes, so both can be captured by `torch.compile`; grouped_mm also never waits for
the device. The loop is an operator of our own, so that a compiler sees one node in place of a loop of unknown sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_products(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """x [R, in], rows in order of their group, and matrices [E, out, in] -> [R, out].

    ends: int32 [E], the row after the last one of each group; a group may be empty. Under autocast both are cast to
    its dtype, as for a linear map.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, matrices = x.to(dtype), matrices.to(dtype)
    if grouped_mm_serves(x, matrices):
        return F.grouped_mm(x, matrices.transpose(1, 2), offs=ends)
    return products_one_by_one(x, matrices, ends)


def grouped_mm_serves(x: Tensor, matrices: Tensor) -> bool:
    """Whether torch's grouped product takes these tensors, forward and backward."""
    # Rows of both operands, of the output and of every gradient must be multiples of 16 bytes.
    if any(width * x.element_size() % 16 for width in matrices.shape[1:]):
        return False
    if x.device.type == "cuda":
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    # torch.compile takes bfloat16 alone; without it a CPU takes these three.
    compiled = x.device.type != "cpu" or torch.compiler.is_compiling()
    return x.dtype == torch.bfloat16 or (x.dtype in (torch.float32, torch.float16) and not compiled)


@torch.library.custom_op("multimatrix::products_one_by_one", mutates_args=())
def products_one_by_one(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`grouped_products` in any dtype and width, one group after the other."""
    groups = zip(x.split(_sizes(ends)), matrices, strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in groups])


@products_one_by_one.register_fake
def _(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[1])


@torch.library.custom_op("multimatrix::outer_products_one_by_one", mutates_args=())
def _outer_products(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left [R, out] and right [R, in] -> the sum over each group's rows of their outer products, [E, out, in]."""
    sizes = _sizes(ends)
    return torch.stack([a.T @ b for a, b in zip(left.split(sizes), right.split(sizes), strict=True)])


@_outer_products.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, matrices, ends = ctx.saved_tensors
    return products_one_by_one(grad, matrices.transpose(1, 2), ends), _outer_products(grad, x, ends), None


products_one_by_one.register_autograd(_backward, setup_context=_save)


def _sizes(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()
