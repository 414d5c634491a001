"""diffusers' LoRA files: PEFT's tensors under the names of a pipeline's models, in one file.

The layer X of the U-Net becomes `unet.X.lora_A.weight` and `….lora_B.weight`. What we write has
one rank for all modules and neither alphas nor metadata: every release reads that as a scale of 1.
"""

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Where other writers keep r, lora_alpha and patterns, in the file's header."""


def part_names(name: str) -> tuple[str, str]:
    """Returns the names of A and B of a tensor whose component stands in front.

    >>> part_names("unet.mid_block.attentions.0.proj_in.weight")[0]
    'unet.mid_block.attentions.0.proj_in.lora_A.weight'
    """
    X = name.removesuffix(".weight")
    return f"{X}.lora_A.weight", f"{X}.lora_B.weight"
