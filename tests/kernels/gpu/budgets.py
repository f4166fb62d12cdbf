"""What the Triton kernels may use, and must become, on every GPU they are compiled for. Nothing may spill.

`BUDGETS` is `{case: {kernel: (registers a thread, bytes of shared memory a block)}}`: the most over `CAPABILITIES`
as `python ahead_of_time.py CAPABILITY` measured it with Triton `MEASURED_WITH`, rounded up to 16 registers and 1 KiB.
"""

MEASURED_WITH = "3.7.1"
CAPABILITIES = (80, 90, 100)
MATRIX_INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}
BUDGETS = {
    "generate_weights 1x1 bf16": {"generate_kernel": (64, 11264)},
    "generate_weights 1x1 fp32": {"generate_kernel": (80, 20480)},
    "generate_weights 3x3 bf16": {"generate_kernel": (64, 6144)},
    "generate_weights depthwise bf16": {"generate_kernel": (64, 11264)},
    "generate_weights depthwise fp32": {"generate_kernel": (80, 20480)},
    "update_generators 1x1": {"update_kernel": (80, 1024), "add_programs_kernel": (48, 1024)},
    "update_generators 3x3 8 structures": {"update_kernel": (80, 2048), "add_programs_kernel": (48, 1024)},
    "update_generators depthwise": {"update_kernel": (80, 1024), "add_programs_kernel": (48, 1024)},
    "update_generators shared": {"update_kernel": (80, 1024)},
    "update_generators delayed": {
        "update_kernel": (80, 2048),
        "add_programs_kernel": (48, 1024),
        "generate_kernel": (112, 21504),
    },
    "update_generators delayed half": {
        "update_kernel": (80, 4096),
        "add_programs_kernel": (48, 1024),
        "generate_kernel": (64, 10240),
    },
    "ragged_conv 1x1 32-16 bf16": {"conv_kernel": (80, 28672)},
    "ragged_conv 1x1 96-576 bf16": {"conv_kernel": (255, 99328)},
    "ragged_conv 1x1 96-576 fp32": {"conv_kernel": (128, 20480)},
    "ragged_conv 1x1 144-24 calibrating bf16": {"conv_kernel": (128, 29696), "total_kernel": (48, 1024)},
    "ragged_conv 1x1 144-24 calibrating fp32": {"conv_kernel": (112, 17408), "total_kernel": (48, 1024)},
    "ragged_conv 1x1 96-576 calibrating bf16": {"conv_kernel": (224, 50176), "total_kernel": (48, 2048)},
    "ragged_conv 1x1 256-512 stride 2 bf16": {"conv_kernel": (255, 99328)},
    "ragged_conv 3x3 64-64 bf16": {"conv_kernel": (192, 74752)},
    "ragged_conv 3x3 64-64 fp32": {"conv_kernel": (128, 20480)},
    "ragged_conv 3x3 256-256 stride 2 calibrating bf16": {"conv_kernel": (224, 50176), "total_kernel": (48, 2048)},
    "ragged_conv 3x3 256-256 stride 2 calibrating fp32": {"conv_kernel": (144, 21504), "total_kernel": (48, 2048)},
    "ragged_conv 7x7 3-64 stride 2 bf16": {"conv_kernel": (128, 19456)},
    "generated_conv 1x1 320-1280 bf16": {"generated_conv_kernel": (128, 23552), "total_kernel": (32, 2048)},
    "generated_conv 1x1 320-1280 fp32": {"generated_conv_kernel": (128, 27648)},
    "generated_conv 3x3 512-512 fp32": {"generated_conv_kernel": (128, 27648), "total_kernel": (32, 2048)},
    "ragged_conv_backward 1x1 96-576 bf16": {
        "arriving_kernel": (80, 0),
        "conv_weight_gradient_kernel": (176, 37888),
        "parts_kernel": (32, 0),
        "conv_input_gradient_kernel": (255, 50176),
        "total_kernel": (64, 2048),
    },
    "ragged_conv_backward 3x3 256-256 stride 2 bf16": {
        "arriving_kernel": (80, 0),
        "conv_weight_gradient_kernel": (176, 37888),
        "parts_kernel": (32, 0),
        "conv_input_gradient_kernel": (255, 50176),
        "total_kernel": (64, 2048),
    },
    "ragged_conv_backward 3x3 256-256 stride 2 fp32": {
        "arriving_kernel": (96, 0),
        "conv_weight_gradient_kernel": (128, 20480),
        "parts_kernel": (32, 0),
        "conv_input_gradient_kernel": (128, 16384),
        "total_kernel": (64, 2048),
    },
    "ragged_conv_backward 1x1 256-512 stride 2 bf16": {
        "arriving_kernel": (80, 0),
        "conv_weight_gradient_kernel": (176, 74752),
        "parts_kernel": (32, 0),
        "conv_input_gradient_kernel": (176, 50176),
    },
    "ragged_conv_backward 7x7 3-64 stride 2 bf16": {
        "arriving_kernel": (80, 0),
        "conv_weight_gradient_kernel": (128, 50176),
        "parts_kernel": (32, 0),
    },
    "ragged_depthwise bf16": {"depthwise_kernel": (112, 0)},
    "ragged_depthwise stride 2 calibrating bf16": {"depthwise_kernel": (208, 1024), "total_kernel": (48, 2048)},
    "ragged_depthwise stride 2 calibrating fp32": {"depthwise_kernel": (208, 1024), "total_kernel": (48, 2048)},
    "ragged_depthwise_backward bf16": {
        "depthwise_weight_gradient_kernel": (128, 8192),
        "parts_kernel": (32, 0),
        "depthwise_input_gradient_kernel": (176, 1024),
        "total_kernel": (64, 2048),
    },
    "ragged_depthwise_backward stride 2 fp32": {
        "depthwise_weight_gradient_kernel": (128, 16384),
        "parts_kernel": (32, 0),
        "depthwise_input_gradient_kernel": (224, 1024),
        "total_kernel": (64, 2048),
    },
    "ragged_normalise bf16": {"normalise_kernel": (80, 0)},
    "ragged_normalise fp32": {"normalise_kernel": (80, 0)},
    "ragged_max_pool bf16": {"max_pool_kernel": (80, 0)},
    "ragged_normalise_backward bf16": {"normalise_gradient_kernel": (208, 1024), "total_kernel": (64, 2048)},
    "ragged_max_pool_backward bf16": {"largest_kernel": (80, 0), "max_pool_gradient_kernel": (208, 0)},
    "score_logits bf16": {"pool_kernel": (48, 2048), "score_kernel": (112, 4096)},
    "score_logits fp32": {"pool_kernel": (48, 2048), "score_kernel": (112, 4096)},
    "TensorFloat32": {
        "generate_kernel": (64, 21504),
        "conv_kernel": (160, 25600),
        "total_kernel": (64, 2048),
        "arriving_kernel": (96, 0),
        "conv_weight_gradient_kernel": (96, 25600),
        "parts_kernel": (32, 0),
        "conv_input_gradient_kernel": (96, 25600),
        "pool_kernel": (48, 2048),
        "score_kernel": (112, 4096),
    },
    "least": {
        "generate_kernel": (48, 3072),
        "conv_kernel": (80, 14336),
        "generated_conv_kernel": (112, 25600),
        "total_kernel": (48, 1024),
        "depthwise_kernel": (64, 1024),
        "normalise_kernel": (96, 0),
        "max_pool_kernel": (32, 0),
        "arriving_kernel": (64, 0),
        "conv_weight_gradient_kernel": (64, 16384),
        "parts_kernel": (32, 0),
        "conv_input_gradient_kernel": (112, 15360),
        "depthwise_weight_gradient_kernel": (64, 8192),
        "depthwise_input_gradient_kernel": (112, 1024),
        "normalise_gradient_kernel": (192, 1024),
        "largest_kernel": (32, 0),
        "max_pool_gradient_kernel": (48, 0),
        "pool_kernel": (32, 2048),
        "score_kernel": (48, 4096),
        "update_kernel": (48, 1024),
        "add_programs_kernel": (48, 1024),
    },
    "fused_block bf16": {"conv_kernel": (255, 99328), "depthwise_kernel": (112, 0)},
}
# The same for the CUDA kernels: `{op: {kernel: registers a thread}}`, the most of all its instances. Four blocks of
# 128 threads share a multiprocessor at 128 registers, three at 168.
CUDA_BUDGETS = {
    "fused_block": {"fused_block_kernel": 128},
    "ragged_depthwise": {"staged_kernel": 168, "direct_kernel": 112, "total_kernel": 48},
}
# Copies of 16 bytes into shared memory that run ahead, and accesses of 16 bytes.
CUDA_INSTRUCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "fused_block": {"fused_block_kernel": ("LDGSTS.E.BYPASS.128",)},
    "ragged_depthwise": {
        "staged_kernel": ("LDGSTS.E.BYPASS.128", "LDS.128", "STG.E.128"),
        "direct_kernel": ("LDG.E.128", "STG.E.128"),
    },
}
