"""How good media are: distances with known values, tests that find what is there and only that."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from specstream.metrics import (
    RandomFeatures,
    average_spectrum_distance,
    clip_score,
    energy_distance,
    energy_test,
    feature_distances,
    log_spectral_distance,
    lpips,
    psnr,
    spectral_distance,
    ssim,
    temporal_consistency,
)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_energy_distance_is_that_of_the_pairs() -> None:
    ours, others = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0], [4.0]])
    across = (1 + 4 + 4 + 1 + 2 + 2) / 6
    assert energy_distance(ours, others) == pytest.approx(2 * across - 2 - (3 + 3 + 0) / 3)
    assert energy_distance(others, ours) == pytest.approx(energy_distance(ours, others))


def test_the_energy_distance_is_unbiased_where_laws_are_one() -> None:
    """Pairs of a sample with itself would add about 2 E|x - x'| / n, 0.2 here."""
    found = torch.tensor(
        [energy_distance(drawn(2 * i, 16, 2), drawn(2 * i + 1, 16, 2)) for i in range(60)]
    )
    assert abs(found.mean()) < 3 * found.std() / 60**0.5 < 0.05


def test_the_energy_distance_of_points_far_apart_is_twice_their_distance() -> None:
    ours, others = torch.zeros(3, 2, 2), torch.full((4, 2, 2), 5.0)
    found = energy_test(ours, others, num_permutations=99)
    assert found.distance == pytest.approx(2 * 10)
    assert found.p_value <= 0.1 and found.noise > 0


def test_a_permutation_test_finds_a_shift_and_a_width_and_no_more() -> None:
    ours = drawn(0, 80, 4)
    assert energy_test(ours, drawn(1, 80, 4) + 0.6, 99).p_value == 0.01
    assert energy_test(ours, 2 * drawn(2, 80, 4), 99).p_value == 0.01
    values = [energy_test(drawn(i, 20, 2), drawn(i + 500, 20, 2), 99).p_value for i in range(60)]
    # of one law p is uniform: its mean is 1/2 within 3 sqrt(1 / 12 / 60), few are small
    assert 0.38 < sum(values) / 60 < 0.62
    assert sum(value <= 0.05 for value in values) <= 8


def test_a_permutation_test_is_a_function_of_its_seed() -> None:
    ours, others = drawn(0, 20, 3), drawn(1, 20, 3) + 0.3
    found = energy_test(ours, others, 49, seed=1)
    assert found == energy_test(ours, others, 49, seed=1)
    assert found.noise != energy_test(ours, others, 49, seed=2).noise


def test_an_energy_distance_refuses_what_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="two samples or more"):
        energy_distance(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="of one shape"):
        energy_distance(torch.zeros(3, 4), torch.zeros(3, 2))


def test_psnr_is_of_the_range_of_states() -> None:
    samples = drawn(0, 4, 1, 8, 8).clamp(-1, 1)
    assert psnr(samples, samples + 0.02) == pytest.approx(40, abs=1e-3)  # 20 log10 (2 / 0.02)
    assert psnr(samples, samples) == math.inf


def test_ssim_is_one_for_equal_videos_and_falls_with_noise() -> None:
    videos = drawn(0, 2, 1, 3, 16, 16).clamp(-1, 1)
    assert ssim(videos, videos) == pytest.approx(1, abs=1e-6)
    near = ssim(videos, videos + 0.1 * drawn(1, *videos.shape))
    assert ssim(videos, videos + 0.5 * drawn(1, *videos.shape)) < near < 1
    with pytest.raises(ValueError, match="SSIM needs 11 pixels a side"):
        ssim(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


class Means(nn.Module):
    """Two features that are known: the means of both halves of an image."""

    num_features = 2

    def forward(self, samples: Tensor) -> Tensor:
        return samples.flatten(1).unflatten(1, (2, -1)).mean(2)


def test_fid_of_a_shift_is_its_squared_length() -> None:
    data = drawn(0, 150, 1, 4, 4).double()  # more than are computed together
    found = feature_distances(data + 3, data, Means())
    assert found.frechet == pytest.approx(3**2 + 3**2, rel=1e-3)
    assert found.features == "Means" and found.kernel > 1
    assert feature_distances(data, data, Means()).frechet == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 4, 8, 8)], ids=["images", "videos"])
def test_random_features_see_texture_and_are_named_so(shape: tuple[int, ...]) -> None:
    data, fresh = drawn(0, 48, *shape), drawn(1, 48, *shape)
    state = torch.get_rng_state()
    same = feature_distances(fresh, data)
    smooth = feature_distances(0.5 * (fresh + fresh.roll(1, -1)), data)
    assert same.features == "random-feature"
    assert smooth.frechet > 3 * same.frechet and smooth.kernel > 5 * abs(same.kernel)
    assert same == feature_distances(fresh, data) and 0 < same.kernel_spread < smooth.kernel
    assert torch.equal(state, torch.get_rng_state())  # torchmetrics draws subsets globally
    once, again = (RandomFeatures(1, len(shape) - 1)(data) for _ in range(2))
    assert torch.equal(once, again) and once.shape == (48, 64)


