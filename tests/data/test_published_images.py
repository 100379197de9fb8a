"""The real images: what is known of them is what is read."""

from __future__ import annotations

import pytest
from conftest import CT_IMAGES

from lungct_tune.data import read_images


@pytest.mark.skipif(not CT_IMAGES.is_dir(), reason=f"the real CT images are not at {CT_IMAGES}")
def test_the_published_images_are_what_is_known_of_them() -> None:
    image_set = read_images(CT_IMAGES, 64)
    assert image_set.classes == ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma")
    assert image_set.unreadable == []
    table = image_set.table
    assert len(table) == len(image_set.images_NHW)
    assert table["folder"].value_counts().to_dict() == {"train": 611, "valid": 72}
    assert table["path"].str.endswith(".jpg").sum() == 12
