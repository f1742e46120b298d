"""The forward functions that take the place of those of diffusers' and PyTorch's modules.

Each is a function of the module itself and computes what the module's class does. Whatever a user may have put there is
called as a module, not read: adapters in place of a layer, hooks, parametrizations. Layers are fused only if they are
exactly PyTorch's own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fastddpm.kernels import native
from fastddpm.ops.attention import attention as attend
from fastddpm.ops.attention import join_heads, split_heads
from fastddpm.ops.conv3x3 import conv3x3
from fastddpm.ops.derivatives import transformed
from fastddpm.ops.group_norm_silu import group_norm_silu
from fastddpm.ops.norm_conv import norm_conv

_FEWEST_ROWS, _FEWEST_PRODUCTS = 64, 1 << 23  # with fewer, PyTorch's matrix product is as fast


def _original(module: Any, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether nothing of `module` would be lost if its parameters were read and it were not called."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and _has_plain_weights(module)
    )


def _has_plain_weights(layer: nn.Module) -> bool:
    """Whether weight and bias, if any, are what PyTorch's layers have: a subclass, quantised say, has its own rules."""
    weights = (getattr(layer, name, None) for name in ("weight", "bias"))
    return all(w is None or type(w) in (nn.Parameter, Tensor) for w in weights)


def _observed() -> bool:
    """Whether hooks of every module are registered, which must be called for those that fusing leaves out, too."""
    return not torch.compiler.is_compiling() and bool(
        torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    )


def _fuses(x: Tensor) -> bool:
    """Whether `norm_conv` takes a call with `x`: without gradients, in float32, on a CPU with the library."""
    fit = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled() and not transformed(x)
    return fit and (torch.compiler.is_compiling() or native.unavailable() is None)


def _is_3x3(conv: Any, stride: int = 1) -> bool:
    shape = conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode
    return shape == ((3, 3), (stride, stride), (1, 1), 1, "zeros") and conv.padding in ((0, 0), (1, 1), 0, 1)


def is_same_3x3(module: nn.Module) -> bool:
    """Whether `module` is PyTorch's own 3x3 convolution with stride 1 that keeps the size."""
    return type(module) is nn.Conv2d and _is_3x3(module) and module.padding == (1, 1)


def conv_forward(self: nn.Conv2d, input: Tensor) -> Tensor:
    off = input.device.type != "cpu" or input.ndim != 4 or not _has_plain_weights(self)
    if off or torch.is_autocast_enabled("cpu"):
        return _original(self, input)
    if _fuses(input):
        return norm_conv(input, self.weight, self.bias)
    return conv3x3(input, self.weight, self.bias)


def norm_forward(self: nn.GroupNorm, input: Tensor) -> Tensor:
    if input.ndim != 4 or torch.is_autocast_enabled(input.device.type):
        return _original(self, input)
    return _normed(self, input, silu=False)


