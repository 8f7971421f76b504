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
                # Read text, for watermarks and captions: half a second of a CPU for each frame.
                "text": False,  # true needs the extra `text`
                "text_seconds": 1.0,  # of footage, of which one frame is read
            },
            "decide": {
                "min_seconds": 1.0,  # a shorter piece of a shot is dropped
                "max_seconds": 10.0,  # a longer shot is split into equal clips
                "cut_score": 0.65,  # candidates of cuts below it are no cuts
                "duplicate_distance": 0.2,  # clips whose hashes differ in less are duplicates
                "caption_required": True,  # a clip without a caption is dropped
                # reason -> measure -> number. A clip beyond any of them is dropped.
                # The figures in comments are from tests/data/planted_faults.py, 400x224.
                "thresholds": {
                    "low_resolution": {
                        # Pixels of the content. Set it to the side that you train at.
                        "short_side": None,
                        # Pixels. Enlarged 2.5 to 4 times: 2.8 to 3.7; photographs: 2.0 to 2.8.
                        "edge_width": 3.1,
                        # Decades. Enlarged 2.5 to 4 times: -2.9 to -2.3; photographs: above -2.2.
                        "fine_detail": -2.3,
                        # Share of the lines. Pixels made 2 to 4 times larger: 0.2 to 0.7; else 0.1.
                        "repeated_lines": 0.15,
                    },
                    "compression": {
                        # H.264 at CRF 38 to 48: 44 to 51; at CRF 20 to 28: 22 to 35.
                        "quantiser": 38.0,
                        # JPEG and MPEG-4 inside: 0.15 to 3; clean footage: up to 0.2.
                        "blockiness": 0.22,
                    },
                    # Shares of the image. Measured with --config.look.text=true alone.
                    "watermark": {"watermark_share": 0.002},
                    "text": {"text_share": 0.01},
                    # Thousandths of the width. Jitter of 1 pixel of 400: 9; strobe, hands: up to 4.
                    "shake": {"shake": 4.5},
                    # Levels of 255 that some part of the image changes in half a second. Frozen
                    # frames with noise: up to 0.7; an object on a tripod: 12 and more.
                    "static": {"block_change": 1.8},
                    # Share of the image. null keeps such clips, without their bars.
                    "borders": {"bar_share": 0.02},
                    # Standard deviation of the levels. One colour: up to 0.6; night: 7 and more.
                    "blank": {"contrast": 4.0},
                },
            },
            "clips": {
                "short_side": None,  # pixels; larger clips are made smaller
                "crf": 16,  # visually lossless
                "audio_rate": 16_000,  # samples a second, as encoders of speech read; 0: none
            },
            "latents": {
                "num_frames": 17,  # of a piece, 1 + 4n; of several lengths the longest that fits
                "height": 480,  # pixels
                "width": 832,  # pixels
                "fps": 16.0,  # as Wan 2.1 draws; slower clips are left out
                "buckets": (),  # (frames, height, width) of several shapes, in place of these
                "batch": 1,  # pieces encoded at once on each device
                "dtype": "bfloat16",  # of the text encoder
            },
            "shards": {
                "per_shard": 256,  # clips of a file
                "validation_fraction": 0.1,  # of the sources, by a hash of the name
            },
        }
    )
