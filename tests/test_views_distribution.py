"""Views are distributed as those of torchvision's transforms: two-sample tests at fixed seeds.

Each comparison uses the Kolmogorov-Smirnov distance between two samples. The critical value is that
of significance 1e-4; the seeds are fixed, so a test passes always or never.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from view_images import parameters

from softcl.data import make_shapes, strong_view
from softcl.data.recipe import COLUMNS, RECIPE, Parameters, Recipe, draw, draw_box, slots

transforms = pytest.importorskip("torchvision.transforms")

DRAWS = 4000
SCALE, RATIO = list(RECIPE.scale), list(RECIPE.ratio)


def assert_same_distribution(first: np.ndarray, second: np.ndarray, significance: float = 1e-4):
    first, second = np.sort(np.asarray(first)), np.sort(np.asarray(second))
    points = np.concatenate([first, second])
    distance = np.abs(
        np.searchsorted(first, points, side="right") / len(first)
        - np.searchsorted(second, points, side="right") / len(second)
    ).max()
    critical = math.sqrt(
        -0.5 * math.log(significance / 2) * (len(first) + len(second)) / (len(first) * len(second))
    )
    assert distance < critical


def test_the_test_sees_a_shift_of_a_tenth():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=DRAWS), generator.normal(size=DRAWS)
    assert_same_distribution(first, second)
    with pytest.raises(AssertionError):
        assert_same_distribution(first, second + 0.1)


def drawn(number: int, height: int, width: int, seed: int, recipe: Recipe = RECIPE) -> Parameters:
    numbers = torch.rand((number, recipe.columns), generator=torch.Generator().manual_seed(seed))
    return parameters(draw(numbers, height, width, recipe))


# The last two are too elongated for most or all tries to fit.
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 64), (40, 90), (210, 30)])
def test_crops(height, width):
    p = drawn(DRAWS, height, width, 1)
    torch.manual_seed(2)
    image = torch.empty(1, height, width)
    theirs = [transforms.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(DRAWS)]
    top, left, tall, wide = np.array(theirs, dtype=np.float64).T
    ours = [t.double().numpy() for t in (p.top, p.left, p.height, p.width)]
    assert (ours[0] >= 0).all() and (ours[0] + ours[2] <= height).all()
    assert (ours[1] >= 0).all() and (ours[1] + ours[3] <= width).all()
    assert_same_distribution(ours[2] * ours[3], tall * wide)
    assert_same_distribution(ours[3] / ours[2], wide / tall)
    assert_same_distribution(ours[0], top)
    assert_same_distribution(ours[1], left)
    assert_same_distribution(ours[0] + ours[2], top + tall)
    assert_same_distribution(ours[1] + ours[3], left + wide)


@pytest.mark.parametrize("value", [0.0, 1.0 - 2.0**-24])
@pytest.mark.parametrize(("height", "width"), [(33, 47), (1, 1), (3, 16384)])
def test_parameters_at_the_ends_of_the_random_numbers(value, height, width):
    for recipe in (RECIPE, Recipe(scale=(1.0, 1.0), ratio=(1.0, 1.0), solarize=1.0)):
        numbers = torch.full((1, recipe.columns), value)
        table = draw(numbers, height, width, recipe)
        assert table.shape == (1, len(COLUMNS)) and table.is_contiguous()
        p = parameters(table)
        assert p.top >= 0 and p.height >= 1 and p.top + p.height <= height
        assert p.left >= 0 and p.width >= 1 and p.left + p.width <= width
        assert 0 <= p.order < 24


@pytest.mark.parametrize(
    ("size", "scale"),
    [((375, 500), 0.2), ((32, 32), 0.9), ((40, 400), 0.2), ((400, 40), 0.9), ((1, 3), 0.2)],
)
def test_a_box_alone_is_that_of_the_batch(size, scale):
    """In double precision a side may be rounded the other way, once in thousands."""
    recipe = Recipe(scale=(scale, 1.0))
    numbers = torch.rand((2000, recipe.columns), generator=torch.Generator().manual_seed(0))
    batch = draw(numbers, *size, recipe)[:, :4].long()
    alone = torch.tensor([draw_box(row, *size, recipe) for row in numbers[:, :23].tolist()])
    same = (alone == batch).all(1)
    assert int((~same).sum()) <= 4 and int((alone - batch).abs().max()) <= 1
    assert bool((alone[:, :2] >= 0).all()) and bool((alone[:, 2:] >= 1).all())
    assert bool((alone[:, :2] + alone[:, 2:] <= torch.tensor(size)).all())


def test_jitter_factors():
    p = drawn(DRAWS, 32, 32, 3)
    torch.manual_seed(4)
    theirs = [
        transforms.ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])[1:]
        for _ in range(DRAWS)
    ]
    expected = np.array(theirs, dtype=np.float64).T
    for ours, wanted in zip((p.brightness, p.contrast, p.saturation, p.hue), expected, strict=True):
        assert_same_distribution(ours.numpy(), wanted)
    assert_same_distribution(p.sigma.numpy(), np.random.default_rng(5).uniform(0.1, 2.0, DRAWS))


def test_all_orders_of_the_jitter_are_equally_likely():
    kinds, hue_slot = slots(drawn(24_000, 32, 32, 6).order)
    counts = torch.unique(kinds[0] * 12 + kinds[1] * 4 + hue_slot, return_counts=True)[1].double()
    assert len(counts) == 24
    # 23 degrees of freedom: chi-square exceeds 58.6 with probability 6e-5.
    assert ((counts - 1000) ** 2 / 1000).sum() < 58.6


def test_probabilities_and_independence_of_the_choices():
    number = 20_000
    p = drawn(number, 32, 32, 7)
    chosen = (torch.stack((p.mirror, p.jittered, p.grayed, p.blurred)) > 0).double()
    expected = torch.tensor([0.5, 0.8, 0.2, 0.5], dtype=torch.float64)
    deviation = (chosen.mean(1) - expected) / (expected * (1 - expected) / number).sqrt()
    assert deviation.abs().max() < 4
    rows = (p.top, p.left, p.height, p.brightness, p.hue, p.sigma)
    correlation = torch.corrcoef(torch.cat([chosen, torch.stack(rows).double()]))
    correlation[4:7, 4:7] = 0  # the parts of one crop depend on each other
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 4 / math.sqrt(number)


class PillowBlur:
    """The blur of the original recipe."""

    def __call__(self, image):
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def statistics(views: torch.Tensor) -> dict[str, np.ndarray]:
    """Numbers of each view (N, 3, S, S): colours, contrast, sharpness, tilt."""
    half = views.shape[3] // 2
    values = {
        "red": views[:, 0].mean((1, 2)),
        "green": views[:, 1].mean((1, 2)),
        "blue": views[:, 2].mean((1, 2)),
        "contrast": views.flatten(1).std(1),
        "chroma": views.std(1).mean((1, 2)),
        "sharpness": (views[..., 1:] - views[..., :-1]).abs().mean((1, 2, 3)),
        "tilt": views[..., :half].mean((1, 2, 3)) - views[..., half:].mean((1, 2, 3)),
    }
    return {name: value.numpy() for name, value in values.items()}


def test_output_statistics():
    number = 1500
    images = make_shapes(2 * number).images
    steps = [
        transforms.ToPILImage(),
        transforms.RandomResizedCrop(32, scale=SCALE),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([PillowBlur()], p=0.5),
        transforms.ToTensor(),
    ]
    pipeline = transforms.Compose(steps)
    torch.manual_seed(8)
    random.seed(8)
    theirs = statistics(torch.stack([pipeline(image) for image in images[:number]]))
    generator = torch.Generator().manual_seed(9)
    ours = strong_view(images[number:], 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), generator)
    for key, value in statistics(ours).items():
        assert_same_distribution(value, theirs[key])