def _normed(norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor:
    return group_norm_silu(_laid_out(x), norm.weight, norm.bias, norm.num_groups, norm.eps, **options)


def _laid_out(x: Tensor) -> Tensor:
    """On a CPU the kernels are fastest in channels_last, and give it on."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def last_norm_forward(self: Any, input: Tensor) -> Tensor:
    """The norm before the network's last convolution, with the SiLU that follows it, `self._fastddpm_act`."""
    if _fuses_last(self, self._fastddpm_act[0], input):
        return _normed(self, input)
    return norm_forward(self, input)


def last_act_forward(self: Any, input: Tensor) -> Tensor:
    """Nothing is left to do, if the norm before, `self._fastddpm_norm`, has done it."""
    return input if _fuses_last(self._fastddpm_norm[0], self, input) else _original(self, input)


def _fuses_last(norm: nn.GroupNorm, act: nn.SiLU, x: Tensor) -> bool:
    plain = _is_plain(norm, nn.GroupNorm) and _is_plain(act, nn.SiLU) and not _observed()
    return plain and x.ndim == 4 and not torch.is_autocast_enabled(x.device.type)


def resnet_forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' ResnetBlock2D: conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + temb)))) + shortcut(x)."""
    norm1, norm2, conv1, conv2 = self.norm1, self.norm2, self.conv1, self.conv2
    activation, shortcut = self.nonlinearity, self.conv_shortcut
    fused = _is_plain(norm1, nn.GroupNorm) and _is_plain(norm2, nn.GroupNorm)
    fused = fused and _is_plain(activation, nn.SiLU) and not _observed()
    if not fused or args or kwargs or torch.is_autocast_enabled(input_tensor.device.type):
        return _original(self, input_tensor, temb, *args, **kwargs)
    x, scale, shift, project = input_tensor, None, None, self.time_emb_proj
    if project is not None:
        temb = project(temb if self.skip_time_act else activation(temb))
    if self.time_embedding_norm == "scale_shift":
        if temb is None:
            raise ValueError("temb must not be None when time_embedding_norm is scale_shift")
        scale, shift = temb.chunk(2, dim=1)
        temb = None
    resized = self.upsample is not None or self.downsample is not None
    convs = _is_plain(conv1, nn.Conv2d) and _is_plain(conv2, nn.Conv2d)
    alone = convs and is_same_3x3(conv1) and is_same_3x3(conv2) and not self.training
    if alone and not resized and _fuses(x) and (self.output_scale_factor == 1):
        h = norm_conv(
            x, conv1.weight, conv1.bias, norm=(norm1.weight, norm1.bias, norm1.num_groups, norm1.eps),
            silu=True, temb=temb,
        )  # fmt: skip
        return norm_conv(
            h, conv2.weight, conv2.bias, norm=(norm2.weight, norm2.bias, norm2.num_groups, norm2.eps),
            silu=True, scale=scale, shift=shift, residual=x if shortcut is None else shortcut(x),
        )  # fmt: skip
    h = _normed(norm1, x)
    for resize in (self.upsample, self.downsample):
        if resize is not None:
            x, h = resize(x), resize(h)
    h = _normed(norm2, conv1(h), temb=temb, scale=scale, shift=shift)
    h = conv2(self.dropout(h))
    x = x if shortcut is None else shortcut(x)
    return (x + h) / self.output_scale_factor


def shortcut_forward(self: nn.Conv2d, input: Tensor) -> Tensor:
    """A 1x1 convolution."""
    plain = input.ndim == 4 and _has_plain_weights(self)
    if plain and not torch.is_autocast_enabled(input.device.type) and _fuses(input):
        return norm_conv(input, self.weight, self.bias)
    return _original(self, input)


def upsample_forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' Upsample2D with a convolution: doubled in the convolution's reads, not in memory."""
    conv = self.conv if self.name == "conv" else self.Conv2d_0
    doubles = output_size is None or tuple(output_size) == tuple(2 * size for size in hidden_states.shape[2:])
    off = args or kwargs or hidden_states.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if off or not doubles or not _is_plain(conv, nn.Conv2d) or not is_same_3x3(conv) or _observed():
        return _original(self, hidden_states, output_size, *args, **kwargs)
    if _fuses(hidden_states):
        return norm_conv(hidden_states, conv.weight, conv.bias, doubled=True)
    return conv3x3(hidden_states, conv.weight, conv.bias, doubled=True)


def downsample_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' Downsample2D with a convolution, for even sizes and without gradients."""
    even = not (hidden_states.shape[2] % 2 or hidden_states.shape[3] % 2)
    plain = _is_plain(self.conv, nn.Conv2d) and _is_3x3(self.conv, stride=2) and not _observed()
    if args or kwargs or not even or not plain or torch.is_autocast_enabled("cpu") or not _fuses(hidden_states):
        return _original(self, hidden_states, *args, **kwargs)
    return norm_conv(hidden_states, self.conv.weight, self.conv.bias, stride=2, pad=self.padding)


def linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """A linear layer, as a 1x1 convolution of one image of one row."""
    rows = input.numel() // max(1, self.in_features)
    small = rows < _FEWEST_ROWS or rows * self.weight.numel() < _FEWEST_PRODUCTS
    if small or not _has_plain_weights(self) or torch.is_autocast_enabled(input.device.type) or not _fuses(input):
        return _original(self, input)
    image = input.reshape(1, 1, rows, self.in_features).permute(0, 3, 1, 2)
    out = norm_conv(image, self.weight[:, :, None, None], self.bias)
    return out.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


def attention_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **kwargs: Any
) -> Tensor:
    """diffusers' Attention of the pixels of an image, or of the tokens of a transformer, among themselves: no mask."""
    alone = encoder_hidden_states is None and attention_mask is None
    for name in kwargs:
        alone = alone and name == "temb"  # which only a spatial norm reads, and this attention has none
    of_image = hidden_states.ndim == 4
    plain = _is_plain(self.group_norm, nn.GroupNorm) if of_image else self.group_norm is None
    plain = plain and not _observed() and type(self.processor).__name__ == "AttnProcessor2_0"
    cast = torch.is_autocast_enabled(hidden_states.device.type)
    if cast or not alone or not plain or not (self.heads == 1 or _takes_heads(hidden_states)):
        return _original(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )
    tokens = hidden_states
    if of_image:
        tokens = _normed(self.group_norm, hidden_states, silu=False).permute(0, 2, 3, 1).flatten(1, 2)
    q, k, v = (split_heads(layer(tokens), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
    out = self.to_out[1](self.to_out[0](join_heads(attend(q, k, v), self.heads)))
    if of_image:
        out = out.unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2)
    out = out + hidden_states if self.residual_connection else out
    return out if self.rescale_output_factor == 1 else out / self.rescale_output_factor


def _takes_heads(x: Tensor) -> bool:
    """Whether attention of several heads over `x` is ours: without gradients, with tokens enough to be faster."""
    tokens = x.shape[2] * x.shape[3] if x.ndim == 4 else x.shape[1]
    return tokens >= _FEWEST_ROWS and _fuses(x)
