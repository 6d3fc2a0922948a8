"""A loop over the leading dimension that costs one graph node when it is traced and nothing extra when it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hybrid_flex.checks import is_plain

Step = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


def chunk_scan(
    step: Step,
    carry: Tensor,
    xs: tuple[Tensor, ...],
    sources: Iterable[Tensor | None],
    shared: tuple[Tensor, ...] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Carry a state through slices of ``xs``: ``carry, ys[i] = step(carry, xs[i])`` for i = 0, 1, ...

    Args:
        step: function of the carry, one slice of every tensor in ``xs``, and the tensors in ``shared``, if there are
            any; returns the next carry (same shape and dtype) and a tuple of tensors to stack. It must not write to its
            arguments, and captures no tensor.
        carry: the state before the first slice.
        xs: tensors that share their leading dimension, at least 1 long.
        sources: the tensors from whose sizes those of ``carry`` and ``xs`` are computed: the arguments of the operator.
        shared: tensors that every step reads whole.

    Returns:
        The last carry and the stacked ``ys``, each with the leading dimension of ``xs``.

    On plain tensors this is a Python loop. While a graph is being traced it becomes one ``scan`` node, so the time to
    compile does not grow with the number of slices and that number may be dynamic. The ``scan`` of torch has no public
    name yet; where it is missing the loop is unrolled, which is right but fixes the number of slices.
    """
    scan_op = None if is_plain(carry) else _find_scan_op()
    if scan_op is not None:

        def combine(*flat: Tensor) -> tuple[Tensor, ...]:
            whole = flat[1 + len(xs) : 1 + len(xs) + len(shared)]
            state, ys = step(flat[0], flat[1 : 1 + len(xs)], *whole)
            # Outputs of a scan body may not alias one another or an input.
            return tuple(t.clone() for t in (state, *ys))

        # The carry goes in as a copy of its own: a scan may not alias its inputs either. Slices of dense tensors are
        # views; a tensor with gaps would be copied whole, once per slice, by the loop that a scan is lowered to.
        witnesses = _size_witnesses(sources)
        last, *stacked = scan_op(combine, [carry.clone()], [_dense(x) for x in xs], (*shared, *witnesses))
        return last, tuple(stacked)

    outputs: list[tuple[Tensor, ...]] = []
    for i in range(xs[0].shape[0]):
        carry, ys = step(carry, tuple(x[i] for x in xs), *shared)
        outputs.append(ys)
    return carry, tuple(torch.stack(column) for column in zip(*outputs, strict=True))


def _size_witnesses(sources: Iterable[Tensor | None]) -> tuple[torch.SymInt | Tensor, ...]:
    """Collect every dynamic size, once as a number and once as the length of an empty tensor.

    # NOTE [Size witnesses]
    Lowering a scan recomputes the shapes in it from symbols, and looks for those among the scan's own inputs.
    Outside the loop it reads the numbers.  Inside it reads numbers and tensors, but where two sizes are equal (T of
    q, T of k) the shapes speak of one symbol and the number may carry the other; the length of a tensor always
    carries the right one.
    """
    sizes: list[int | torch.SymInt] = [size for tensor in sources if tensor is not None for size in tensor.shape]
    symbols = [size for size in sizes if isinstance(size, torch.SymInt)]
    return (*symbols, *(torch.empty((size, 0)) for size in symbols))


def _dense(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _find_scan_op() -> Callable[..., tuple[Tensor, ...]] | None:
    try:
        from torch._higher_order_ops.scan import scan_op
    except ImportError:
        return None
    return scan_op
