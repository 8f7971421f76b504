"""Fine-tune every weight of Wan 2.1 T2V 14B on your own clips, on a pod.

    python -m vdx.main --config=configs/wan21_t2v_14b.py --workdir=/mnt/runs/wan14b \\
        --config.weights=Wan2.1-T2V-14B-Diffusers/transformer --config.data.path=/data/latents

wan21_t2v_1p3b at ten times the size; docs/finetune.md describes the data. docs/measured/planning.md
has the TPU compiler's account of three slices. `:smoke` is the same program shrunk for the tests.
"""

from ml_collections import ConfigDict

from configs import wan21_t2v_1p3b


def get_config(variant: str = "") -> ConfigDict:
    config = wan21_t2v_1p3b.get_config(variant)
    config.model.backbone.size = "wan_14b"
    return config
