"""Kimi Delta Attention as a layer: a linear-time mixer with a state of fixed size.

x -> q, k, v projections -> short causal convolution + SiLU -> chunk_kda -> gated RMS norm per head -> o projection
x -> low-rank forget gate, beta ----------------------------------^              ^--- low-rank output gate <- x
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybrid_flex.checks import check, check_cu_seqlens, check_shape
from hybrid_flex.layers.float32 import Float32Parameters
from hybrid_flex.layers.state import KDAState, check_state
from hybrid_flex.ops.kda import chunk_kda, fused_recurrent_kda, gated_rms_norm, short_conv

# Kimi Linear initialises the decay like a Mamba step size: exp U(log 1e-3, log 1e-1) through an inverse softplus.
DT_MIN, DT_MAX = 1e-3, 1e-1


class KimiDeltaAttention(Float32Parameters):
    """Mix tokens with the gated delta rule, one decay per key channel.

    With ``q, k, v = SiLU(conv(W x))``, q and k L2-normalised per head, ``beta = sigmoid(W_b x)`` and the forget gate
    ``g = -exp(A_log) * softplus(W_fb W_fa x + dt_bias)``::

        S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = K^-0.5 S_t^T q_t
        y_t = W_o [ RMSNorm(o_t) * sigmoid(W_gb W_ga x_t) ]

    Args:
        hidden_size: model width D.
        num_heads: query and key heads H.
        head_dim: key width K of a head.
        num_v_heads: value heads HV, a multiple of H; H by default.  Each has its own decay, beta and state.
        v_head_dim: value width V of a head; K by default.
        conv_size: taps W of the short convolutions, 2 to 8.
        gate_rank: inner width of the two low-rank gates; ``head_dim`` by default, as in Kimi Linear.
        lower_bound: None for the softplus gate; a negative number for
            ``g = lower_bound * sigmoid(exp(A_log) * (raw + dt_bias))``, which keeps ``g`` above it (-5 in later
            models).
        allow_neg_eigval: double beta, so that a state transition may reflect.
        norm_eps: eps of the gated RMS norm.
        chunk_size: tokens per chunk of the parallel form: 16, 32 or 64.

    Raises:
        ValueError: a count or width is not positive, or HV is no multiple of H.

    Note:
        ``A_log [HV]`` and ``dt_bias [HV * K]`` stay float32 when the layer is cast to half precision.

    Device: CPU and CUDA.

    Source: Kimi Linear, arXiv:2510.26692, section 3 and appendix; initialisation from its reference implementation.

    Example:
        >>> layer = KimiDeltaAttention(32, num_heads=2, head_dim=16)
        >>> y, state = layer(torch.randn(3, 70, 32))
        >>> y_t, state = layer.step(torch.randn(3, 32), state)
        >>> y.shape, y_t.shape, state.S.shape
        (torch.Size([3, 70, 32]), torch.Size([3, 32]), torch.Size([3, 2, 16, 16]))
    """

    float32_parameters = ("A_log", "dt_bias")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 128,
        *,
        num_v_heads: int | None = None,
        v_head_dim: int | None = None,
        conv_size: int = 4,
        gate_rank: int | None = None,
        lower_bound: float | None = None,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        gate_rank = head_dim if gate_rank is None else gate_rank
        name = "KimiDeltaAttention"
        for argument, value in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("head_dim", head_dim),
            ("num_v_heads", num_v_heads),
            ("v_head_dim", v_head_dim),
            ("gate_rank", gate_rank),
        ):
            check(value > 0, name, argument, "be positive", value)
        multiple = num_v_heads % num_heads == 0
        check(multiple, name, "num_v_heads", f"be a multiple of num_heads = {num_heads}", num_v_heads)
        check(2 <= conv_size <= 8, name, "conv_size", "be between 2 and 8", conv_size)
        check(chunk_size in (16, 32, 64), name, "chunk_size", "be 16, 32 or 64", chunk_size)
        check(lower_bound is None or lower_bound < 0, name, "lower_bound", "be None or negative", lower_bound)
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.num_v_heads, self.v_head_dim, self.conv_size = num_v_heads, v_head_dim, conv_size
        self.lower_bound, self.allow_neg_eigval = lower_bound, allow_neg_eigval
        self.norm_eps, self.chunk_size = norm_eps, chunk_size

        key_size, value_size = num_heads * head_dim, num_v_heads * v_head_dim
        self.q_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_size, bias=False)
        self.q_conv = nn.Parameter(torch.empty(key_size, conv_size))
        self.k_conv = nn.Parameter(torch.empty(key_size, conv_size))
        self.v_conv = nn.Parameter(torch.empty(value_size, conv_size))
        self.f_a_proj = nn.Linear(hidden_size, gate_rank, bias=False)
        self.f_b_proj = nn.Linear(gate_rank, num_v_heads * head_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_v_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads * head_dim, dtype=torch.float32))
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden_size, gate_rank, bias=False)
        self.g_b_proj = nn.Linear(gate_rank, value_size, bias=False)
        self.o_norm = nn.Parameter(torch.ones(v_head_dim))
        self.o_proj = nn.Linear(value_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw ``A_log = log U(1, 16)``, ``softplus(dt_bias) = exp U(log 1e-3, log 1e-1)`` and the convolution taps."""
        self.A_log.uniform_(1.0, 16.0).log_()
        step = self.dt_bias.uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        # softplus^-1(y) = y + log(1 - exp(-y)), stable for small y
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        for taps in (self.q_conv, self.k_conv, self.v_conv):
            taps.uniform_(-(self.conv_size**-0.5), self.conv_size**-0.5)

    def forward(
        self, x: Tensor, state: KDAState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, KDAState]:
        """Mix a stretch of tokens with the chunked form.

        Args:
            x: hidden states ``[B, T, D]``.
            state: what an earlier call returned, for N sequences (N = B, or the packed ones); None to begin.
            cu_seqlens: int32 or int64 ``[N + 1]`` boundaries of sequences packed along T, with B = 1.

        Returns:
            ``y [B, T, D]`` and the state after the last token of each sequence.

        Raises:
            ValueError: a shape does not fit, or the state is of another batch size.
        """
        return self._mix(x, state, cu_seqlens, chunk_kda)

    def step(self, x_t: Tensor, state: KDAState) -> tuple[Tensor, KDAState]:
        """Mix one token per sequence, ``x_t [B, D] -> y_t [B, D]``, with the recurrent form."""
        y, state = self._mix(x_t.unsqueeze(1), state, None, fused_recurrent_kda)
        return y.squeeze(1), state

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KDAState:
        """Make the all-zero state of ``batch_size`` sequences.

        The convolution tails have ``dtype``, ``S`` is float32 (float64 if ``dtype`` is).  ``device`` and ``dtype`` are
        those of the weights unless given.
        """
        device = self.q_conv.device if device is None else device
        dtype = self.q_conv.dtype if dtype is None else dtype
        tails = [
            torch.zeros(batch_size, self.conv_size - 1, taps.shape[0], device=device, dtype=dtype)
            for taps in (self.q_conv, self.k_conv, self.v_conv)
        ]
        S_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        S = torch.zeros(batch_size, self.num_v_heads, self.head_dim, self.v_head_dim, device=device, dtype=S_dtype)
        return KDAState(S, *tails)

    def _mix(
        self,
        x: Tensor,
        state: KDAState | None,
        cu_seqlens: Tensor | None,
        kda: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, KDAState]:
        self._check_inputs(x, state, cu_seqlens)
        q, conv_q = self._convolve(self.q_proj(x), self.q_conv, state.conv_q if state is not None else None, cu_seqlens)
        k, conv_k = self._convolve(self.k_proj(x), self.k_conv, state.conv_k if state is not None else None, cu_seqlens)
        v, conv_v = self._convolve(self.v_proj(x), self.v_conv, state.conv_v if state is not None else None, cu_seqlens)
        o, S = kda(
            q.unflatten(-1, (self.num_heads, self.head_dim)),
            k.unflatten(-1, (self.num_heads, self.head_dim)),
            v.unflatten(-1, (self.num_v_heads, self.v_head_dim)),
            self.f_b_proj(self.f_a_proj(x)).unflatten(-1, (self.num_v_heads, self.head_dim)),
            self.b_proj(x),
            initial_state=None if state is None else state.S,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            safe_gate=self.lower_bound is not None,
            lower_bound=self.lower_bound,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
        )
        assert S is not None
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, (self.num_v_heads, self.v_head_dim))
        o = gated_rms_norm(o, gate, self.o_norm.to(o.dtype), eps=self.norm_eps, activation="sigmoid")
        return self.o_proj(o.flatten(-2)), KDAState(S, conv_q, conv_k, conv_v)

    def _convolve(
        self, x: Tensor, taps: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Under autocast the projections come in half precision while the taps are float32 masters.
        y, new_tail = short_conv(
            x,
            taps.to(x.dtype),
            activation="silu",
            initial_state=tail,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        assert new_tail is not None
        return y, new_tail

    def _check_inputs(self, x: Tensor, state: KDAState | None, cu_seqlens: Tensor | None) -> None:
        name = "KimiDeltaAttention"
        check_shape(name, "x", x, (None, None, self.hidden_size), "[B, T, D]")
        if cu_seqlens is not None:
            check_cu_seqlens(name, cu_seqlens, x.shape[0], x.shape[1])
        if state is not None:
            num_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            heads = (None, self.num_v_heads, self.head_dim, self.v_head_dim)
            check_state(name, "state.S", state.S, heads, num_sequences)

    def extra_repr(self) -> str:
        """Name the widths in ``print(layer)``."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_v_heads={self.num_v_heads}, "
            f"v_head_dim={self.v_head_dim}, conv_size={self.conv_size}, lower_bound={self.lower_bound}"
        )
