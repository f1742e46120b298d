"""The kernels of a step as a GPU's profiler tells them, beside those that were listed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import step_measured
from step_measured import Kernel

from fastddpm.config import EngineConfig


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_group_norm_silu_whole_forward_kernel", "norm"),
        ("void fastddpm::group_norm_silu_forward::normalize<__nv_bfloat16, 8>(Arguments)", "norm"),
        ("_attention_fwd_kernel", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x128>", "convolution"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "product"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "product"),
        ("_add_product_kernel", "product"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>(...)", "copy"),
        ("_reverse_step_kernel", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<float>>", "elementwise"),
    ],
)
def test_kernels_are_told_by_their_names(name: str, kind: str) -> None:
    assert Kernel(name, 1, 1e-6).kind == kind


def test_a_step_is_the_average_of_those_profiled() -> None:
    events = [
        SimpleNamespace(key="_attention_fwd_kernel", count=40, self_device_time_total=80.0),
        SimpleNamespace(key="cudaGraphLaunch", count=20, self_device_time_total=0.0),
        SimpleNamespace(key="_group_norm_silu_kernel", count=20, self_device_time_total=400.0),
    ]
    assert step_measured.per_step(events, 20) == [
        Kernel("_group_norm_silu_kernel", 1.0, pytest.approx(20e-6)), Kernel("_attention_fwd_kernel", 2.0, 4e-6)
    ]  # fmt: skip


def test_what_was_measured_stands_beside_the_list() -> None:
    """Three kinds: one listed and measured, one only listed, one only measured."""
    one = {"kernels": 2.0, "floor_ms": 0.5, "predicted_ms": 1.0}
    predicted = {"norm": one, "product": one, "total": {name: 2 * value for name, value in one.items()}}
    table = step_measured.beside(predicted, [Kernel("_group_norm_silu", 2.0, 2e-3), Kernel("CatArrayBatch", 4.0, 1e-3)])
    assert list(table) == ["norm", "product", "copy", "total"]
    assert table["norm"] == {"kernels": 2.0, "kernels_measured": 2.0, "floor_ms": 0.5, "predicted_ms": 1.0, "ms": 2.0,
                             "share_of_floor": 0.25}  # fmt: skip
    assert table["product"]["ms"] == 0 and table["product"]["share_of_floor"] is None
    assert (table["copy"]["kernels"], table["copy"]["kernels_measured"], table["copy"]["ms"]) == (0.0, 4.0, 1.0)
    assert (table["total"]["kernels_measured"], table["total"]["ms"]) == (6.0, pytest.approx(3.0))


@pytest.mark.slow
def test_the_steps_are_those_of_sampler_and_trainer() -> None:
    device = torch.device("cpu")
    for step in (
        step_measured.sampling("mnist", 1, EngineConfig(), device), step_measured.training("mnist", 2, "fp32", device)
    ):  # fmt: skip
        for _ in range(2):
            step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step_measured.main(["--preset", "mnist"])
    assert "torch sees none" in capsys.readouterr().err
