"""Images made ready for the first convolution: the compiled kernel and torch's operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers import ImageConv, ShrunkConv
from model.norm import native, pad_images
from tests.helpers.lrn import each_form  # noqa: F401 - a fixture

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that are taken from the library of the kernels."""
    found: list[str] = []
    library, text = native._load_kernels()

    class Watched:
        def __getattr__(self, name: str) -> object:
            found.append(name)
            return getattr(library, name)

    monkeypatch.setattr(native, "_load_kernels", lambda: (library and Watched(), text))
    return found


def drawn(*shape: int) -> Tensor:
    """Images less their mean: float32, seldom exact in bfloat16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 60


def expected(images: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    h, w = images.shape[2:]
    return F.pad(images, (0, width - w, 0, height - h)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [
        ((2, 3, 224, 224), 227, 228),
        ((5, 3, 7, 45), 9, 45),
        ((3, 3, 33, 1), 33, 4),
        ((1, 3, 1, 1), 1, 1),
        ((0, 3, 5, 5), 8, 8),
    ],
)
def test_every_bit_is_as_from_torch(
    shape: tuple[int, ...],
    height: int,
    width: int,
    dtype: torch.dtype,
    form: str,
    calls: list[str],
) -> None:
    images = drawn(*shape)
    before = images.clone()
    x = pad_images(images, height, width, dtype)
    assert len(calls) == (form == "native")
    assert x.dtype == dtype
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, expected(images, height, width, dtype))
    assert torch.equal(images, before)


def test_halves_infinities_and_no_numbers_are_rounded_as_by_torch() -> None:
    # Halfway between two bfloat16 (to the even one), just beside, the largest, the smallest.
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0x00000001]
    numbers = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    images = torch.cat([numbers, -numbers, torch.tensor([-0.0])]).expand(1, 3, 4, 15).contiguous()
    x = pad_images(images, 4, 15, torch.bfloat16).contiguous()
    assert torch.equal(x.view(torch.int16), images.bfloat16().view(torch.int16))
    # Rounding these up would carry over into the exponent, and the sign.
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert pad_images(odd.expand(1, 3, 1, 2).contiguous(), 1, 2, torch.bfloat16).isnan().all()


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, 1:, ::2],
        lambda x: x[:, :1],
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.requires_grad_(),
    ],
)
def test_other_images_go_the_way_of_torch(
    other: Callable[[Tensor], Tensor], calls: list[str]
) -> None:
    images = other(drawn(2, 3, 9, 10))
    for dtype in (torch.bfloat16, torch.float32):
        x = pad_images(images, 12, 13, dtype)
        assert torch.equal(x, expected(images, 12, 13, dtype))
        assert x.requires_grad == images.requires_grad
    assert torch.equal(
        pad_images(images, 12, 13, torch.float16), expected(images, 12, 13, torch.float16)
    )
    assert not calls


def test_images_too_large_are_cut_off(calls: list[str]) -> None:
    images = drawn(2, 3, 9, 10)
    for height, width in ((8, 12), (12, 8), (7, 7)):
        x = pad_images(images, height, width, torch.bfloat16)
        assert torch.equal(x, expected(images, height, width, torch.bfloat16))
    assert not calls


def test_a_gradient_reaches_the_image() -> None:
    images = drawn(2, 3, 5, 5).requires_grad_()
    pad_images(images, 8, 8, torch.float32).square().sum().backward()
    torch.testing.assert_close(images.grad, 2 * images.detach())


def test_threads_do_not_change_a_bit() -> None:
    images, threads = drawn(3, 3, 11, 10), torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            x = pad_images(images, 14, 13, torch.bfloat16)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(x, expected(images, 14, 13, torch.bfloat16))


@pytest.mark.parametrize("size", [32, 33, 35, 224])
@pytest.mark.parametrize("edge", [0, 3])
def test_the_convolution_reads_zeros_right_and_below(size: int, edge: int) -> None:
    layer = ImageConv(3, 8, 11, 4, edge)
    images = drawn(2, 3, size, size)
    padded = F.pad(images, (0, edge, 0, edge))
    wanted = F.conv2d(padded, layer.weight, layer.bias, 4)
    torch.testing.assert_close(layer(images), wanted, rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(images)
    assert narrow.dtype == torch.bfloat16
    assert float(((narrow - wanted).norm() / wanted.norm()).detach()) < 0.01


@pytest.mark.parametrize("layer", [ImageConv(3, 8, 11, 4, 3), ShrunkConv(3, 8, 5, 1, 2, 8)])
def test_images_of_half_precision_are_read_as_they_come(layer: ImageConv | ShrunkConv) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        images = drawn(2, 3, 64, 64).to(dtype)
        assert torch.equal(layer(images), layer(images.float()))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(images), layer(images.float()))
