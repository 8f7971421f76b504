"""From raw footage to clips: every setting of vdx.prepare.

    python -m vdx.prepare --source=FOLDER --out=DIR --workers=2

Each threshold was set on footage with planted faults. A changed threshold is applied in seconds:
nothing is decoded again. `null` turns a threshold off.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "look": {
                "cell_seconds": 0.5,  # a measure is a number for each half second
            },
            "decide": {
                "min_seconds": 1.0,  # a shorter piece of a shot is dropped
                "max_seconds": 10.0,  # a longer shot is split into equal clips
                "cut_score": 0.65,  # candidates of cuts below it are no cuts
                "duplicate_distance": 0.2,  # clips whose hashes differ in less are duplicates
                "caption_required": True,  # a clip without a caption is dropped
                # reason -> measure -> number. A clip beyond any of them is dropped.
                "thresholds": {
                    # Levels of 255 that some part of the image changes in half a second.
                    "static": {"block_change": 1.8},
                    # Standard deviation of the levels: black, white, one colour.
                    "blank": {"contrast": 4.0},
                },
            },
            "clips": {
                "short_side": None,  # pixels; larger clips are made smaller
                "crf": 16,  # visually lossless
                "audio_rate": 16_000,  # samples a second, as encoders of speech read; 0: none
            },
            "shards": {
                "per_shard": 256,  # clips of a file
                "validation_fraction": 0.1,  # of the sources, by a hash of the name
            },
        }
    )
