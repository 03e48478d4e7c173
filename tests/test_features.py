"""Vision transformers as extractors: tiny CLIP and DINOv2 from a folder, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from fieldsmith.errors import InputError
from fieldsmith.measure.distances import extractor_name, frechet_distance
from fieldsmith.models.features import load_features

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_a_folder_of_weights_gives_features_and_distances(kind, tmp_path):
    torch.manual_seed(0)
    network = CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **SMALL)) if kind == "clip" else Dinov2Model(
        Dinov2Config(**SMALL)
    )  # fmt: skip
    network.save_pretrained(tmp_path)
    features = load_features(str(tmp_path))
    images = torch.rand(40, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    found = features(images)
    assert found.shape == (40, 16) and found.std(0).min() > 0 and "16 features" in extractor_name(features)
    torch.testing.assert_close(features(images[:3]), found[:3], rtol=1e-4, atol=1e-5)
    same, other = frechet_distance(found[:20], found[20:]), frechet_distance(found[:20], features(images[20:] / 4))
    assert other > 2 * same


def test_what_is_no_vision_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="CLIP or DINOv2"):
        load_features(str(tmp_path))
