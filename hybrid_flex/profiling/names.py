"""Name the parts of a model in a trace, from outside and for a while.

Layers know nothing of profiling, and a range inside one would be a node of every exported program.  So names are put
around modules and methods from here, and taken off again::

    block 3/mixer/projections    block 3/mixer/indexer    block 3/mixer    block 3/mlp    block 3/norm    logits

Operators need no range: a trace has them under their own names, and `kind_of` says what the report calls them.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from hybrid_flex.checks import check
from hybrid_flex.layers import (
    CausalAttention,
    DeepSeekSparseAttention,
    DeepSeekSparseMLA,
    KimiDeltaAttention,
    LightningIndexer,
    SwiGLU,
)
from hybrid_flex.models import HybridBlock, HybridLanguageModel, LayerWiseHybrid

PROJECTIONS, INDEXER, TOPK, INDEXER_LOSS = "projections", "indexer", "topk", "indexer_loss"
_MIXERS = (KimiDeltaAttention, DeepSeekSparseAttention, DeepSeekSparseMLA, CausalAttention)
_SPARSE = {
    "attend": "",
    "decode_and_select": "",
    "_project": PROJECTIONS,
    "_attended": PROJECTIONS,
    "_output": PROJECTIONS,
}
_METHODS: dict[type[nn.Module], dict[str, str]] = {
    HybridLanguageModel: {"step": "", "_logits": "logits"},
    HybridBlock: {"run": "", "step": ""},
    KimiDeltaAttention: {"step": ""},
    CausalAttention: {"decode": "", "_project": PROJECTIONS},
    DeepSeekSparseAttention: _SPARSE,
    DeepSeekSparseMLA: _SPARSE,
    LightningIndexer: {
        "project": INDEXER,
        "project_queries": INDEXER,
        "project_keys": INDEXER,
        "append": INDEXER,
        "select": TOPK,
        "select_cached": TOPK,
        "kl_loss": INDEXER_LOSS,
    },
}
"""What our modules do in methods that other modules call past ``__call__``: the method, and what it adds to the name.

