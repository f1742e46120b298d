"""Which modules of a network get our operations, which do not and why, and the way back.

A module is changed by one attribute of its own, `forward`, which Python finds before that of its class. Parameters,
buffers, `state_dict`, hooks and the modules themselves stay as they are.
"""

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastddpm.errors import UsageError
from fastddpm.kernels import native
from fastddpm.ops.backend import obstacles

from . import forwards

NETWORKS = ("UNet2DModel", "UNet2DConditionModel")
_MARKS = ("_fastddpm_act", "_fastddpm_norm")


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: the names of replaced modules by what they are now, and of those left, by reason."""

    replaced: dict[str, tuple[str, ...]]
    left: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(names)} x {what}" for what, names in self.replaced.items()] or ["nothing was replaced"]
        lines += [f"left {len(names)}: {reason} ({_some(names)})" for reason, names in self.left.items()]
        return "\n".join([*lines, *self.notes])


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (", .." if len(names) > 2 else "")


def accelerate(network: nn.Module) -> Report:
    """Let a `UNet2DModel` or `UNet2DConditionModel` of diffusers compute with fastddpm's operations, in place.

    Values and gradients are those of diffusers within float32 rounding. `restore` undoes it; parameters and
    `state_dict` are not touched. On a CPU: norms with SiLU and time embedding, 3x3 convolutions and attention of
    one head; without gradients (`torch.no_grad`) a residual block is two calls, and on a processor with AVX-512
    that is not Intel's, where MKL is slow, linear layers and self-attention of several heads are ours, too. Nothing
    is kept of the weights, so that any change is noticed, those through `.data` included. On a GPU: the norms.
    Whatever is not exactly diffusers' or PyTorch's own layer is called as it is: adapters, hooks, other attention
    processors. Dropout in training is PyTorch's. Under torch.autocast everything runs as before. Called again, it
    goes over the network anew, as is needed after a layer was exchanged. Raises `UsageError` for other networks,
    subclasses included.
    """
    _check(network)
    restore(network)
    plans = [(name, module, _plan(module)) for name, module in network.named_modules()]
    replaced: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    for name, module, plan in plans:
        if isinstance(plan, str):
            left.setdefault(plan, []).append(name)
        elif plan is not None and _owner_of_forward(module) is not None:
            left.setdefault(f"its forward was replaced by {_owner_of_forward(module)}", []).append(name)
        elif plan is not None:
            replaced.setdefault(plan[0], []).append(name)
            module.forward = types.MethodType(plan[1], module)
    _pair_last(network, replaced)
    device = next((p.device.type for p in network.parameters()), "cpu")
    slow = {reason for operation in ("group_norm_silu", "conv3x3") for reason in obstacles(operation, device)}
    return Report(_frozen(replaced), _frozen(left), tuple(f"note: {reason}" for reason in sorted(slow)))


def restore(network: nn.Module) -> int:
    """Undo `accelerate` on a network or a part of one; return how many modules were restored."""
    count = 0
    for module in network.modules():
        forward = vars(module).get("forward")
        if getattr(forward, "__func__", None) in _OURS:
            del module.forward
            count += 1
        for mark in _MARKS:
            vars(module).pop(mark, None)
    return count


def _frozen(found: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(names) for key, names in found.items()}


def _check(network: nn.Module) -> None:
    kind = type(network)
    if _is_of_diffusers(network) and kind.__name__ in NETWORKS:
        return
    base = next((c.__name__ for c in kind.__mro__ if c.__name__ in NETWORKS), None)
    what = f"{kind.__module__}.{kind.__qualname__}"
    if base is not None:
        raise UsageError(f"{what} is a subclass of {base}, whose code is not known; accelerate takes {base} itself")
    raise UsageError(f"accelerate takes {' and '.join(NETWORKS)} of diffusers; got {what}")


def _is_of_diffusers(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "diffusers"


def _owner_of_forward(module: nn.Module) -> str | None:
    """Return who replaced the forward of this very module, or None."""
    forward = vars(module).get("forward")
    if forward is None:
        return None
    function = getattr(forward, "func", getattr(forward, "__func__", forward))
    return str(getattr(function, "__module__", type(function).__module__))


Plan = tuple[str, Callable[..., Any]]


def _plan(module: nn.Module) -> Plan | str | None:
    """Return what a module becomes, a name and its new forward; the reason if it is left; None if it has no part."""
    kind = type(module)
    if kind is nn.Conv2d:
        return _plan_conv(module)
    if kind is nn.Linear:
        return ("linear layer", forwards.linear_forward) if _outpaces_mkl() else "linear layers: PyTorch's is as fast"
    if kind is nn.GroupNorm:
        return ("GroupNorm", forwards.norm_forward) if module.affine else "a GroupNorm without weights"
    known = {
        "ResnetBlock2D": _plan_resnet, "Upsample2D": _plan_upsample, "Downsample2D": _plan_downsample,
        "Attention": _plan_attention,
    }  # fmt: skip
    if kind.__name__ in known and _is_of_diffusers(module):
        return known[kind.__name__](module)
    base = next((c.__name__ for c in kind.__mro__[1:] if c.__name__ in known), None)
    return f"{kind.__qualname__} is a subclass of {base}, whose code is not known" if base is not None else None


def _plan_conv(conv: Any) -> Plan | str:
    if forwards.is_same_3x3(conv):
        return "3x3 convolution", forwards.conv_forward
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1:
        return "1x1 convolution", forwards.shortcut_forward
    if conv.kernel_size == (3, 3) and conv.stride == (2, 2):
        return "a 3x3 convolution with stride 2 is called by its Downsample2D"
    return "a convolution that is neither 3x3 with padding 1 nor 1x1"


def _plan_resnet(block: Any) -> Plan | str:
    if type(block.nonlinearity) is not nn.SiLU:
        return f"a ResnetBlock2D with {type(block.nonlinearity).__name__} in place of SiLU"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"a ResnetBlock2D with time_embedding_norm {block.time_embedding_norm}"
    return "ResnetBlock2D", forwards.resnet_forward


def _plan_upsample(up: Any) -> Plan | str:
    if not up.use_conv or up.use_conv_transpose or up.norm is not None or not up.interpolate:
        return "an Upsample2D without a convolution, or with a norm or a transposed one"
    return "Upsample2D", forwards.upsample_forward


def _plan_downsample(down: Any) -> Plan | str:
    if not down.use_conv or down.norm is not None or down.padding not in (0, 1):
        return "a Downsample2D without a convolution, or with a norm or other padding"
    return "Downsample2D", forwards.downsample_forward


def _plan_attention(attention: Any) -> Plan | str:
    special = (
        attention.spatial_norm,
        attention.norm_q,
        attention.norm_k,
        attention.norm_cross,
        attention.added_kv_proj_dim,
    )
    if attention.is_cross_attention:
        return "attention over other tokens"
    if (attention.heads != 1 or attention.group_norm is None) and not _outpaces_mkl():
        return "attention of several heads, for which PyTorch's is as fast"
    if any(part is not None for part in special) or not attention.scale_qk or attention.to_out is None:
        return "attention with norms or projections of its own"
    if attention.inner_dim != attention.inner_kv_dim or attention.is_causal:
        return "attention with fewer key heads or a causal mask"
    return f"attention of {'one head' if attention.heads == 1 else 'several heads'}", forwards.attention_forward


def _outpaces_mkl() -> bool:
    return native.unavailable() is None and native.outpaces_mkl()


def _pair_last(network: Any, replaced: dict[str, list[str]]) -> None:
    """Fuse the network's last norm with the activation after it. Tuples, so that they do not become submodules."""
    norm: Any = getattr(network, "conv_norm_out", None)
    act: Any = getattr(network, "conv_act", None)
    ours = getattr(vars(norm).get("forward"), "__func__", None) if norm is not None else None
    if ours is not forwards.norm_forward or type(act) is not nn.SiLU or "forward" in vars(act):
        return
    vars(norm).update(_fastddpm_act=(act,), forward=types.MethodType(forwards.last_norm_forward, norm))
    vars(act).update(_fastddpm_norm=(norm,), forward=types.MethodType(forwards.last_act_forward, act))
    replaced["GroupNorm"].remove("conv_norm_out")
    replaced.setdefault("GroupNorm with the SiLU after it", []).append("conv_norm_out")


_OURS: Iterable[Any] = tuple(
    value for name, value in vars(forwards).items() if name.endswith("_forward") and callable(value)
)
