"""The time per kernel family: kernels by name, and what torch.profiler says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwswap.bench.kernel_families import (
    COPY,
    DEPTHWISE,
    ELEMENTWISE,
    FAMILIES,
    GEMM,
    OTHER,
    REDUCTION,
    family,
    profile,
)

NAMES = {
    DEPTHWISE: [
        "void dwswap::channel_tiles::kernel<dwswap::channel_tiles::Traits<__half, 3, 1> >"
        "(CUtensorMap, dwswap::channel_tiles::Arguments)",
        "void dwswap::separable::separable_conv2d_kernel<dwswap::separable::Traits<__half, 3, 1> >"
        "(dwswap::separable::Arguments)",
        "void dwswap::(anonymous namespace)::general_kernel<float>(dwswap::DepthwiseConv2dParams)",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<1, float, int>",
        "void conv2d_c1_k1_nhwc_kernel_specialized<__half, __half, __half, float, float, 5, 1, 8>",
        "void cudnn::cnn::conv2d_c1_k1_nchw_hw_packed_kernel<float, float, 3>",
        "dwswap::depthwise_conv2d",
    ],
    GEMM: [
        "void dwswap::stem::stem_conv2d_kernel<dwswap::stem::Traits<__half, 32, true> >"
        "(dwswap::stem::Arguments)",
        "void dwswap::(anonymous namespace)::pooled_linear_kernel<__half>"
        "(dwswap::PooledLinearParams)",
        "nvjet_tst_128x16_64x11_2x1_v_bz_TNT",
        "nvjet_tst_64x16_64x16_2x1_v_bz_splitK_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute_kernel__5x_cublas",
        "sm80_xmma_fprop_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64",
        "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_256x64_32x4_nn_align8>",
        "void cutlass::device_kernel<cutlass::gemm::kernel::Sm90, cute::Copy_Atom<SM90_TMA_LOAD>>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float, __half, true>",
        "void implicit_convolve_sgemm<float, float, 128, 6, 7, 3, 3, 5, 1, false, false, true>",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
        "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, 0, 0, int>",
        "void cask_cudnn::first_layer_fwd_kernel<int=4, int=7>",
        "void gemv2T_kernel_val<int, int, __half, __half, __half, float, 128, 16, 4, 4>",
        "triton_tem_fused_mm_4",
        "triton_mm",
        "aten::mkldnn_convolution",
        "aten::addmm",
    ],
    ELEMENTWISE: [
        "void dwswap::excite_kernel<__half, 8, true>(dwswap::SqueezeExcitationParams, "
        "dwswap::ExcitationCut)",
        "void dwswap::channel_scale::scale_kernel<__half, 8>(dwswap::ChannelScaleParams, "
        "dwswap::channel_scale::Places)",
        "void dwswap::channel_scale::product_sums_kernel<__half, 8, true>("
        "dwswap::ChannelScaleParams, dwswap::channel_scale::Places)",
        # Inductor names what it fused: none of these is a convolution, a copy or a reduction.
        "triton_poi_fused__native_batch_norm_legit_no_training_convolution_hardtanh_3",
        "triton_poi_fused_clone_mean_mul_7",
        "void at::native::vectorized_elementwise_kernel<8, at::native::launch_clamp_scalar(...)>",
        "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<c10::Half>>",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<MulFunctor>",
        "void cudnn::bn_fw_inf_1C11_kernel_NCHW<__half, float, true, 1>",
        "void at::native::batch_norm_transform_input_kernel<float, float, float, true, int>",
        "void cudnn::ops::op_tensor_kernel<2, float, float>",
        "aten::hardswish_",
        "aten::native_batch_norm",
        "void cudnn::bn_bw_1C11_kernel_new<__half, float, float2, 512, true, 1>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>>",
    ],
    REDUCTION: [
        "void dwswap::squeeze_kernel<__half, 8, true>(dwswap::SqueezeExcitationParams, "
        "dwswap::ExcitationCut)",
        "triton_red_fused_convolution_mean_silu_12",
        "triton_per_fused_native_layer_norm_0",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::Half, MeanOps>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float>",
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::Half, int>",
        "void at::native::(anonymous namespace)::adaptive_average_pool_nhwc<int, float, float>",
        "void (anonymous namespace)::softmax_warp_forward<c10::Half, c10::Half, float, 6>",
        "void dwswap::channel_norm_kernel<__half, 8, 2, 3>(dwswap::ChannelNormParams)",
        "void dwswap::channel_pool::kernel<__half>(dwswap::channel_pool::Arguments)",
        "aten::mean",
    ],
    COPY: [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<c10::Half, unsigned, 4>",
        "aten::cat",
        "aten::clone",
    ],
    OTHER: [
        "void at::native::(anonymous namespace)::upsample_bilinear2d_out_frame<float, float>",
        "void vision::ops::(anonymous namespace)::nms_kernel_impl<float>(int, double)",
        "torchvision::nms",
        "aten::empty",
    ],
}


@pytest.mark.parametrize(("expected", "name"), [(f, name) for f in FAMILIES for name in NAMES[f]])
def test_family(expected, name):
    assert family(name) == expected


def test_profile_adds_up(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).to(device)
    x = torch.rand(2, 3, 32, 32, device=device)
    rows = profile(lambda: model(x), torch.device(device), forwards=3)
    found = {row.family: row for row in rows}
    assert {GEMM, ELEMENTWISE, REDUCTION} <= found.keys() <= set(FAMILIES)
    assert sum(row.percent for row in rows) == pytest.approx(100)
    assert [row.us for row in rows] == sorted((row.us for row in rows), reverse=True)
    assert all(row.us > 0 for row in rows)
    assert found[ELEMENTWISE].kernels >= 1
    assert found[REDUCTION].largest
