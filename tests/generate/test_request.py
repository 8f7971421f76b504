"""Requests: prompts that no text encoder can read are refused."""

import pytest

from vdx.config.build import ConfigError
from vdx.generate.request import Request


@pytest.mark.parametrize("half", ["\ud83d", "\udcff"])
def test_half_a_character_in_a_prompt_is_refused(half):
    with pytest.raises(ConfigError, match=r"Prompt 2 is not text: character 6 is U.D.*surrogate"):
        Request(prompts=("a cat", f"a dog{half}"), seed=0, num_frames=1, fps=8.0, sampling={})


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="Prompt 1 is NoneType, expected text"):
        Request(prompts=(None,), seed=0, num_frames=1, fps=8.0, sampling={})