A method that a class does not have is left out, so that a layer may change its private ones."""

_KINDS: tuple[tuple[str, str], ...] = (
    (r"hybrid_flex::chunk_kda", "kda_chunk"),
    (r"hybrid_flex::(fused_recurrent_kda|kda_decode)", "kda_recurrent"),
    (r"hybrid_flex::short_conv", "short_conv"),
    (r"hybrid_flex::gated_rms_norm", "gated_norm"),
    (r"hybrid_flex::(lightning_topk|select_blocks)", TOPK),
    (r"hybrid_flex::indexer_kl_loss", INDEXER_LOSS),
    (r"hybrid_flex::sparse_attention", "attention"),
    (r"hybrid_flex::pack_selection", "block_mask"),
    (r"hybrid_flex::(\w+?)(_backward)?$", r"\1"),
    (r"aten::_?(scaled_dot_product_|flash_attention_|efficient_attention_)", "attention"),
    (r"flex_attention", "attention"),
)


def kind_of(operator: str) -> str | None:
    """Say what the report calls an operator: of ours and torch's attention by name, None for every other one.

    Args:
        operator: name of an event, ``"hybrid_flex::chunk_kda_backward"``.

    Example:
        >>> kind_of("hybrid_flex::chunk_kda_backward"), kind_of("aten::mm")
        ('kda_chunk', None)
    """
    for pattern, kind in _KINDS:
        match = re.match(pattern, operator)
        if match is not None:
            return match.expand(kind)
    return None


class _Named:
    """Call a method inside a range; in a graph that is being traced, just call it."""

    def __init__(self, method: Callable[..., Any], name: str) -> None:
        self.method, self.name = method, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.method(*args, **kwargs)
        with record_function(self.name):
            return self.method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A model that is copied meanwhile gets its own method, not the original's.
        return copy.deepcopy(self.method, memo)


class _Hooks:
    """Open a range before a module's forward and close it after, also when it fails; one stack per thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: dict[int, list[record_function]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            opened = record_function(self.name)
            opened.__enter__()
            self.open.setdefault(threading.get_ident(), []).append(opened)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            opened = self.open.get(threading.get_ident())
            if opened:
                opened.pop().__exit__(None, None, None)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _child_path(module: nn.Module, path: str, name: str) -> str:
    """Name a child: "blocks.3" is "block 3", and wrappers that say nothing are left out."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and name.isdigit():
        parent, _, last = path.rpartition("/")
        return "/".join(filter(None, (parent, f"{last.removesuffix('s') or 'layer'} {name}")))
    if isinstance(module, (HybridLanguageModel, nn.parallel.DistributedDataParallel)) and name in ("stack", "module"):
        return path
    return f"{path}/{name}" if path else name


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[nn.Module, str]]:
    """Yield modules to be named and their names, but none that is compiled and nothing inside one."""
    if id(module) in seen or _is_compiled(module):
        return
    seen.add(id(module))
    yield module, path
    inside_mixer = isinstance(module, _MIXERS)
    for name, child in module.named_children():
        child_path = _child_path(module, path, name)
        if inside_mixer and isinstance(child, nn.Linear):
            child_path = f"{path}/{PROJECTIONS}" if path else PROJECTIONS
        elif "norm" in type(child).__name__.lower():
            child_path = f"{path}/norm" if path else "norm"
        if isinstance(module, (LightningIndexer, SwiGLU)):
            continue  # the module's own name says enough
        yield from _walk(child, child_path, seen)


def _method_name(module: nn.Module, path: str, suffix: str) -> str:
    if isinstance(module, LightningIndexer):
        parent = path.rpartition("/")[0]
        return f"{parent}/{suffix}" if parent else suffix
    return "/".join(filter(None, (path, suffix))) or type(module).__name__


@contextmanager
def named(*models: nn.Module) -> Iterator[None]:
    """Give the parts of models ranges of their own in whatever is traced inside the body.

    Ranges say where in the model something ran, ``"block 3/mixer/projections"``; modules that are not ours are named by
    their attribute.  A module that is compiled (``torch.compile(module)``, ``module.compile()``) stays as it is, and so
    does what it holds: a graph has no modules.  A compiled function of yours that calls a model works on, unnamed; if
    it has a graph already, it is traced once more for the body.

    Args:
        models: modules, ours or not.

    Raises:
        TypeError: an argument is no module.

    Device:
        any.

    Note:
        Hooks and replaced methods are gone after the body, also when it failed.

    Example:
        >>> from hybrid_flex import KimiDeltaAttention
        >>> layer = KimiDeltaAttention(16, num_heads=1, head_dim=16)
        >>> with torch.profiler.profile() as profiler, named(layer):
        ...     y, _ = layer(torch.randn(1, 5, 16))
        >>> sorted(row.key for row in profiler.key_averages() if row.key in ("KimiDeltaAttention", "projections"))
        ['KimiDeltaAttention', 'projections']
    """
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"named: model must be a torch.nn.Module, got {type(model).__name__}")
    with ExitStack() as stack:
        for model in models:
            for module, path in _walk(model, "", set()):
                _attach(module, path, stack)
        yield


def _attach(module: nn.Module, path: str, stack: ExitStack) -> None:
    methods: dict[str, str] = {}
    for kind, of_kind in _METHODS.items():
        if isinstance(module, kind):
            methods |= of_kind
    own = module.__dict__
    for method, suffix in methods.items():
        if hasattr(module, method) and not isinstance(own.get(method), _Named):
            # Back to the class's method, or to what somebody has put in its place.
            stack.callback(*((own.__setitem__, method, own[method]) if method in own else (own.pop, method)))
            own[method] = _Named(getattr(module, method), _method_name(module, path, suffix))
    # Not called, or their forward calls what has a range already.
    silent = (nn.ModuleList, nn.ModuleDict, LayerWiseHybrid, HybridBlock, LightningIndexer)
    if "attend" in methods or isinstance(module, silent):
        return
    hooks = _Hooks(path or type(module).__name__)
    stack.callback(module.register_forward_pre_hook(hooks.before).remove)
    stack.callback(module.register_forward_hook(hooks.after, always_call=True).remove)


def models_of(model: nn.Module | Iterable[nn.Module] | None) -> tuple[nn.Module, ...]:
    """Return the models that an argument names: none, one, or several."""
    if model is None:
        return ()
    found = (model,) if isinstance(model, nn.Module) else tuple(model)
    check(len(found) > 0, "trace", "model", "hold at least one module", "none")
    return found