def test_features_need_some_samples_and_a_grid() -> None:
    with pytest.raises(ValueError, match="at least 4 samples of each kind, got 3"):
        feature_distances(torch.zeros(3, 1, 8, 8), torch.zeros(9, 1, 8, 8))
    with pytest.raises(ValueError, match="axes must be 2"):
        RandomFeatures(axes=1)


def test_temporal_consistency_is_change_over_that_of_the_data() -> None:
    data = drawn(0, 6, 1, 5, 4, 4)
    assert temporal_consistency(data, data) == 1
    assert temporal_consistency(3 * data, data) == pytest.approx(3)
    assert temporal_consistency(data[:, :, :1].expand_as(data), data) == 0  # frozen
    with pytest.raises(ValueError, match="two frames or more"):
        temporal_consistency(data[:, :, :1], data)
    with pytest.raises(ValueError, match="data that move"):
        temporal_consistency(data, torch.zeros_like(data))


def test_spectral_distances_of_a_louder_sound_are_known() -> None:
    sound = drawn(0, 3, 4000)
    assert spectral_distance(sound, sound) == log_spectral_distance(sound, sound) == 0
    assert log_spectral_distance(2 * sound, sound) == pytest.approx(20 * math.log10(2), rel=1e-4)
    assert spectral_distance(2 * sound, sound) == pytest.approx(1 + math.log(2), rel=1e-4)


def test_spectral_distances_hear_pitch_and_not_phase() -> None:
    times = torch.arange(4000) / 8000
    tone, shifted, other = (
        torch.sin(2 * torch.pi * pitch * times + phase)[None] + 0.01 * drawn(0, 1, 4000)
        for pitch, phase in ((440, 0.0), (440, 1.0), (660, 0.0))
    )
    assert spectral_distance(shifted, tone) < 0.5 * spectral_distance(other, tone)
    assert log_spectral_distance(shifted, tone) < 0.5 * log_spectral_distance(other, tone)


def test_an_average_spectrum_knows_bands_and_no_order_in_time() -> None:
    sounds = torch.linspace(-1, 1, 2 * 3 * 4).view(2, 1, 3, 4)
    assert average_spectrum_distance(sounds.flip(3).flip(0), sounds, 80.0) < 1e-5
    louder = sounds.clone()
    louder[:, :, 1] += 0.3  # one band of three by 0.3 of -1..1, which is 12 of 80 dB
    expected = 12 / math.sqrt(3)
    assert average_spectrum_distance(louder, sounds, 80.0) == pytest.approx(expected, rel=1e-4)
    assert average_spectrum_distance(sounds.flip(2), sounds, 80.0) > 1


def test_spectral_distances_refuse_short_and_unlike_sounds() -> None:
    with pytest.raises(ValueError, match="needs more than 512 numbers"):
        spectral_distance(torch.zeros(1, 512), torch.zeros(1, 512))
    with pytest.raises(ValueError, match="must both be"):
        log_spectral_distance(torch.zeros(1, 900), torch.zeros(2, 900))


def test_the_clip_score_is_the_cosine_of_the_model_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}  # fmt: skip
    text = {**sizes, "vocab_size": 9, "eos_token_id": 8}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).eval()
    pixels, tokens = drawn(0, 2, 3, 8, 8), torch.tensor([[1, 2, 8], [3, 4, 8]])
    with torch.no_grad():
        ours = model.get_image_features(pixels).pooler_output
        theirs = model.get_text_features(tokens, torch.ones_like(tokens)).pooler_output
        cosine = float(torch.cosine_similarity(ours, theirs).mean())
        if cosine < 0:  # which the score would cut to 0
            model.visual_projection.weight.neg_()
    model.save_pretrained(tmp_path)

    def processor(images: object = None, text: object = None, **rest: object) -> dict[str, Tensor]:
        if images is not None:
            return {"pixel_values": pixels}
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    monkeypatch.setattr(CLIPProcessor, "from_pretrained", lambda *given, **options: processor)
    found = clip_score(pixels, ["a", "b"], tmp_path)
    assert found == pytest.approx(100 * abs(cosine), rel=1e-4) and found > 0


def test_what_needs_weights_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="is no folder of one"):
        clip_score(images, ["a", "b"], tmp_path / "none")
    with pytest.raises(ValueError, match="network must be one of alex, vgg, squeeze"):
        lpips(images, images, "inception")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package torchvision"):
        lpips(images, images)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"LPIPS needs alexnet-\*.pth in"):
        lpips(images, images)
