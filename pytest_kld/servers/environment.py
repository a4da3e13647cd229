"""Which environment variables of a process may change what it computes. Standard library only: servers use it too."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_kld.plain import secret_digest

_PREFIXES = (
    *("SGLANG_", "SGL_", "VLLM_", "FLASHINFER_", "TRTLLM_", "FA_", "FLA_", "FLASH_ATTENTION_", "FMHA_", "TIMM_FUSED_"),
    *("TORCH", "PYTORCH_", "ATEN_", "TRITON_", "CUTE_", "CUTLASS_", "DG_", "DEEPGEMM", "DEEP_", "DEEPEP_", "MOE_"),
    *("CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_TF32", "NCCL_", "RCCL_", "NVSHMEM_", "MSCCLPP_", "USE_TRITON_", "USE_VLLM_"),
    *("USE_HUB_KERNELS", "DISABLE_KERNEL"),
    *("HIP_", "HSA_", "ROCM_", "ROCBLAS_", "MIOPEN_", "HIPBLASLT_", "AITER_", "CK_", "USE_ROCM_", "ASCEND_"),
    *("OMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_"),
)
"""Prefixes of the variables that engines, their kernels and the libraries below them read."""
_LEFT_OUT = {
    "CUDA_VISIBLE_DEVICES": "which GPUs: their model is in the key, and a lease picks among them",
    "CUDA_DEVICE_ORDER": "the numbering of the GPUs",
    "HIP_VISIBLE_DEVICES": "which GPUs",
    "CUDA_MODULE_LOADING": "when kernels are loaded, not which; torch sets it when it first uses a GPU",
    "KMP_DUPLICATE_LIB_OK": "scikit-learn sets it when it is imported",
    "KMP_INIT_AT_FORK": "scikit-learn sets it when it is imported",
    "CUDA_CACHE_PATH": "where compiled kernels are kept",
    "TORCHINDUCTOR_CACHE_DIR": "where compiled kernels are kept; torch sets it when it compiles",
    "TORCH_EXTENSIONS_DIR": "where compiled kernels are kept",
    "TRITON_CACHE_DIR": "where compiled kernels are kept; SGLang sets it for each rank",
    "TORCH_HOME": "where downloads are kept",
    "TORCH_LOGS": "what is printed",
    "TORCH_CPP_LOG_LEVEL": "what is printed",
    "NCCL_DEBUG": "what is printed",
    "NCCL_DEBUG_FILE": "what is printed",
    "VLLM_LOGGING_LEVEL": "what is printed",
    "SGLANG_LOGGING_CONFIG_PATH": "what is printed",
    "SGLANG_HOST_IP": "an address",
    "SGLANG_PORT": "an address",
    "SGLANG_RUN_ID": "SGLang sets a new one at each start",
    "VLLM_DIST_IDENT": "vLLM sets a new one at each start",
    "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME": "vLLM sets a new one at each start",
    "VLLM_HOST_IP": "an address",
    "VLLM_PORT": "an address",
    "VLLM_NO_USAGE_STATS": "what is told to vLLM's makers",
    "VLLM_DO_NOT_TRACK": "what is told to vLLM's makers",
}
"""Variables with these prefixes that cannot change a number, each with the reason. Doubtful ones are not listed."""


def numeric_environment(environ: Mapping[str, str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that may change what a process computes, sorted, for a cache key and for reports.

    Args:
        environ: what the process inherits.
        given: the variables that the user set for it; all are kept, whatever their names.

    Returns:
        Names and values; if the name suggests a secret, only a digest of the value.

    """
    inherited = {name: value for name, value in environ.items() if name.startswith(_PREFIXES) and name not in _LEFT_OUT}
    return {name: secret_digest(name, value) for name, value in sorted({**inherited, **(given or {})}.items())}
