"""Sizes that a tower is probed at."""

import pytest
from transformers import Dinov2Config, SiglipVisionConfig

from regiontower.eval.probe.views import checked_side
from regiontower.vision_towers import describe_tower
from regiontower.vision_towers.errors import UserError


def test_a_tower_s_own_size_need_not_be_a_multiple_of_its_patch():
    fixed = describe_tower(SiglipVisionConfig(image_size=60, patch_size=14))
    free = describe_tower(Dinov2Config(image_size=60, patch_size=14))
    assert checked_side(None, fixed) == checked_side(60, fixed) == checked_side(None, free) == 60
    assert checked_side(56, free) == 56
    for side, spec in ((56, fixed), (62, fixed), (62, free)):
        with pytest.raises(UserError, match=f"cannot take {side} px"):
            checked_side(side, spec)
