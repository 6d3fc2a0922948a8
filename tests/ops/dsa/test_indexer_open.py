"""How the selection is traced into graphs that leave sizes open: what its launches share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

pytest.importorskip("triton")
launcher = pytest.importorskip("hybrid_flex.kernels.dsa.topk")


@pytest.mark.parametrize("rotated", [True, False])
def test_launches_read_one_tensor(rotated: bool) -> None:
    """Computed in the graph, it would be computed for each block of queries, into memory of its own."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    HI, DI, blocks = 4, 64, 3

    def fake(*shape: int) -> Tensor:
        x = torch.empty((2, 700, *shape), dtype=torch.bfloat16, device="meta")
        kinds = [DimDynamic.DUCK, DimDynamic.DUCK, *([DimDynamic.STATIC] * len(shape))]
        with symbolic_shapes.patch(backed_size_oblivious=True):
            return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    def select(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        if rotated:
            q, k, w = q * 2, k * 2, w * 2
        else:  # views of what else stands beside them: where that begins, only the graph knows
            k = k.split([DI, DI], -1)[1]
        return launcher.lightning_topk(q, k, w, 64, True, 0, None, 1)

    x = fake(HI, DI), fake(DI if rotated else 2 * DI), fake(HI)
    with pytest.MonkeyPatch.context() as patch, mode, symbolic_shapes.patch(backed_size_oblivious=True):
        patch.setattr(launcher, "MOST_BLOCKS", blocks)
        graph = make_fx(select)(*x).graph
        assert not mode.shape_env.guards, "a question about a size binds the graph"
    target = torch.ops.higher_order.triton_kernel_wrapper_mutation
    launches = graph.find_nodes(op="call_function", target=target)
    scores = [node.kwargs["kwargs"] for node in launches if "p_q" in node.kwargs["kwargs"]]
    assert len(scores) == blocks
    for name in ("p_q", "p_k", "p_w"):
        (source,) = {arguments[name] for arguments in scores}
        kept = source.target is torch.ops.aten.as_strided.default
        assert kept == (rotated or name != "p_k"), name
    absent = {arguments[name] for arguments in scores for name in ("p_scale", "p_table", "p_first", "p_last")}
    assert not absent & {arguments["p_w"] for arguments in scores}, "it would be copied for each of them"
