"""Fine-tunes every weight of Wan 2.1 T2V 14B on your own clips, on a pod.

    python -m vdx.main --config=configs/wan21_t2v_14b.py --workdir=/mnt/runs/wan14b \\
        --config.weights=Wan2.1-T2V-14B-Diffusers/transformer --config.data.path=/data/latents

As wan21_t2v_1p3b, ten times as large; docs/finetune.md says what the data holds. docs/planning.md
has what the TPU compiler says of slices that it fits and of some that it does not. `:smoke` is the
same program shrunk for the tests.
"""

from ml_collections import ConfigDict

from configs import wan21_t2v_1p3b


def get_config(variant: str = "") -> ConfigDict:
    config = wan21_t2v_1p3b.get_config(variant)
    config.model.backbone.size = "wan_14b"
    return config
