"""Tiny networks of every kind of KerasHub's that Thaw takes, drawn at random and saved as presets."""

from pathlib import Path

SIZE = 32
SHAPE = (SIZE, SIZE, 3)
ATTENTION = {"num_layers": 3, "num_heads": 2, "hidden_dim": 16, "patch_size": 8, "image_shape": SHAPE}
MLP = ATTENTION | {"intermediate_dim": 32}
SCALE, OFFSET = 1 / 255, -0.5
KINDS = {
    "ViT": {"mlp_dim": 32} | ATTENTION,
    "DeiT": MLP,
    "DINOV2": {"num_register_tokens": 2} | MLP,
    "DINOV3": MLP,
    "CSPNet": {
        "stem_filters": 8, "stem_kernel_size": 3, "stem_strides": 1, "stackwise_depth": [1, 1],
        "stackwise_strides": [2, 2], "stackwise_num_filters": [8, 16], "block_type": "dark_block", "stage_type": "dark",
    },
    "DenseNet": {"stackwise_num_repeats": [1, 1], "growth_rate": 4},
    "EfficientNet": {
        "stackwise_kernel_sizes": [3, 3], "stackwise_num_repeats": [1, 1], "stackwise_input_filters": [8, 8],
        "stackwise_output_filters": [8, 16], "stackwise_expansion_ratios": [1, 2],
        "stackwise_squeeze_and_excite_ratios": [0.25, 0.25], "stackwise_strides": [1, 2],
        "stackwise_block_types": ["v1", "v1"], "width_coefficient": 1.0, "depth_coefficient": 1.0,
    },
    "MobileNet": {
        "stackwise_expansion": [[8], [16]], "stackwise_num_blocks": [1, 1], "stackwise_num_filters": [[8], [8]],
        "stackwise_kernel_size": [[3], [3]], "stackwise_num_strides": [[2], [2]],
        "stackwise_se_ratio": [[None], [0.25]], "stackwise_activation": [["relu"], ["hard_swish"]],
        "stackwise_padding": [[1], [1]], "output_num_filters": 16,
        "input_activation": "hard_swish", "output_activation": "hard_swish",
        "input_num_filters": 8, "depthwise_filters": 8, "squeeze_and_excite": 0.5, "image_shape": SHAPE,
        "last_layer_filter": 16, "depthwise_stride": 1, "depthwise_residual": False,
    },
    "ResNet": {
        "input_conv_filters": [64], "input_conv_kernel_sizes": [7], "stackwise_num_filters": [64, 64],
        "stackwise_num_blocks": [1, 1], "stackwise_num_strides": [1, 2], "block_type": "basic_block",
    },
    "VGG": {"stackwise_num_repeats": [1, 1], "stackwise_num_filters": [8, 8]},
    "Xception": {"stackwise_conv_filters": [[8, 8], [8, 8]], "stackwise_pooling": [True, False]},
}  # fmt: skip


def save(kind: str, folder: Path):
    """Draw a network of a kind at random, save it and its image converter as a preset, and return it."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    network = _siglip() if kind == "SigLIP" else getattr(keras_hub.models, f"{kind}Backbone")(**KINDS[kind])
    network.save_to_preset(str(folder))
    converter = getattr(keras_hub.layers, f"{kind}ImageConverter")
    converter(image_size=(SIZE, SIZE), scale=SCALE, offset=OFFSET).save_to_preset(str(folder))
    return network


def _siglip():
    import keras_hub

    vision = keras_hub.models.SigLIPVisionEncoder(**MLP)
    text = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
    text |= {"vocabulary_size": 20, "embedding_dim": 16, "max_sequence_length": 8}
    return keras_hub.models.SigLIPBackbone(vision, keras_hub.models.SigLIPTextEncoder(**text))
